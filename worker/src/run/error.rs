//! Why the engine's thread may end before its run does.

use common::files::FileError;
use thiserror::Error;

use crate::collective::CollectiveError;
use crate::engine::EngineError;
use crate::rpc::blocks::BlocksError;

/// Why the engine's thread ended with an error.
#[derive(Debug, Error)]
pub enum RunError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    State(#[from] FileError),
    #[error(transparent)]
    Blocks(#[from] BlocksError),
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Nccl(crate::collective::nccl::NcclError),
    #[error("the checkpoint says step {found} but the coordinator step {expected}")]
    StartStep { found: u64, expected: u64 },
}
