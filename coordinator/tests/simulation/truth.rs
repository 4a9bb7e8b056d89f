//! The toy's mathematics, and what every run must come to: a chain of hashes over each step's slots, so that a slot that
//! was lost, doubled, taken from another step or computed with other weights changes everything after it.

use std::sync::Arc;

use common::data::block::Block;
use common::files::layout::{Layout, weights_digest};
use common::job::{ClusterSpec, InitWeights, JobSources, JobSpec, Method, SaveSteps};
use common::plan::{Schedule, eval_slots};
use common::wire::PlanKind;
use worker::engine::slot::SlotOutcome;

use crate::dice::Dice;
use crate::mesh::SCALARS;

pub const TOTAL_STEPS: u64 = 7;
pub const SEQUENCE_LEN: usize = 4;
pub const EVAL_BLOCKS: u64 = 2;
/// Not a multiple of the batch, so that the epoch's last step is short.
pub const TRAIN_BLOCKS: u64 = 15;

/// Eight float32 scalars, little endian.
pub type Weights = [u8; 4 * SCALARS];

pub fn job(min_workers: usize, max_workers: Option<usize>) -> JobSpec {
    let flag = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
    let flags = [
        ("base_model", "model"),
        ("datasets.0.path", "data.jsonl"),
        ("output_dir", "out"),
    ];
    let job = common::job::load(JobSources {
        flags: flags.map(flag).to_vec(),
        ..JobSources::default()
    });
    JobSpec {
        init_weights: InitWeights::Random,
        sequence_len: SEQUENCE_LEN,
        shuffle: true,
        method: Method::Full,
        global_batch_size: 6,
        micro_batch_size: 1,
        max_steps: Some(TOTAL_STEPS),
        seed: 42,
        save_steps: SaveSteps::Every(2),
        save_total_limit: Some(2),
        eval_steps: Some(3),
        max_skipped_steps: TOTAL_STEPS,
        cluster: ClusterSpec {
            min_workers,
            max_workers,
        },
        ..job.unwrap_or_else(|errors| panic!("{errors}"))
    }
}

/// The dataset: no two blocks are equal.
pub fn blocks() -> Vec<Block> {
    let block = |number: u64| Block {
        tokens: vec![number as u32 + 1, 7, 8, 0],
        segments: vec![1, 1, 1, 0],
        trained: vec![false, true, number.is_multiple_of(3), false],
    };
    (0..TRAIN_BLOCKS + EVAL_BLOCKS).map(block).collect()
}

/// What a slot comes to. Sums of a step's slots are whole numbers that float32 holds exactly.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SlotResult {
    pub sums: [i64; SCALARS],
    pub outcome: SlotOutcome,
}

/// The toy's forward and backward pass.
pub struct Model {
    schedule: Schedule,
    eval_slots: Vec<Vec<u64>>,
    data: Vec<Block>,
    /// Decides which slots are not finite.
    dice: Option<Dice>,
}

impl Model {
    pub fn new(job: &JobSpec, not_finite: Option<Dice>) -> Arc<Self> {
        Arc::new(Self {
            schedule: Schedule::new(job, TRAIN_BLOCKS),
            eval_slots: eval_slots(job, TRAIN_BLOCKS, EVAL_BLOCKS),
            data: blocks(),
            dice: not_finite,
        })
    }

    pub fn initial(&self) -> Weights {
        [0; 4 * SCALARS]
    }

    /// The blocks of a slot.
    pub fn blocks(&self, kind: PlanKind, step: u64, slot: u32) -> Vec<u64> {
        let slots = match kind {
            PlanKind::Train => self.schedule.step_slots(step),
            PlanKind::Eval => self.eval_slots.clone(),
        };
        slots.get(slot as usize).cloned().unwrap_or_default()
    }

    pub fn slots(&self, step: u64) -> u32 {
        self.schedule.step_slots(step).len() as u32
    }

    /// `blocks` are those that were fetched for the slot.
    pub fn compute(
        &self,
        weights: &Weights,
        step: u64,
        (kind, slot): (PlanKind, u32),
        blocks: &[Block],
    ) -> SlotResult {
        let mut hasher = blake3::Hasher::new();
        hasher.update(weights);
        hasher.update(&step.to_le_bytes());
        hasher.update(&slot.to_le_bytes());
        let mut data = Vec::new();
        for block in blocks {
            block.encode(&mut data);
        }
        hasher.update(&data);
        let mut bytes = [0; 8 * SCALARS];
        hasher.finalize_xof().fill(&mut bytes);
        let mut sums = [0; SCALARS];
        for (sum, bytes) in sums.iter_mut().zip(bytes.chunks_exact(8)) {
            let mut word = [0; 8];
            word.copy_from_slice(bytes);
            *sum = i64::from_le_bytes(word) >> 44;
        }
        let not_finite = kind == PlanKind::Train
            && self
                .dice
                .is_some_and(|dice| dice.chance(6, &[step, slot.into()]));
        let outcome = SlotOutcome {
            loss_sum: match not_finite {
                true => f64::INFINITY,
                false => sums[0] as f64 / 64.0,
            },
            trained_tokens: blocks.iter().map(Block::trained_tokens).sum(),
            correct_tokens: 0,
            invalid_scalars: u64::from(not_finite),
        };
        SlotResult { sums, outcome }
    }

    /// The update after `step` earlier ones.
    pub fn apply(&self, weights: &Weights, step: u64, mean: &[f32], invalid: u64) -> Weights {
        if invalid > 0 {
            return *weights;
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(weights);
        hasher.update(&step.to_le_bytes());
        for mean in mean {
            hasher.update(&mean.to_le_bytes());
        }
        let mut weights = *hasher.finalize().as_bytes();
        for scalar in weights.chunks_exact_mut(4) {
            // So that it is a finite float32.
            scalar[3] &= !0x40;
        }
        weights
    }

    /// What one worker that nothing ever happens to comes to.
    pub fn quiet_run(&self) -> Vec<Expected> {
        let mut weights = self.initial();
        let mut steps = Vec::new();
        for step in 0..TOTAL_STEPS {
            let (mut sums, mut invalid) = ([0i64; SCALARS], 0);
            let (mut loss, mut tokens) = (0.0, 0);
            for slot in 0..self.slots(step) {
                let result = self.quiet_slot(&weights, PlanKind::Train, step, slot);
                for (sum, part) in sums.iter_mut().zip(result.sums) {
                    *sum += part;
                }
                invalid += result.outcome.invalid_scalars;
                loss += result.outcome.loss_sum;
                tokens += result.outcome.trained_tokens;
            }
            let mean = sums.map(|sum| sum as f32);
            weights = self.apply(&weights, step, &mean, invalid);
            let (mut eval_loss, mut eval_tokens) = (0.0, 0);
            for slot in 0..self.eval_slots.len() as u32 {
                let result = self.quiet_slot(&weights, PlanKind::Eval, step + 1, slot);
                eval_loss += result.outcome.loss_sum;
                eval_tokens += result.outcome.trained_tokens;
            }
            steps.push(Expected {
                weights,
                loss: loss / tokens as f64,
                eval_loss: eval_loss / eval_tokens as f64,
                skipped: invalid > 0,
            });
        }
        steps
    }

    fn quiet_slot(&self, weights: &Weights, kind: PlanKind, step: u64, slot: u32) -> SlotResult {
        let numbers = self.blocks(kind, step, slot).into_iter();
        let blocks: Vec<Block> = numbers.map(|n| self.data[n as usize].clone()).collect();
        let slot = match kind {
            PlanKind::Train => slot,
            // An evaluation is of its blocks alone.
            PlanKind::Eval => 0,
        };
        self.compute(weights, step, (kind, slot), &blocks)
    }
}

/// After one step of the quiet run.
#[derive(Clone, Debug)]
pub struct Expected {
    pub weights: Weights,
    pub loss: f64,
    /// Where the step is evaluated.
    pub eval_loss: f64,
    pub skipped: bool,
}

pub fn layout() -> Arc<Layout> {
    Arc::new(Layout::new([("toy".to_owned(), vec![SCALARS])]))
}

pub fn scalars(weights: &Weights) -> Vec<f32> {
    let scalars = weights.chunks_exact(4);
    scalars
        .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
        .collect()
}

pub fn weights(scalars: &[f32]) -> Weights {
    let mut weights = [0; 4 * SCALARS];
    for (bytes, scalar) in weights.chunks_exact_mut(4).zip(scalars) {
        bytes.copy_from_slice(&scalar.to_le_bytes());
    }
    weights
}

/// As real workers compute it.
pub fn digest(weights: &Weights) -> String {
    let layout = layout();
    weights_digest(&layout, layout.split(&scalars(weights)))
}
