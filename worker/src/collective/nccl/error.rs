//! What can go wrong in an exchange over NCCL.

use thiserror::Error;

use crate::collective::CollectiveError;
use crate::engine::cuda::GpuError;

/// Why an exchange over NCCL failed.
#[derive(Debug, Error)]
pub enum NcclError {
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    #[error(transparent)]
    Gpu(#[from] GpuError),
    #[error("NCCL did not let go of the GPU within {seconds} s; start this worker again")]
    Stuck { seconds: u64 },
}
