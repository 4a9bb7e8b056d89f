//! Why a job was not run, or not to its end, and the exit code that says so.

use common::files::FileError;
use common::job::JobErrors;
use common::progress::Cancelled;
use thiserror::Error;

use crate::exit;
use crate::prepare::PreflightError;
use crate::rpc::listener::{ListenError, TokenError};
#[cfg(feature = "single-node")]
use crate::run::local_workers::{self, DevicesError};
use crate::run::notify_finished::NotifyError;
use crate::run::push::PushError;
use crate::run::resume::ResumeError;
use crate::store::lock::LockError;
use crate::store::output::OutputError;

#[derive(Debug, Error)]
pub enum StartError {
    #[error(transparent)]
    Job(#[from] JobErrors),
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    #[error(transparent)]
    Output(#[from] OutputError),
    #[error(transparent)]
    Resume(#[from] ResumeError),
    #[error("the journal cannot be used: {0}")]
    Journal(FileError),
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error(transparent)]
    Push(#[from] PushError),
    #[error(transparent)]
    Notify(#[from] NotifyError),
    #[error(
        "this build has no engine: start workers with `worker join`, or build with the feature single-node"
    )]
    NoEngine,
    #[cfg(feature = "single-node")]
    #[error(transparent)]
    Devices(#[from] local_workers::DevicesError),
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    #[error("cannot start: {0}")]
    Runtime(#[from] std::io::Error),
    /// The job began and failed.
    #[error("{0}")]
    Failed(String),
}

impl StartError {
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Job(_) | Self::Token(_) | Self::NoEngine => exit::USAGE,
            #[cfg(feature = "single-node")]
            Self::Devices(DevicesError::TooMany { .. }) => exit::USAGE,
            // What passes is worth another try with the same command, unlike what the job itself gets wrong.
            Self::Listen(ListenError::PortInUse { .. }) => exit::JOB_FAILED,
            Self::Lock(_) | Self::Notify(_) | Self::Journal(_) => exit::JOB_FAILED,
            Self::Runtime(_) | Self::Failed(_) => exit::JOB_FAILED,
            _ => exit::PREFLIGHT,
        }
    }
}
