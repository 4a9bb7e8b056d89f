//! How a generation's gradients travel, as the coordinator decided it.
//!
//! In: the generation, and the identifier that rank 0 made for it. Out: where it is NCCL, a group beside the mesh, whose word
//! goes up; where it is TCP, the reason, logged once.

use std::sync::PoisonError;

use proto::v1;

#[cfg(feature = "cuda")]
use crate::ComputeDevice;
use crate::collective::Membership;
#[cfg(feature = "cuda")]
use crate::collective::nccl::{NcclEvent, NcclTimeouts};
use crate::session::stream::Forwarder;
#[cfg(feature = "cuda")]
use crate::session::stream::Up;

impl Forwarder {
    /// Begins to form the NCCL group of a generation that was just entered, where it exchanges over NCCL.
    pub(super) fn group_up(&self, generation: &v1::Generation, membership: &Membership) {
        let reason = &generation.tcp_because;
        if membership.members.len() > 1 && !reason.is_empty() {
            let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
            if *told != *reason {
                tracing::info!("gradients are exchanged over TCP: {reason}");
                told.clone_from(reason);
            }
        }
        #[cfg(feature = "cuda")]
        if let (true, ComputeDevice::Cuda { gpu, .. }) = (generation.nccl, &self.device) {
            let (up, number) = (self.up.clone(), generation.generation);
            let tell = move |word| {
                // Where it cannot be said, the session is over.
                let _ = up.blocking_send(common::wire::up(message(number, word)));
            };
            let timeouts = NcclTimeouts::beyond(membership.silence);
            self.collective
                .group_up(membership, gpu.clone(), timeouts, tell);
        }
    }

    /// Passes on the identifier by which the members of an NCCL group find each other.
    #[cfg_attr(not(feature = "cuda"), expect(unused_variables, clippy::unused_self))]
    pub(super) fn identify(&self, nccl_id: &v1::NcclId) {
        #[cfg(feature = "cuda")]
        if let Some(group) = self.collective.group(nccl_id.generation) {
            group.identify(&nccl_id.id);
        }
    }
}

#[cfg(feature = "cuda")]
fn message(generation: u64, word: NcclEvent) -> Up {
    match word {
        NcclEvent::IdCreated(id) => Up::NcclId(v1::NcclId {
            generation,
            id: id.into(),
        }),
        NcclEvent::Failed(reason) => Up::NcclLost(v1::NcclLost { generation, reason }),
    }
}
