//! The exchange over NCCL, between GPUs. The coordinator decides for all members of a generation whether it is used.
//!
//! In: sums on the GPU, and the identifier of the communicator, which rank 0 makes and the coordinator passes on. Out: the
//! same mean gradient on every member, to the bits that the exchange over TCP gives, or word that NCCL failed. Slots and states
//! still travel over the mesh.
//!
//! A [`Group`] is one generation's communicator. Only its own thread ([`owner`]) calls NCCL: whoever waits for an answer
//! can be let go when the generation ends, because that thread never waits in NCCL itself.

mod error;
mod group;
mod library;
mod options;
mod owner;
mod reduce;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use proto::v1;

pub use self::error::NcclError;
pub use self::group::Group;
use self::library::nccl;
pub use self::options::{GroupOptions, NcclEvent, NcclTimeouts};
pub use self::reduce::all_reduce;
use crate::engine::cuda::Gpu;

/// What the coordinator is told of a GPU when its worker joins.
pub fn introduce(gpu: &Gpu) -> v1::Gpu {
    let (nccl_version, fault) = match nccl() {
        Ok(nccl) => (nccl.version, ""),
        Err(fault) => (0, fault),
    };
    v1::Gpu {
        uuid: gpu.uuid(),
        nccl_version,
        nccl_fault: fault.chars().take(200).collect(),
    }
}
