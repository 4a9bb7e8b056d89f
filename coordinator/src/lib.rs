//! The coordinator: checks the job, packs and serves the data, schedules the workers, and writes the results.
//!
//! The rooms from top to bottom; each imports only from those below it: [`cli`] (what a user types), [`run`] (one run from job to
//! result), [`rpc`] (what workers see), [`driver`] (the task that owns the cluster), [`report`] (what a run tells), [`prepare`] (job,
//! model and data before anything starts), [`store`] (what stays on disk), [`cluster`] (decides, and does nothing).

pub mod cli;
pub mod cluster;
pub mod driver;
pub mod exit;
pub mod prepare;
pub mod report;
pub mod rpc;
pub mod run;
pub mod store;
pub mod version;

/// What `coordinator --version` says, and what workers must be of.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
