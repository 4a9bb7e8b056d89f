//! The work of a run in order, and how much of it each step holds. Pure: the job and the blocks' token counts go in.

use std::sync::Arc;

use common::job::{JobSpec, SaveSteps};
use common::plan::{Schedule, eval_slots, learning_rate};
use common::wire::PlanKind;
use proto::v1;

/// Above this many trainable scalars the digest of the weights costs too much to be taken after every step.
const DIGEST_EVERY_STEP_SCALARS: u64 = 50_000_000;
/// Steps between two digests of the weights of a large model.
const DIGEST_STEPS: u64 = 10;

/// Token counts of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockTokens {
    /// Tokens before the padding.
    pub used: u32,
    /// Tokens that count in the loss.
    pub trained: u32,
}

/// A piece of work that is leased slot by slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// The step after this many updates.
    Train(u64),
    /// The validation set with the weights after this many updates.
    Eval(u64),
    /// Nothing is left but to store the result.
    Store(u64),
}

impl Work {
    /// Updates that a worker must have seen to take part.
    pub fn step(self) -> u64 {
        match self {
            Self::Train(step) | Self::Eval(step) | Self::Store(step) => step,
        }
    }

    /// Whether this is the work of that plan: its kind, and the updates that its weights have seen.
    pub fn is(self, kind: PlanKind, step: u64) -> bool {
        match self {
            Self::Train(own) => kind == PlanKind::Train && own == step,
            Self::Eval(own) => kind == PlanKind::Eval && own == step,
            Self::Store(_) => false,
        }
    }
}

/// The run from the first step to the stored result.
#[derive(Clone, Debug)]
pub struct RunSchedule {
    job: Arc<JobSpec>,
    schedule: Schedule,
    /// Token counts of all blocks, the validation blocks last.
    blocks: Vec<BlockTokens>,
    eval_slots: Vec<Vec<u64>>,
}

impl RunSchedule {
    /// `blocks` holds `train_blocks` blocks for training, then those for evaluation.
    pub fn new(job: Arc<JobSpec>, train_blocks: u64, blocks: Vec<BlockTokens>) -> Self {
        let eval_blocks = blocks.len() as u64 - train_blocks;
        Self {
            schedule: Schedule::new(&job, train_blocks),
            eval_slots: eval_slots(&job, train_blocks, eval_blocks),
            blocks,
            job,
        }
    }

    pub fn job(&self) -> &JobSpec {
        &self.job
    }

    pub fn total_steps(&self) -> u64 {
        self.schedule.total_steps()
    }

    /// Epochs finished after `step` updates.
    pub fn epoch_after(&self, step: u64) -> f64 {
        self.schedule.epoch_after(step)
    }

    /// Learning rate of the update after `step` earlier ones.
    pub fn learning_rate(&self, step: u64) -> f64 {
        learning_rate(&self.job, step, self.total_steps())
    }

    /// What begins when a run starts or resumes after `step` updates.
    pub fn work_from(&self, step: u64, is_evaluated: bool) -> Work {
        if !is_evaluated && self.evaluates_after(step) {
            Work::Eval(step)
        } else {
            self.following(Work::Eval(step))
        }
    }

    /// The work that comes after `work`.
    pub fn following(&self, work: Work) -> Work {
        let step = match work {
            Work::Train(step) if self.evaluates_after(step + 1) => return Work::Eval(step + 1),
            Work::Train(step) => step + 1,
            Work::Eval(step) | Work::Store(step) => step,
        };
        if step < self.total_steps() {
            Work::Train(step)
        } else {
            Work::Store(step)
        }
    }

    /// An evaluation is due after `step` updates.
    pub fn evaluates_after(&self, step: u64) -> bool {
        let due = |every: u64| step.is_multiple_of(every);
        let is_due = match step {
            0 => self.job.eval_on_start,
            step => step == self.total_steps() || self.job.eval_steps.is_some_and(due),
        };
        is_due && !self.eval_slots.is_empty()
    }

    /// A checkpoint is due after `step` updates. The result of the last step is stored anyway.
    pub fn saves_after(&self, step: u64) -> bool {
        let is_due = match self.job.save_steps {
            SaveSteps::Every(steps) => step.is_multiple_of(steps),
            SaveSteps::Auto | SaveSteps::Never => false,
        };
        let is_first = self.job.save_first_step && step == 1;
        step < self.total_steps() && (is_due || is_first)
    }

    /// Whether checkpoints are saved beside those of the best weights.
    pub fn saves_at_all(&self) -> bool {
        self.job.save_steps != SaveSteps::Never
    }

    /// Whether the job leaves it to the run when checkpoints are saved: as often as costs little enough.
    pub fn saves_by_the_clock(&self) -> bool {
        self.job.save_steps == SaveSteps::Auto
    }

    /// Whether the workers report the digest of their weights after `step` updates, for a model of `scalars` trainable scalars.
    pub fn digests_after(&self, step: u64, scalars: u64) -> bool {
        scalars <= DIGEST_EVERY_STEP_SCALARS
            || step.is_multiple_of(DIGEST_STEPS)
            || step == self.total_steps()
            || self.saves_after(step)
            || self.job.best_model.is_some() && self.evaluates_after(step)
    }

    /// Trained tokens of each slot.
    pub fn slots(&self, work: Work) -> Vec<u64> {
        let trained = |slot: &Vec<u64>| {
            slot.iter()
                .map(|&block| u64::from(self.blocks[block as usize].trained))
                .sum()
        };
        match work {
            Work::Train(step) => self.schedule.step_slots(step).iter().map(trained).collect(),
            Work::Eval(_) => self.eval_slots.iter().map(trained).collect(),
            Work::Store(_) => Vec::new(),
        }
    }

    /// The blocks in these slots of a training step.
    pub fn blocks_of(&self, step: u64, slots: &[usize]) -> Vec<u64> {
        let all = self.schedule.step_slots(step);
        let slots = slots.iter().filter_map(|slot| all.get(*slot));
        slots.flatten().copied().collect()
    }

    /// Tokens of a training step, trained or not, without padding.
    pub fn tokens(&self, step: u64) -> u64 {
        let slots = self.schedule.step_slots(step);
        slots
            .iter()
            .flatten()
            .map(|&block| u64::from(self.blocks[block as usize].used))
            .sum()
    }

    /// The plan of `work`, which has these slots. `Store` has none.
    pub fn plan(&self, work: Work, slots: &[u64], scalars: u64) -> Option<v1::Plan> {
        let (kind, step) = match work {
            Work::Train(step) => (PlanKind::Train, step),
            Work::Eval(step) => (PlanKind::Eval, step),
            Work::Store(_) => return None,
        };
        let digest = self.digests_after(step + 1, scalars);
        Some(v1::Plan {
            generation: 0,
            step,
            kind: kind.to_wire(),
            slots: slots.len() as u32,
            // A step whose tokens are all untrained has gradients of zero; any divisor gives their mean.
            trained_tokens: slots.iter().sum::<u64>().max(1),
            learning_rate: self.learning_rate(step),
            digest: kind == PlanKind::Train && digest,
            clear: false,
        })
    }
}
