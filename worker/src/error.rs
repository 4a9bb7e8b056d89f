//! Why a worker came to a bad end.

use thiserror::Error;

use crate::collective::CollectiveError;
use crate::engine::device::DeviceError;
use crate::net::address::AddressError;
use crate::rpc::connect::ConnectError;
use crate::rpc::fetch::FetchError;
use crate::rpc::upload::UploadError;
use crate::run::engine_thread::EngineThreadError;

/// Why a worker came to a bad end.
#[derive(Debug, Error)]
pub enum WorkerError {
    #[error(transparent)]
    Address(#[from] AddressError),
    #[error(transparent)]
    Connect(#[from] ConnectError),
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
    #[error(transparent)]
    Engine(#[from] EngineThreadError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("the state could not be saved: {0}")]
    Upload(#[from] UploadError),
}
