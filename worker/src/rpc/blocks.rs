//! Blocks: fetched as soon as their slot is leased, kept while they may be needed again.
//!
//! In: slots by number. Out: their decoded blocks, or an error once the retries are used up. Which blocks a slot holds
//! is computed from the job ([`common::plan`]), never asked.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use common::data::block::{Block, BlockError};
use common::failpoint;
use common::job::JobSpec;
use common::plan::{Schedule, eval_slots};
use common::wire::{MAX_BLOCKS_PER_FETCH, PlanKind};
use proto::v1;
use thiserror::Error;
use tokio::sync::{Semaphore, oneshot};
use tokio_util::sync::CancellationToken;

use crate::rpc::connect::{Client, retry_delays};

/// Capacity of the cache of blocks, in bytes of their encoding.
const CACHE_BYTES: usize = 64 << 20;
const MAX_BLOCK_FAILURES: usize = 6;
/// Most requests for blocks at a time.
const MAX_REQUESTS: usize = 4;
/// Steps whose slots are remembered: the current one and the one planned ahead, for training and for evaluation.
const REMEMBERED_STEPS: usize = 4;

/// Why the blocks of a slot could not be fetched.
#[derive(Debug, Error)]
pub enum BlocksError {
    #[error("the coordinator leased slot {slot} of a step with {slots} slots")]
    NoSuchSlot { slot: u32, slots: usize },
    #[error("block {block} from the coordinator is damaged: {source}")]
    Damaged { block: u64, source: BlockError },
    #[error("fetching blocks from the coordinator failed: {reason}")]
    Broken { reason: String },
}

/// The blocks of a run.
pub struct Blocks {
    client: Client,
    job: Arc<JobSpec>,
    set: v1::BlockSet,
    schedule: Schedule,
    requests: Semaphore,
    memory: Mutex<Memory>,
    closed: CancellationToken,
}

/// The blocks of one leased slot, on their way.
pub struct PendingBlocks(oneshot::Receiver<Result<Vec<Block>, BlocksError>>);

impl PendingBlocks {
    /// What arrives by this channel. Where its other end is dropped, the session has ended.
    pub fn new(arriving: oneshot::Receiver<Result<Vec<Block>, BlocksError>>) -> Self {
        Self(arriving)
    }

    /// Waits until the slot's blocks are there.
    pub async fn wait(self) -> Result<Vec<Block>, BlocksError> {
        let abandoned = |_| BlocksError::Broken {
            reason: "the session ended".to_owned(),
        };
        self.0.await.map_err(abandoned)?
    }
}

impl Blocks {
    pub fn new(client: Client, job: Arc<JobSpec>, set: v1::BlockSet) -> Self {
        let block_bytes = Block::encoded_len(set.sequence_len as usize);
        Self {
            schedule: Schedule::new(&job, set.train_blocks),
            client,
            job,
            requests: Semaphore::new(MAX_REQUESTS),
            memory: Mutex::new(Memory {
                capacity: (CACHE_BYTES / block_bytes.max(1)).max(1),
                ..Memory::default()
            }),
            set,
            closed: CancellationToken::new(),
        }
    }

    /// Ends every fetch: the session is over.
    pub fn close(&self) {
        self.closed.cancel();
    }

    /// Starts to fetch a slot's blocks. Must be called within the runtime; dropping the result ends the fetch.
    pub fn request(self: &Arc<Self>, kind: PlanKind, step: u64, slot: u32) -> PendingBlocks {
        let (mut sender, receiver) = oneshot::channel();
        let blocks = self.clone();
        tokio::spawn(async move {
            let fetched = tokio::select! {
                fetched = blocks.slot(kind, step, slot) => fetched,
                () = sender.closed() => return,
                () = blocks.closed.cancelled() => return,
            };
            // The receiver may be gone: its lease was void.
            let _ = sender.send(fetched);
        });
        PendingBlocks::new(receiver)
    }

    async fn slot(&self, kind: PlanKind, step: u64, slot: u32) -> Result<Vec<Block>, BlocksError> {
        let slots = self.slots(kind, step);
        let numbers = slots.get(slot as usize).ok_or(BlocksError::NoSuchSlot {
            slot,
            slots: slots.len(),
        })?;
        let mut found = self.lock().get(numbers);
        let missing: Vec<u64> = numbers
            .iter()
            .copied()
            .filter(|number| !found.contains_key(number))
            .collect();
        for part in missing.chunks(MAX_BLOCKS_PER_FETCH) {
            found.extend(self.fetch(part).await?);
        }
        let ordered = numbers.iter().filter_map(|number| found.get(number));
        let blocks: Vec<Block> = ordered.map(|block| Block::clone(block)).collect();
        self.lock().keep(found);
        Ok(blocks)
    }

    fn slots(&self, kind: PlanKind, step: u64) -> Arc<Vec<Vec<u64>>> {
        // Every evaluation has the same slots.
        let key = match kind {
            PlanKind::Train => (kind, step),
            PlanKind::Eval => (kind, 0),
        };
        if let Some(slots) = self.lock().slots.get(&key) {
            return slots.clone();
        }
        let slots = Arc::new(match kind {
            PlanKind::Train => self.schedule.step_slots(step),
            PlanKind::Eval => eval_slots(&self.job, self.set.train_blocks, self.set.eval_blocks),
        });
        let mut memory = self.lock();
        while memory.slots.len() >= REMEMBERED_STEPS {
            memory.slots.pop_first();
        }
        memory.slots.insert(key, slots.clone());
        slots
    }

    /// Fetches these blocks, calling again where a call breaks.
    async fn fetch(&self, numbers: &[u64]) -> Result<HashMap<u64, Arc<Block>>, BlocksError> {
        let mut delays = retry_delays(MAX_BLOCK_FAILURES);
        loop {
            let reason = {
                let _permit = self.requests.acquire().await;
                match self.call(numbers).await {
                    Ok(blocks) => return Ok(blocks),
                    Err(BlocksError::Broken { reason }) => reason,
                    Err(error) => return Err(error),
                }
            };
            let Some(delay) = delays.next() else {
                return Err(BlocksError::Broken { reason });
            };
            tracing::warn!("fetching blocks broke off ({reason}); trying again");
            tokio::time::sleep(delay).await;
        }
    }

    async fn call(&self, numbers: &[u64]) -> Result<HashMap<u64, Arc<Block>>, BlocksError> {
        let broken = |reason: &str| BlocksError::Broken {
            reason: reason.to_owned(),
        };
        let request = v1::FetchBlocksRequest {
            digest: self.set.digest.clone(),
            blocks: numbers.to_vec(),
        };
        let response = self.client.clone().fetch_blocks(request).await;
        let mut chunks = response.map_err(|e| broken(e.message()))?.into_inner();
        let mut blocks = HashMap::with_capacity(numbers.len());
        for &block in numbers {
            let chunk = chunks.message().await.map_err(|e| broken(e.message()))?;
            let chunk = chunk
                .filter(|chunk| chunk.block == block)
                .ok_or_else(|| broken("another block came than the one that is due"))?;
            let decoded = Block::decode(&chunk.data, self.set.sequence_len as usize)
                .map_err(|source| BlocksError::Damaged { block, source })?;
            blocks.insert(block, Arc::new(decoded));
            failpoint::reached("fetch");
        }
        Ok(blocks)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The blocks used last, and the slots of the steps in progress.
#[derive(Default)]
struct Memory {
    capacity: usize,
    clock: u64,
    blocks: HashMap<u64, (u64, Arc<Block>)>,
    /// Block by the time of its last use.
    ages: BTreeMap<u64, u64>,
    slots: BTreeMap<(PlanKind, u64), Arc<Vec<Vec<u64>>>>,
}

impl Memory {
    fn get(&mut self, numbers: &[u64]) -> HashMap<u64, Arc<Block>> {
        let found = numbers.iter().filter_map(|number| {
            let (_, block) = self.blocks.get(number)?;
            Some((*number, block.clone()))
        });
        found.collect()
    }

    /// Keeps these blocks as the ones used last, and drops the oldest beyond the capacity.
    fn keep(&mut self, blocks: HashMap<u64, Arc<Block>>) {
        for (number, block) in blocks {
            self.clock += 1;
            if let Some((age, _)) = self.blocks.insert(number, (self.clock, block)) {
                self.ages.remove(&age);
            }
            self.ages.insert(self.clock, number);
        }
        while self.blocks.len() > self.capacity {
            let Some((_, number)) = self.ages.pop_first() else {
                return;
            };
            self.blocks.remove(&number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_blocks_used_longest_ago_are_dropped_first() {
        let mut memory = Memory {
            capacity: 2,
            ..Memory::default()
        };
        let block = || Arc::new(Block::default());
        memory.keep([(1, block())].into());
        memory.keep([(2, block())].into());
        memory.keep([(1, block())].into());
        memory.keep([(3, block())].into());
        let mut kept: Vec<u64> = memory.get(&[1, 2, 3]).into_keys().collect();
        kept.sort_unstable();
        assert_eq!(kept, [1, 3]);
    }
}
