//! The exchange over NCCL, between GPUs. The coordinator decides for all members of a generation whether it is used.
//!
//! In: sums on the GPU, and the identifier of the communicator, which rank 0 makes and the coordinator passes on. Out: the
//! same mean gradient on every member, to the bits that the exchange over TCP gives, or word that NCCL failed. Slots and states
//! still travel over the mesh.
//!
//! A [`Group`] is one generation's communicator. Only its own thread ([`owner`]) calls NCCL: whoever waits for an answer
//! can be let go when the generation ends, because that thread never waits in NCCL itself.

mod library;
mod owner;
mod reduce;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use proto::v1;
use thiserror::Error;

use self::library::{Call, UniqueId, nccl};
use self::owner::Owner;
use self::reduce::{exact_mean, fast_mean};
use super::CollectiveError;
use super::fence::{Fence, TICK};
use crate::engine::cuda::engine::{GpuMean, SumsOnGpu};
use crate::engine::cuda::sums::DeviceSums;
use crate::engine::cuda::{Gpu, GpuError};

/// How long NCCL may take to let go of the GPU once its communicator is aborted.
const LETTING_GO: Duration = Duration::from_secs(60);
/// A call that takes longer hangs, however slow steps are: the coordinator expels whoever is a minute behind the others.
const LONGEST_CALL: Duration = Duration::from_secs(45);
/// The least time for members to find each other: machines that are far apart need seconds, many of them more.
const FORMING: Duration = Duration::from_secs(30);

#[derive(Debug, Error)]
pub enum NcclError {
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    #[error(transparent)]
    Gpu(#[from] GpuError),
    #[error("NCCL did not let go of the GPU within {seconds} s; start this worker again")]
    Stuck { seconds: u64 },
}

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
    pub fence: Arc<Fence>,
    pub patience: Patience,
    pub tell: Box<dyn Fn(Word) + Send>,
}

/// One generation's communicator, as the engine uses it. It ends with the generation's fence.
pub struct Group {
    rank: u32,
    size: usize,
    fence: Arc<Fence>,
    tasks: mpsc::Sender<Task>,
    ids: mpsc::Sender<UniqueId>,
}

enum Work {
    Begin(Call),
    /// Ends a bucket: waits until all but the newest few have ended on the GPU.
    Pace,
    /// Waits until all have.
    Finish,
}

struct Task {
    work: Work,
    answer: mpsc::Sender<Result<(), CollectiveError>>,
}

impl Group {
    /// Begins to form the communicator, on a thread of its own.
    pub fn form(setup: Setup) -> Self {
        let (tasks, waiting_tasks) = mpsc::channel();
        let (ids, waiting_ids) = mpsc::channel();
        let (rank, size, fence) = (setup.rank, setup.size, setup.fence.clone());
        // Without the thread its ends of the channels are closed, which says as much as its failure.
        let owner = move || Owner::live(setup, &waiting_ids, &waiting_tasks);
        let spawned = std::thread::Builder::new()
            .name("nccl".to_owned())
            .spawn(owner);
        if let Err(error) = spawned {
            tracing::error!("NCCL's thread cannot be started: {error}");
        }
        Self {
            rank,
            size,
            fence,
            tasks,
            ids,
        }
    }

    pub fn rank(&self) -> usize {
        self.rank as usize
    }

    pub fn size(&self) -> usize {
        self.size
    }

    /// The identifier that rank 0 made, as the coordinator passed it on. Of another length it is none of NCCL's.
    pub fn identify(&self, id: &[u8]) {
        if let Ok(id) = id.try_into() {
            // Where the thread has ended, nobody needs it.
            let _ = self.ids.send(UniqueId(id));
        }
    }

    /// Sums over all members. The mean gradient, the same bits on each, takes memory on the GPU until it is dropped: before the
    /// next slot, for which that memory is counted on.
    pub fn all_reduce(&self, held: &SumsOnGpu) -> Result<GpuMean, NcclError> {
        let SumsOnGpu { gpu, sums, scalars } = *held;
        let mean = match sums {
            DeviceSums::Exact(sums) => exact_mean(gpu, self, sums, scalars)?,
            DeviceSums::Fast(sums) => fast_mean(gpu, self, sums, scalars)?,
        };
        Ok(GpuMean::Flat(mean))
    }

    /// Returns when the call is on the stream.
    fn begin(&self, call: Call) -> Result<(), NcclError> {
        self.carry_out(Work::Begin(call))?;
        common::failpoint::reached("exchange");
        Ok(())
    }

    fn pace(&self) -> Result<(), NcclError> {
        self.carry_out(Work::Pace)
    }

    fn finish(&self) -> Result<(), NcclError> {
        self.carry_out(Work::Finish)
    }

    fn carry_out(&self, work: Work) -> Result<(), NcclError> {
        let over = || NcclError::Collective(CollectiveError::Superseded);
        let (answer, answered) = mpsc::channel();
        let task = Task { work, answer };
        self.tasks.send(task).map_err(|_| over())?;
        let mut patience_ends = None;
        loop {
            match answered.recv_timeout(TICK) {
                Ok(answer) => return Ok(answer?),
                Err(RecvTimeoutError::Disconnected) => return Err(over()),
                // The thread itself watches every deadline. It must be waited for, because the memory is in use.
                Err(RecvTimeoutError::Timeout) if self.fence.check().is_ok() => {}
                Err(RecvTimeoutError::Timeout) => {
                    let ends = patience_ends.get_or_insert_with(|| Instant::now() + LETTING_GO);
                    if Instant::now() > *ends {
                        let seconds = LETTING_GO.as_secs();
                        return Err(NcclError::Stuck { seconds });
                    }
                }
            }
        }
    }
}
