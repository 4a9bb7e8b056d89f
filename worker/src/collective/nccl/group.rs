//! One generation's communicator, as the engine's thread uses it.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::error::NcclError;
use super::library::{Call, UniqueId};
use super::options::{GroupOptions, Task, Work};
use super::owner::Owner;
use crate::collective::CollectiveError;
use crate::collective::generation_token::{GENERATION_CHECK_INTERVAL, GenerationToken};

/// How long NCCL may take to let go of the GPU once its communicator is aborted.
const LETTING_GO: Duration = Duration::from_secs(60);

/// One generation's communicator, as the engine uses it. It ends with the generation.
pub struct Group {
    rank: u32,
    size: usize,
    token: Arc<GenerationToken>,
    tasks: mpsc::Sender<Task>,
    ids: mpsc::Sender<UniqueId>,
}

impl Group {
    /// Begins to form the communicator, on a thread of its own.
    pub fn form(options: GroupOptions) -> Self {
        let (tasks, waiting_tasks) = mpsc::channel();
        let (ids, waiting_ids) = mpsc::channel();
        let (rank, size, token) = (options.rank, options.size, options.token.clone());
        // Without the thread its ends of the channels are closed, which says as much as its failure.
        let owner = move || Owner::live(options, &waiting_ids, &waiting_tasks);
        let spawned = std::thread::Builder::new()
            .name("nccl".to_owned())
            .spawn(owner);
        if let Err(error) = spawned {
            tracing::error!("NCCL's thread cannot be started: {error}");
        }
        Self {
            rank,
            size,
            token,
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

    /// Passes on the identifier that rank 0 made, as the coordinator sent it. One of another length is none of NCCL's.
    pub fn identify(&self, id: &[u8]) {
        if let Ok(id) = id.try_into() {
            // Where the thread has ended, nobody needs it.
            let _ = self.ids.send(UniqueId(id));
        }
    }

    /// Begins a call. Returns when it is on the stream.
    pub(super) fn begin(&self, call: Call) -> Result<(), NcclError> {
        self.carry_out(Work::Begin(call))?;
        common::failpoint::reached("exchange");
        Ok(())
    }

    pub(super) fn pace(&self) -> Result<(), NcclError> {
        self.carry_out(Work::Pace)
    }

    pub(super) fn finish(&self) -> Result<(), NcclError> {
        self.carry_out(Work::Finish)
    }

    fn carry_out(&self, work: Work) -> Result<(), NcclError> {
        let over = || NcclError::Collective(CollectiveError::Superseded);
        let (answer, answered) = mpsc::channel();
        let task = Task { work, answer };
        self.tasks.send(task).map_err(|_| over())?;
        let mut deadline = None;
        loop {
            match answered.recv_timeout(GENERATION_CHECK_INTERVAL) {
                Ok(answer) => return Ok(answer?),
                Err(RecvTimeoutError::Disconnected) => return Err(over()),
                // The thread itself watches every deadline. It must be waited for, because the memory is in use.
                Err(RecvTimeoutError::Timeout) if self.token.check().is_ok() => {}
                Err(RecvTimeoutError::Timeout) => {
                    let ends = deadline.get_or_insert_with(|| Instant::now() + LETTING_GO);
                    if Instant::now() > *ends {
                        let seconds = LETTING_GO.as_secs();
                        return Err(NcclError::Stuck { seconds });
                    }
                }
            }
        }
    }
}
