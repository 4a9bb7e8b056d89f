//! The plan of a run as pure functions: step -> slots -> blocks, and step -> learning rate. Equal inputs give equal
//! plans on every machine.

use crate::job::{JobSpec, LrScheduler, Warmup};
use crate::rng::CounterRng;

/// Which blocks each slot of each step holds. Built from the job and the number of training blocks.
///
/// An epoch is one pass over all training blocks in an order drawn from `(seed, epoch)`. Its last step is short where
/// the batch does not divide the blocks, so nothing is skipped and nothing is trained twice in an epoch.
#[derive(Clone, Debug)]
pub struct Schedule {
    train_blocks: u64,
    global_batch_size: u64,
    micro_batch_size: u64,
    steps_per_epoch: u64,
    total_steps: u64,
    seed: u64,
    shuffle: bool,
}

/// Draw streams of the counter-based generator: one number per purpose.
const STREAM_BLOCK_ORDER: u64 = 1;

impl Schedule {
    /// `train_blocks` is at least 1 (preflight refuses an empty dataset).
    pub fn new(job: &JobSpec, train_blocks: u64) -> Self {
        let global_batch_size = job.global_batch_size as u64;
        let steps_per_epoch = train_blocks.div_ceil(global_batch_size).max(1);
        let by_epochs = (job.num_epochs * steps_per_epoch as f64).ceil() as u64;
        Self {
            train_blocks,
            global_batch_size,
            micro_batch_size: job.micro_batch_size as u64,
            steps_per_epoch,
            total_steps: job.max_steps.unwrap_or(by_epochs).max(1),
            seed: job.seed,
            shuffle: job.shuffle,
        }
    }

    pub fn total_steps(&self) -> u64 {
        self.total_steps
    }

    pub fn steps_per_epoch(&self) -> u64 {
        self.steps_per_epoch
    }

    /// Epochs finished after `step` updates.
    pub fn epoch_after(&self, step: u64) -> f64 {
        step as f64 / self.steps_per_epoch as f64
    }

    /// The blocks of all slots of `step` (0-based), in slot order. The last slot may be short.
    pub fn step_slots(&self, step: u64) -> Vec<Vec<u64>> {
        let epoch = step / self.steps_per_epoch;
        let first = (step % self.steps_per_epoch) * self.global_batch_size;
        let last = (first + self.global_batch_size).min(self.train_blocks);
        let order = self.block_order(epoch);
        order[first as usize..last as usize]
            .chunks(self.micro_batch_size as usize)
            .map(<[u64]>::to_vec)
            .collect()
    }

    fn block_order(&self, epoch: u64) -> Vec<u64> {
        let mut order: Vec<u64> = (0..self.train_blocks).collect();
        if self.shuffle {
            CounterRng::new(self.seed, &[STREAM_BLOCK_ORDER, epoch]).shuffle(&mut order);
        }
        order
    }
}

/// The slots of an evaluation: all validation blocks (numbered after the training blocks), `micro_batch_size` a slot.
pub fn eval_slots(job: &JobSpec, train_blocks: u64, eval_blocks: u64) -> Vec<Vec<u64>> {
    let blocks: Vec<u64> = (train_blocks..train_blocks + eval_blocks).collect();
    blocks
        .chunks(job.micro_batch_size)
        .map(<[u64]>::to_vec)
        .collect()
}

/// The learning rate of the update after `step` earlier ones, as Transformers' schedulers give it
/// (`transformers/optimization.py`): linear warm-up from 0, then the named curve down to 0 at `total_steps`.
pub fn learning_rate(job: &JobSpec, step: u64, total_steps: u64) -> f64 {
    let warmup = match job.warmup {
        Warmup::Steps(steps) => steps,
        Warmup::Ratio(ratio) => (ratio * total_steps as f64).ceil() as u64,
    };
    if job.lr_scheduler == LrScheduler::Constant {
        return job.learning_rate;
    }
    if step < warmup {
        return job.learning_rate * step as f64 / warmup.max(1) as f64;
    }
    let progress = (step - warmup) as f64 / total_steps.saturating_sub(warmup).max(1) as f64;
    let factor = match job.lr_scheduler {
        LrScheduler::Constant | LrScheduler::ConstantWithWarmup => 1.0,
        LrScheduler::Linear => 1.0 - progress,
        LrScheduler::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
    };
    job.learning_rate * factor.max(0.0)
}
