//! The toy's mathematics, and what every run must come to: a chain of hashes over each step's slots, so that a slot that
//! was lost, doubled, taken from another step or computed with other weights changes everything after it.

use std::sync::Arc;

use common::data::block::Block;
use common::job::{ClusterSpec, InitWeights, JobSources, JobSpec, Method, SaveSteps};
use common::plan::{Schedule, eval_slots};
use common::wire::PlanKind;

use crate::dice::Dice;
use crate::mesh::SCALARS;

pub const TOTAL_STEPS: u64 = 7;
pub const SEQUENCE_LEN: usize = 4;
pub const EVAL_BLOCKS: u64 = 2;
/// Not a multiple of the batch, so that the epoch's last step is short.
pub const TRAIN_BLOCKS: u64 = 15;

pub type Weights = [u8; 32];

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

/// What a slot comes to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SlotResult {
    pub sums: [i64; SCALARS],
    pub invalid: u64,
    pub loss_sum: f64,
    pub trained_tokens: u64,
}

/// The toy's forward and backward pass.
pub struct Model {
    schedule: Schedule,
    eval_slots: Vec<Vec<u64>>,
    trained_tokens: Vec<u64>,
    encoded: Vec<Vec<u8>>,
    /// Decides which slots are not finite.
    dice: Option<Dice>,
}

impl Model {
    pub fn new(job: &JobSpec, not_finite: Option<Dice>) -> Arc<Self> {
        let blocks = blocks();
        let encode = |block: &Block| {
            let mut bytes = Vec::new();
            block.encode(&mut bytes);
            bytes
        };
        Arc::new(Self {
            schedule: Schedule::new(job, TRAIN_BLOCKS),
            eval_slots: eval_slots(job, TRAIN_BLOCKS, EVAL_BLOCKS),
            trained_tokens: blocks.iter().map(|b| b.trained_tokens()).collect(),
            encoded: blocks.iter().map(encode).collect(),
            dice: not_finite,
        })
    }

    pub fn initial(&self) -> Weights {
        [0; 32]
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

    /// `data` are the encoded blocks as they were fetched.
    pub fn compute(
        &self,
        weights: &Weights,
        step: u64,
        (kind, slot): (PlanKind, u32),
        data: &[u8],
    ) -> SlotResult {
        let mut hasher = blake3::Hasher::new();
        hasher.update(weights);
        hasher.update(&step.to_le_bytes());
        hasher.update(&slot.to_le_bytes());
        hasher.update(data);
        let mut bytes = [0; 8 * SCALARS];
        hasher.finalize_xof().fill(&mut bytes);
        let mut sums = [0; SCALARS];
        for (sum, bytes) in sums.iter_mut().zip(bytes.chunks_exact(8)) {
            let mut word = [0; 8];
            word.copy_from_slice(bytes);
            *sum = i64::from_le_bytes(word);
        }
        let not_finite = kind == PlanKind::Train
            && self
                .dice
                .is_some_and(|dice| dice.chance(6, &[step, slot.into()]));
        let blocks = self.blocks(kind, step, slot);
        SlotResult {
            loss_sum: match not_finite {
                true => f64::INFINITY,
                false => (sums[0] >> 44) as f64 / 64.0,
            },
            invalid: u64::from(not_finite),
            sums,
            trained_tokens: blocks
                .iter()
                .map(|b| self.trained_tokens[*b as usize])
                .sum(),
        }
    }

    /// The update after `step` earlier ones.
    pub fn apply(&self, weights: &Weights, step: u64, sums: &[i64], invalid: u64) -> Weights {
        if invalid > 0 {
            return *weights;
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(weights);
        hasher.update(&step.to_le_bytes());
        for sum in sums {
            hasher.update(&sum.to_le_bytes());
        }
        *hasher.finalize().as_bytes()
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
                    *sum = sum.wrapping_add(part);
                }
                invalid += result.invalid;
                loss += result.loss_sum;
                tokens += result.trained_tokens;
            }
            weights = self.apply(&weights, step, &sums, invalid);
            let (mut eval_loss, mut eval_tokens) = (0.0, 0);
            for slot in 0..self.eval_slots.len() as u32 {
                let result = self.quiet_slot(&weights, PlanKind::Eval, step + 1, slot);
                eval_loss += result.loss_sum;
                eval_tokens += result.trained_tokens;
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
        let blocks = self.blocks(kind, step, slot);
        let data: Vec<u8> = blocks
            .iter()
            .flat_map(|block| self.encoded[*block as usize].clone())
            .collect();
        self.compute(weights, step, (kind, slot), &data)
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

pub fn hex(weights: &Weights) -> String {
    blake3::Hash::from_bytes(*weights).to_hex().to_string()
}
