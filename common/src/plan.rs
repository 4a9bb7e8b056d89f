//! The plan of a run as pure functions: step -> slots -> blocks, and step -> learning rate. Equal inputs give equal
//! plans on every machine.

mod best_model;
mod learning_rate;
mod settle;

use std::sync::{Arc, Mutex, PoisonError};

use crate::job::JobSpec;
use crate::rng::CounterRng;

pub use best_model::{Best, BestSoFar};
pub use learning_rate::{highest_rate, learning_rate, learns, warmup_steps};
pub use settle::{DataSize, settle, settle_sequence_len};

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
    /// The order of the epoch asked for last: drawing one for a million blocks takes as long as a small step.
    last_order: Arc<Mutex<Option<EpochOrder>>>,
}

/// An epoch and the order of its blocks.
type EpochOrder = (u64, Arc<[u64]>);

/// Draw streams of the counter-based generator: one number per purpose.
const STREAM_BLOCK_ORDER: u64 = 1;

impl Schedule {
    /// The schedule of a job over `train_blocks` training blocks, at least 1 (preflight refuses an empty dataset).
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
            last_order: Arc::default(),
        }
    }

    /// Number of optimizer steps of the run.
    pub fn total_steps(&self) -> u64 {
        self.total_steps
    }

    /// Number of steps in an epoch; its last one may be short.
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

    fn block_order(&self, epoch: u64) -> Arc<[u64]> {
        let mut last = self
            .last_order
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some((cached, order)) = last.as_ref()
            && *cached == epoch
        {
            return order.clone();
        }
        let mut order: Vec<u64> = (0..self.train_blocks).collect();
        if self.shuffle {
            CounterRng::new(self.seed, &[STREAM_BLOCK_ORDER, epoch]).shuffle(&mut order);
        }
        let order: Arc<[u64]> = order.into();
        *last = Some((epoch, order.clone()));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::*;

    fn job() -> JobSpec {
        JobSpec {
            base_model: "model".into(),
            base_model_id: None,
            asked_revision: None,
            model_revision: None,
            init_weights: InitWeights::Pretrained,
            base_dtype: BaseDtype::Float32,
            pure_bf16: false,
            quantization: None,
            datasets: Vec::new(),
            mixture: Default::default(),
            chat_template: Default::default(),
            chat_template_kwargs: Default::default(),
            default_system_message: None,
            eos_token: None,
            eot_tokens: Vec::new(),
            tokens: Vec::new(),
            added_tokens_overrides: Default::default(),
            val_set_size: ValSetSize::None,
            test_datasets: Vec::new(),
            sequence_len: 8,
            excess_length_strategy: Default::default(),
            sample_packing: true,
            train_on_inputs: false,
            shuffle: true,
            method: Method::Full,
            global_batch_size: 4,
            micro_batch_size: 2,
            num_epochs: 2.0,
            max_steps: None,
            learning_rate: 1.0,
            lr_scheduler: LrScheduler::Cosine,
            warmup: Warmup::Steps(3),
            optimizer: Default::default(),
            unfrozen: Default::default(),
            router_loss: Default::default(),
            lr_groups: Default::default(),
            token_loss: Default::default(),
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: None,
            gradient_checkpointing: Checkpointing::Never,
            seed: 42,
            logging_steps: 1,
            save_steps: SaveSteps::Never,
            save_total_limit: None,
            eval_steps: None,
            eval_on_start: false,
            logging_first_step: false,
            save_first_step: false,
            best_model: None,
            max_skipped_steps: 5,
            output_dir: "out".into(),
            resume: Resume::Auto,
            reduction: Reduction::Exact,
            cluster: ClusterSpec {
                min_workers: 1,
                max_workers: None,
            },
            test_prompts: Vec::new(),
            reading: Reading::default(),
        }
    }

    #[test]
    fn every_epoch_visits_every_block_once_in_its_own_order() {
        let schedule = Schedule::new(&job(), 11);
        assert_eq!((schedule.steps_per_epoch(), schedule.total_steps()), (3, 6));
        let epoch = |e: u64| blocks_of(&schedule, e * 3..e * 3 + 3);
        for e in 0..2 {
            let mut seen = epoch(e);
            seen.sort_unstable();
            assert_eq!(seen, (0..11).collect::<Vec<_>>());
        }
        assert_ne!(epoch(0), epoch(1));
        assert_eq!(epoch(0), blocks_of(&Schedule::new(&job(), 11), 0..3));
    }

    fn blocks_of(schedule: &Schedule, steps: std::ops::Range<u64>) -> Vec<u64> {
        steps
            .flat_map(|step| schedule.step_slots(step).concat())
            .collect()
    }

    #[test]
    fn the_last_step_of_an_epoch_is_short() {
        let slots: Vec<usize> = Schedule::new(&job(), 11)
            .step_slots(2)
            .iter()
            .map(Vec::len)
            .collect();
        assert_eq!(slots, [2, 1]);
    }

    #[test]
    fn the_highest_rate_is_where_the_warm_up_ends() {
        for lr_scheduler in [
            LrScheduler::Cosine,
            LrScheduler::Linear,
            LrScheduler::Constant,
            LrScheduler::ConstantWithWarmup,
        ] {
            for (warmup, total_steps) in [(0, 1), (1, 1), (3, 10), (9, 10), (10, 10), (99, 10)] {
                let job = JobSpec {
                    lr_scheduler,
                    warmup: Warmup::Steps(warmup),
                    ..job()
                };
                let rates = (0..total_steps).map(|step| learning_rate(&job, step, total_steps));
                let highest = rates.fold(0.0, f64::max);
                assert_eq!(highest_rate(&job, total_steps), highest, "{job:?}");
            }
        }
    }

    #[test]
    fn a_rate_that_float32_has_not_learns_nothing() {
        for (learning_rate, expected) in [
            (1e-4, true),
            (1.2e-38, true),
            (1e-38, false),
            (1e-45, false),
            (1e-300, false),
        ] {
            let job = JobSpec {
                learning_rate,
                ..job()
            };
            assert_eq!(learns(&job, 10), expected, "{learning_rate}");
        }
        assert!(!learns(&job(), 1), "the warm-up begins at 0");
        assert!(learns(&job(), 2));
    }

    #[test]
    fn rates_follow_transformers_schedulers() {
        // transformers.get_scheduler with 3 warm-up steps of 10, base rate 1, transformers 5.23.
        let expected = [
            (
                LrScheduler::Cosine,
                [
                    0.0,
                    0.333333333,
                    0.666666667,
                    1.0,
                    0.950484434,
                    0.811744901,
                    0.611260467,
                    0.388739533,
                    0.188255099,
                    0.049515566,
                ],
            ),
            (
                LrScheduler::Linear,
                [
                    0.0,
                    0.333333333,
                    0.666666667,
                    1.0,
                    0.857142857,
                    0.714285714,
                    0.571428571,
                    0.428571429,
                    0.285714286,
                    0.142857143,
                ],
            ),
            (LrScheduler::Constant, [1.0; 10]),
            (
                LrScheduler::ConstantWithWarmup,
                [
                    0.0,
                    0.333333333,
                    0.666666667,
                    1.0,
                    1.0,
                    1.0,
                    1.0,
                    1.0,
                    1.0,
                    1.0,
                ],
            ),
        ];
        for (lr_scheduler, rates) in expected {
            let job = JobSpec {
                lr_scheduler,
                ..job()
            };
            for (step, rate) in rates.into_iter().enumerate() {
                assert!((learning_rate(&job, step as u64, 10) - rate).abs() < 1e-8);
            }
        }
    }
}
