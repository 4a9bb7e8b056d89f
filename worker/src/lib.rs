//! The worker: joins a coordinator, computes slots with candle, and sums gradients with its peers.
//!
//! In: [`JoinOptions`]. Out: a finished job, or one error. [`join()`] is the whole life of a worker: [`connect`] and
//! [`session`] talk to the coordinator, [`fetch`] and [`blocks`] get what the step needs, [`run`] is the step itself on
//! the engine's thread, [`collective`] sums with the peers, and [`upload`] hands the results over.

pub mod address;
mod attend;
pub mod blocks;
pub mod collective;
pub mod connect;
pub mod engine;
mod engine_thread;
pub mod fetch;
mod join;
pub mod leases;
mod place;
mod resolve;
pub mod run;
pub mod session;
pub mod status;
pub mod temporary;
pub mod upload;
mod waits;

use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

pub use crate::engine::device::{ComputeDevice, Device, DeviceError, forget_peak_of_this_process};
pub use engine::numerics::instruction_set;
pub use join::join;
use status::Status;

/// What `worker --version` says, and what a coordinator compares with its own.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Long enough for a coordinator that must find another machine.
pub const RECONNECT_TIMEOUT: Duration = Duration::from_secs(600);

/// How long a worker that was asked to stop waits to be let go. Whoever asks usually kills it after 30 s.
pub const DRAINING_PATIENCE: Duration = Duration::from_secs(25);

/// How to join a coordinator. Only the address is needed.
#[derive(Clone, Debug)]
pub struct JoinOptions {
    /// `HOST:PORT` of the coordinator, or `HOST` where it listens at the default port.
    pub address: String,
    /// Default: all cores.
    pub threads: Option<usize>,
    pub device: Device,
    /// Sent as a bearer token with every call.
    pub token: Option<String>,
    /// The address that other workers should use. Default: the one that the coordinator sees.
    pub exchange_host: Option<String>,
    /// The port at which other workers reach this one. Default: any that is free.
    pub exchange_port: Option<u16>,
    /// Where fetched models are kept. Default: `MUSTER_CACHE_DIR`, else `~/.cache/muster`.
    pub cache_dir: Option<PathBuf>,
    /// For people. Default: host name and process number.
    pub name: Option<String>,
    /// How long to try to reach the coordinator at first.
    pub connect_timeout: Duration,
    /// How long to wait, with the state that is held, for a coordinator that was lost.
    pub reconnect_timeout: Duration,
    /// How long to wait, once asked to stop, until what was computed here is counted.
    pub draining_patience: Duration,
    /// Where it is noted what the worker is at.
    pub status: Status,
}

impl JoinOptions {
    pub fn new(address: impl Into<String>) -> Self {
        Self {
            address: address.into(),
            threads: None,
            device: Device::default(),
            token: None,
            exchange_host: None,
            exchange_port: None,
            cache_dir: None,
            name: None,
            connect_timeout: Duration::from_secs(60),
            reconnect_timeout: RECONNECT_TIMEOUT,
            draining_patience: DRAINING_PATIENCE,
            status: Status::default(),
        }
    }
}

/// Why a worker came to a good end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finished {
    /// The coordinator said that the job is done (or stopped, with the reason).
    Job { reason: String },
    /// The worker was asked to stop and has left.
    Left,
}

#[derive(Debug, Error)]
pub enum WorkerError {
    #[error(transparent)]
    Address(#[from] address::AddressError),
    #[error("coordinator {address} cannot be reached: {reason} (tried for {seconds} s)")]
    Unreachable {
        address: String,
        reason: String,
        seconds: u64,
    },
    #[error("{address} answers, but is no Muster coordinator")]
    NoCoordinator { address: String },
    #[error("the token contains characters that cannot be sent")]
    Token,
    #[error("coordinator {address} refused this worker: {reason}")]
    Refused { address: String, reason: String },
    #[error(
        "this worker holds the state of job {held}, but coordinator {address} runs job {found}, and its own did not come \
         back within {seconds} s"
    )]
    OtherJob {
        address: String,
        held: String,
        found: String,
        seconds: u64,
    },
    #[error("this worker cannot work for the coordinator: {reason}")]
    Coordinator { reason: String },
    #[error("the session with the coordinator was lost {times} times in a row: {reason}")]
    Lost { times: u32, reason: String },
    #[error("the job failed: {reason}")]
    JobFailed { reason: String },
    #[error("the engine stopped for a fault of its own (see above)")]
    EnginePanicked,
    #[error("the engine hangs: it did not end within {seconds} s; start this worker again")]
    EngineHangs { seconds: u64 },
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Collective(#[from] collective::CollectiveError),
    #[error(transparent)]
    Fetch(#[from] fetch::FetchError),
    #[error("the state could not be saved: {0}")]
    Upload(#[from] upload::UploadError),
    #[error(transparent)]
    Run(#[from] run::RunError),
}
