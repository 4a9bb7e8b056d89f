//! What a communicator is made with, and what is asked of the thread that calls NCCL for it.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use super::library::Call;
use crate::collective::CollectiveError;
use crate::collective::generation_token::GenerationToken;
use crate::engine::cuda::Gpu;

/// Longest time for a call, however slow steps are: the coordinator expels whoever is a minute behind the others.
const LONGEST_CALL: Duration = Duration::from_secs(45);
/// Least time for members to find each other: machines that are far apart need seconds, many of them more.
const FORMING: Duration = Duration::from_secs(30);

/// How long a call to NCCL may take before it counts as hung.
///
/// This is beyond the time after which the coordinator expels a silent member, so that it is NCCL that hangs and no peer.
#[derive(Clone, Copy, Debug)]
pub struct NcclTimeouts {
    /// How long members may take to form the communicator.
    pub forming: Duration,
    /// How long each bucket may take.
    pub call: Duration,
}

impl NcclTimeouts {
    /// Time limits for a generation in which a peer that is silent for `silence` is given up.
    pub fn beyond(silence: Duration) -> Self {
        let call = (2 * silence).min(LONGEST_CALL);
        Self {
            forming: call.max(FORMING),
            call,
        }
    }
}

/// What the owner tells the coordinator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NcclEvent {
    IdCreated(Vec<u8>),
    Failed(String),
}

/// What one member's communicator is made with, for one generation.
pub struct GroupOptions {
    pub gpu: Arc<Gpu>,
    pub rank: u32,
    pub size: usize,
    pub token: Arc<GenerationToken>,
    pub timeouts: NcclTimeouts,
    pub tell: Box<dyn Fn(NcclEvent) + Send>,
}

/// What the engine asks of the thread that calls NCCL.
pub(super) enum Work {
    Begin(Call),
    /// Ends a bucket: waits until all but the newest few have ended on the GPU.
    Pace,
    /// Waits until all buckets have ended on the GPU.
    Finish,
}

/// A task for the thread that calls NCCL, and where its answer goes.
pub(super) struct Task {
    pub(super) work: Work,
    pub(super) answer: mpsc::Sender<Result<(), CollectiveError>>,
}
