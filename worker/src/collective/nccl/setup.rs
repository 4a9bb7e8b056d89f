//! What a communicator is made with, and what is asked of the thread that calls NCCL for it.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use super::library::Call;
use crate::collective::CollectiveError;
use crate::collective::generation_token::GenerationToken;
use crate::engine::cuda::Gpu;

/// A call that takes longer hangs, however slow steps are: the coordinator expels whoever is a minute behind the others.
const LONGEST_CALL: Duration = Duration::from_secs(45);
/// The least time for members to find each other: machines that are far apart need seconds, many of them more.
const FORMING: Duration = Duration::from_secs(30);

/// How long what may hang is waited for. Beyond the time after which the coordinator expels a silent member, so that it is
/// NCCL that hangs and no peer.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    pub forming: Duration,
    /// For each bucket.
    pub call: Duration,
}

impl Patience {
    /// Where a peer that is silent for so long is given up.
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
pub enum Word {
    Id(Vec<u8>),
    Lost(String),
}

/// Of one member, for one generation.
pub struct Setup {
    pub gpu: Arc<Gpu>,
    pub rank: u32,
    pub size: usize,
    pub token: Arc<GenerationToken>,
    pub patience: Patience,
    pub tell: Box<dyn Fn(Word) + Send>,
}

/// What the engine asks of the thread that calls NCCL.
pub(super) enum Work {
    Begin(Call),
    /// Ends a bucket: waits until all but the newest few have ended on the GPU.
    Pace,
    /// Waits until all have.
    Finish,
}

pub(super) struct Task {
    pub(super) work: Work,
    pub(super) answer: mpsc::Sender<Result<(), CollectiveError>>,
}
