//! The worker: joins a coordinator, computes slots with candle, and sums gradients with its peers.
//!
//! In: [`JoinOptions`]. Out: a finished job, or one error. [`join()`] is the whole life of a worker. The rooms from top to
//! bottom; each imports only from those below it: [`session`] (the life of a worker, and one session with the coordinator),
//! [`run`] (the step, on the engine's thread), [`rpc`] (the connection, and what is fetched and handed over by calls of its
//! own), [`collective`] (sums with the peers), [`engine`] (models, operations, optimizer), [`net`] (addresses and names).

pub mod collective;
pub mod engine;
mod error;
pub mod net;
mod options;
pub mod rpc;
pub mod run;
pub mod session;
pub mod status;

pub use engine::device::{ComputeDevice, Device, DeviceError, forget_peak_of_this_process};
pub use engine::numerics::instruction_set;
pub use error::WorkerError;
pub use options::{DRAINING_TIMEOUT, Finished, JoinOptions, RECONNECT_TIMEOUT};
pub use session::join::join;

/// What `worker --version` says, and what a coordinator compares with its own.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
