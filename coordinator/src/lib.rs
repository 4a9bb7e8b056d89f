//! The coordinator: checks the job, packs and serves the data, schedules the workers, and writes the results.

mod addresses;
pub mod args;
pub mod check;
pub mod checkpoints;
pub mod claim;
pub mod cluster;
pub mod connections;
pub mod door;
pub mod driver;
pub mod events;
mod farewell;
pub mod journal;
pub mod output;
pub mod prepare;
pub mod reception;
pub mod recorder;
pub mod resume;
pub mod server;
pub mod service;
pub mod shelf;
pub mod signals;
#[cfg(feature = "single-node")]
pub mod single_node;
pub mod start;
mod test_prompts;
pub mod train;
pub mod ui;
pub mod upload;
pub mod version;
pub mod words;

/// What `coordinator --version` says, and what workers must be of.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
