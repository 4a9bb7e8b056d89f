//! Defaults that follow the data, so that a job without a word on batch, length and epochs learns from sixty chats as from
//! a million.
//!
//! Enters: a job as it was read, and what its data came to. Leaves: the job with every number decided. Pure: the same job
//! and data give the same numbers on every machine, and what the user gave stays as it is. `docs/job.md` tells the rule.

use super::{Schedule, highest_rate, learns, warmup_steps};
use crate::job::{
    Cadence, DEFAULT_BATCH_SIZE, DEFAULT_SEQUENCE_LEN, JobSpec, LeftToData, SaveSteps, Warmup,
};
use crate::text::{count, rate};

/// Least number of steps that blocks and batch are made small for, if need be: enough for a warm-up, a curve and a loss that
/// falls.
const WANTED_STEPS: u64 = 50;
/// Data with fewer examples than this is trained on for more than one epoch by default.
const FEW_EXAMPLES: u64 = 1000;
/// Tokens that give [`WANTED_STEPS`] of the default size; what has more of them is not few examples, but long ones.
const FEW_TOKENS: u64 = WANTED_STEPS * (DEFAULT_BATCH_SIZE * DEFAULT_SEQUENCE_LEN) as u64;
const EPOCHS_OF_FEW: u64 = 3;
/// A default `sequence_len` is a multiple of this: kernels work in tiles.
const BLOCK_MULTIPLE: u64 = 16;
/// Least `sequence_len`: a block of one token has nothing to predict.
const SHORTEST_BLOCK: usize = 2;
/// Learning rate below which updates are lost in rounding: AdamW moves a weight by about the learning rate, and half the last
/// digit of a usual weight (0.02 in float32) is ten times this.
const LEAST_USEFUL_RATE: f64 = 1e-10;
/// The user is warned of a plan with fewer steps than this.
const SHORT_PLAN_STEPS: u64 = 20;

/// Size of the data and the model's limit, which the defaults follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataSize {
    /// Number of tokenised texts, for training and validation.
    pub examples: u64,
    /// Tokens of the longest example.
    pub longest: u64,
    /// Tokens of all examples.
    pub tokens: u64,
    /// Positions that the model was made for. None where its configuration does not say.
    pub model_positions: Option<usize>,
}

impl DataSize {
    /// The longest default `sequence_len`: beyond the model's positions is only what the job asks for by name.
    fn longest_block(self) -> usize {
        let positions = self.model_positions.unwrap_or(DEFAULT_SEQUENCE_LEN);
        positions.clamp(SHORTEST_BLOCK, DEFAULT_SEQUENCE_LEN)
    }

    fn is_small(self) -> bool {
        self.examples < FEW_EXAMPLES && self.tokens < FEW_TOKENS
    }

    /// Default number of epochs.
    fn epochs(self) -> u64 {
        if self.is_small() { EPOCHS_OF_FEW } else { 1 }
    }
}

/// The job with the length of its blocks decided, which has to be known before the data can be packed.
///
/// The default is as long as gives [`WANTED_STEPS`] of the default batch, so that large data has the longest blocks, which
/// cost the least; but no example is cut for it, and it is never above what large data gets, or the model's positions. It does
/// not depend on `num_epochs`, so that a run that is made longer keeps its blocks.
pub fn settle_sequence_len(job: &JobSpec, data: DataSize) -> JobSpec {
    let mut settled = job.clone();
    if !job.reading.left_to_data.sequence_len {
        return settled;
    }
    let enough = match job.sample_packing {
        // Nothing shares a block, so what it has beyond its example is wasted.
        false => 0,
        true => {
            let tokens = data.tokens.saturating_mul(data.epochs());
            tokens.div_ceil(WANTED_STEPS * job.global_batch_size as u64)
        }
    };
    let length = enough.max(data.longest).max(1);
    let length = length
        .checked_next_multiple_of(BLOCK_MULTIPLE)
        .and_then(|length| usize::try_from(length).ok());
    let longest = data.longest_block();
    settled.sequence_len = length.map_or(longest, |length| length.min(longest));
    settled
}

/// The job with everything decided that it left to the data, and what there is to tell of it.
///
/// `job` comes from [`settle_sequence_len`]; `train_blocks` are the blocks that the data was then packed into.
pub fn settle(job: &JobSpec, data: DataSize, train_blocks: u64) -> JobSpec {
    let mut settled = job.clone();
    let left = std::mem::take(&mut settled.reading.left_to_data);
    if left.global_batch_size {
        settled.global_batch_size = batch(job, train_blocks.saturating_mul(data.epochs()));
    }
    if left.num_epochs {
        settled.num_epochs = data.epochs() as f64;
    }
    let total_steps = Schedule::new(&settled, train_blocks).total_steps();
    // A warm-up of one step is a step at a learning rate of 0 and nothing else.
    if left.warmup && warmup_steps(job.warmup, total_steps) < 2 {
        settled.warmup = Warmup::Steps(0);
    }
    let per_epoch = steps_per_epoch(&settled, train_blocks);
    let steps = |cadence| steps_between(cadence, per_epoch, total_steps);
    if let Some(cadence) = left.save {
        settled.save_steps = SaveSteps::Every(steps(cadence));
    }
    if let Some(cadence) = left.eval {
        settled.eval_steps = Some(steps(cadence));
    }
    let told = [
        cadence(&settled, left),
        followed(job, &settled, data, total_steps),
        short(&settled, data, total_steps),
        unfinished_warmup(&settled, total_steps),
        tiny_rate(&settled, total_steps),
    ];
    settled.reading.notices.extend(told.into_iter().flatten());
    settled
}

/// A line that says what times in an epoch and shares of the run came to. None where the job gave steps.
fn cadence(settled: &JobSpec, left: LeftToData) -> Option<String> {
    let mut told = Vec::new();
    if let (Some(_), SaveSteps::Every(steps)) = (left.save, settled.save_steps) {
        told.push(format!(
            "a checkpoint is saved every {}",
            count(steps, "step")
        ));
    }
    if let (Some(_), Some(steps)) = (left.eval, settled.eval_steps) {
        told.push(format!(
            "the held-out data is evaluated every {}",
            count(steps, "step")
        ));
    }
    (!told.is_empty()).then(|| told.join(", and "))
}

/// Steps of one pass over the data.
fn steps_per_epoch(job: &JobSpec, train_blocks: u64) -> u64 {
    train_blocks.div_ceil(job.global_batch_size as u64)
}

/// Steps from one time to the next, rounded up as Transformers does; at least 1.
fn steps_between(cadence: Cadence, per_epoch: u64, total_steps: u64) -> u64 {
    let steps = match cadence {
        Cadence::PerEpoch(times) => per_epoch.div_ceil(times.max(1)),
        Cadence::ShareOfRun(share) => (total_steps as f64 * share).ceil() as u64,
    };
    steps.max(1)
}

/// Blocks in a step: half of the default as often as it takes to come to [`WANTED_STEPS`], in whole slots.
fn batch(job: &JobSpec, blocks: u64) -> usize {
    let micro = job.micro_batch_size;
    let mut slots = job.global_batch_size.div_ceil(micro);
    while slots > 1 && blocks.div_ceil((slots * micro) as u64) < WANTED_STEPS {
        slots /= 2;
    }
    slots * micro
}

/// A line that says which values followed the data. None where all are what large data gets.
fn followed(read: &JobSpec, settled: &JobSpec, data: DataSize, total_steps: u64) -> Option<String> {
    let mut values = Vec::new();
    if read.reading.left_to_data.sequence_len && settled.sequence_len != DEFAULT_SEQUENCE_LEN {
        let is_bounded = data.model_positions == Some(settled.sequence_len);
        let why = if is_bounded {
            " (the model has no more positions)"
        } else {
            ""
        };
        values.push(format!("sequence_len {}{why}", settled.sequence_len));
    }
    if settled.global_batch_size != read.global_batch_size {
        values.push(format!("global_batch_size {}", settled.global_batch_size));
    }
    if settled.num_epochs != read.num_epochs {
        values.push(format!("num_epochs {}", settled.num_epochs));
    }
    if settled.warmup != read.warmup {
        values.push(format!("no warm-up in {}", count(total_steps, "step")));
    }
    (!values.is_empty()).then(|| {
        format!(
            "chosen for {} of at most {}: {}; the job may say otherwise",
            count(data.examples, "example"),
            count(data.longest, "token"),
            values.join(", ")
        )
    })
}

/// A warning where there are so few steps that hardly anything can be learned. Whoever gave `max_steps` knows.
fn short(job: &JobSpec, data: DataSize, total_steps: u64) -> Option<String> {
    if total_steps >= SHORT_PLAN_STEPS || job.max_steps.is_some() {
        return None;
    }
    let steps = count(total_steps, "step");
    let is = if total_steps == 1 { "is" } else { "are" };
    let mut more = vec!["more data", "more num_epochs"];
    if job.global_batch_size > 1 {
        more.push("a smaller global_batch_size");
    }
    if job.sample_packing && job.sequence_len as u64 >= data.longest.saturating_mul(2) {
        more.push("a smaller sequence_len");
    }
    let (last, before) = more.split_last()?;
    let before = before.join(", ");
    Some(format!(
        "{steps} {is} few to learn from: {before} or {last} would make more"
    ))
}

/// A warning where the run ends before its learning rate has risen.
fn unfinished_warmup(job: &JobSpec, total_steps: u64) -> Option<String> {
    let warmup = warmup_steps(job.warmup, total_steps);
    // A run of which nothing is learned does not start, and says why. Some curves come to their peak with the warm-up's last step.
    let is_over = warmup < total_steps
        || !job.lr_scheduler.has_warmup()
        || highest_rate(job, total_steps) >= job.learning_rate * (1.0 - 1e-9);
    if is_over || !learns(job, total_steps) {
        return None;
    }
    Some(format!(
        "the warm-up of {} is not over in the run of {}: the learning rate rises to {} only, not to {}; a smaller warmup_steps, \
         or more steps, would change that",
        count(warmup, "step"),
        count(total_steps, "step"),
        rate(highest_rate(job, total_steps)),
        rate(job.learning_rate)
    ))
}

/// A warning where updates are lost in the rounding of the weights.
fn tiny_rate(job: &JobSpec, total_steps: u64) -> Option<String> {
    let highest = highest_rate(job, total_steps);
    let is_tiny = highest < LEAST_USEFUL_RATE && learns(job, total_steps);
    is_tiny.then(|| {
        format!(
            "the learning rate is {} at most: weights in float32 have 7 digits, so that hardly any would change",
            rate(highest)
        )
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::job::{JobSources, load};
    use crate::plan::learning_rate;

    fn job(fields: &[(&str, &str)]) -> JobSpec {
        let base = [("base_model", "m"), ("dataset", "d.jsonl")];
        let flags = base.iter().chain(fields);
        load(JobSources {
            flags: flags
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
            ..JobSources::default()
        })
        .unwrap()
    }

    /// The job settled for examples of equal length, which share a block only where two fit.
    fn settled(fields: &[(&str, &str)], examples: u64, tokens_each: u64) -> (JobSpec, u64) {
        settled_for(None, fields, examples, tokens_each)
    }

    /// [`settled`], for a model of so many positions.
    fn settled_for(
        model_positions: Option<usize>,
        fields: &[(&str, &str)],
        examples: u64,
        tokens_each: u64,
    ) -> (JobSpec, u64) {
        let data = DataSize {
            examples,
            longest: tokens_each,
            tokens: examples * tokens_each,
            model_positions,
        };
        let job = settle_sequence_len(&job(fields), data);
        let length = job.sequence_len as u64;
        let pieces = examples * tokens_each.div_ceil(length);
        let in_a_block = match job.sample_packing {
            true => (length / tokens_each).max(1),
            false => 1,
        };
        let blocks = pieces.div_ceil(in_a_block);
        let job = settle(&job, data, blocks);
        assert!(!job.reading.left_to_data.anything());
        let steps = Schedule::new(&job, blocks).total_steps();
        assert!(learns(&job, steps), "{examples} x {tokens_each}");
        (job, steps)
    }

    fn numbers((job, steps): &(JobSpec, u64)) -> (usize, usize, f64, u64) {
        let JobSpec {
            sequence_len,
            global_batch_size,
            num_epochs,
            ..
        } = job;
        (*sequence_len, *global_batch_size, *num_epochs, *steps)
    }

    #[test]
    fn a_job_of_defaults_learns_from_data_of_any_size() {
        // sequence_len, global_batch_size, num_epochs, steps
        assert_eq!(numbers(&settled(&[], 1, 30)), (32, 1, 3.0, 3));
        assert_eq!(numbers(&settled(&[], 5, 30)), (32, 1, 3.0, 15));
        assert_eq!(numbers(&settled(&[], 60, 40)), (48, 2, 3.0, 90));
        assert_eq!(numbers(&settled(&[], 356, 40)), (112, 8, 3.0, 69));
        assert_eq!(numbers(&settled(&[], 5000, 60)), (752, 8, 1.0, 53));
        assert_eq!(numbers(&settled(&[], 100_000, 200)), (2048, 8, 1.0, 1250));
        assert_eq!(numbers(&settled(&[], 60, 9000)), (2048, 8, 3.0, 114));
        assert_eq!(numbers(&settled(&[], 1, 1)), (16, 1, 3.0, 3));
    }

    #[test]
    fn few_steps_begin_without_a_warm_up_and_are_told_to_be_few() {
        let (few, steps) = settled(&[], 5, 30);
        assert_eq!(few.warmup, Warmup::Steps(0));
        assert_eq!(learning_rate(&few, 0, steps), few.learning_rate);
        assert_eq!(
            few.reading.notices,
            [
                "chosen for 5 examples of at most 30 tokens: sequence_len 32, global_batch_size 1, num_epochs 3, no warm-up in \
                 15 steps; the job may say otherwise",
                "15 steps are few to learn from: more data or more num_epochs would make more",
            ]
        );
        let (many, _) = settled(&[], 100_000, 200);
        assert_eq!(many.warmup, Warmup::Ratio(0.03));
        assert!(many.reading.notices.is_empty());
        let (asked, _) = settled(&[("max_steps", "4")], 60, 40);
        assert!(
            !asked
                .reading
                .notices
                .iter()
                .any(|notice| notice.contains("few"))
        );
    }

    #[test]
    fn a_curve_of_few_steps_begins_without_the_default_warm_up() {
        for curve in ["rex", "one_cycle", "inverse_sqrt", "warmup_stable_decay"] {
            let (job, _) = settled(&[("lr_scheduler", curve)], 5, 30);
            assert_eq!(job.warmup, Warmup::Steps(0), "{curve}");
        }
        let its_own = [
            ("lr_scheduler", "one_cycle"),
            ("lr_scheduler_kwargs", "{pct_start: 0.3}"),
        ];
        let (job, _) = settled(&its_own, 100_000, 200);
        assert_eq!(job.warmup, Warmup::Steps(0));
    }

    #[test]
    fn what_the_user_gave_stays() {
        let given = [
            ("sequence_len", "2048"),
            ("gradient_accumulation_steps", "8"),
            ("num_epochs", "1"),
            ("warmup_ratio", "0.03"),
        ];
        let read = job(&given);
        let data = DataSize {
            examples: 60,
            longest: 40,
            tokens: 2400,
            model_positions: Some(16),
        };
        let kept = settle(&settle_sequence_len(&read, data), data, 2);
        assert_eq!(kept.digest(), read.digest());
        assert!(!learns(&kept, 1), "Transformers' curve of one step");
        let curve = settled(&[("warmup_steps", "2")], 60, 40).0;
        assert_eq!(curve.warmup, Warmup::Steps(2));
        let (whole_slots, _) = settled(&[("micro_batch_size", "3")], 60, 40);
        assert_eq!(whole_slots.global_batch_size, 3);
    }

    #[test]
    fn a_run_that_is_made_longer_keeps_its_blocks_and_its_batch() {
        let (short, _) = settled(&[], 60, 40);
        for longer in [("num_epochs", "30"), ("max_steps", "7")] {
            let (longer, _) = settled(&[longer], 60, 40);
            assert_eq!(
                (longer.sequence_len, longer.global_batch_size),
                (short.sequence_len, short.global_batch_size)
            );
        }
    }

    #[test]
    fn a_default_length_ends_with_the_model_s_positions() {
        let length = |positions, fields: &[_], examples, tokens_each| {
            let (job, _) = settled_for(positions, fields, examples, tokens_each);
            let told = job.reading.notices.iter();
            let told = told
                .filter(|notice| notice.contains("(the model has no more positions)"))
                .count();
            (job.sequence_len, told)
        };
        assert_eq!(length(Some(1024), &[], 100_000, 200), (1024, 1));
        assert_eq!(
            length(Some(40), &[], 60, 300),
            (40, 1),
            "shorter than an example"
        );
        assert_eq!(length(Some(1024), &[], 60, 40), (48, 0));
        assert_eq!(length(Some(40_960), &[], 100_000, 200), (2048, 0));
        let unpacked = [("sample_packing", "false")];
        assert_eq!(length(Some(100), &unpacked, 60, 300), (100, 1));
        let given = [("sequence_len", "2048")];
        assert_eq!(length(Some(1024), &given, 100_000, 200), (2048, 0));
    }

    #[test]
    fn a_rate_that_never_rises_or_is_lost_in_rounding_is_told() {
        let told = |fields: &[_], word: &str| {
            let (job, _) = settled(fields, 60, 40);
            job.reading
                .notices
                .into_iter()
                .find(|notice| notice.contains(word))
        };
        let steps = |steps| {
            [
                ("warmup_steps", steps),
                ("learning_rate", "2e-4"),
                ("lr_scheduler", "linear"),
            ]
        };
        assert_eq!(
            told(&steps("180"), "warm-up").unwrap(),
            "the warm-up of 180 steps is not over in the run of 90 steps: the learning rate rises to 9.89e-5 only, not to 2e-4; a \
             smaller warmup_steps, or more steps, would change that"
        );
        assert_eq!(told(&steps("89"), "warm-up"), None);
        for whole in [&steps("90")[..], &[("warmup_ratio", "1")]] {
            let told = told(whole, "warm-up").unwrap();
            assert!(
                told.contains("is not over in the run of 90 steps"),
                "{told}"
            );
        }
        for at_its_peak in ["rex", "one_cycle"] {
            let steps = [("warmup_steps", "90"), ("lr_scheduler", at_its_peak)];
            assert_eq!(told(&steps, "warm-up"), None, "{at_its_peak}");
        }
        let tiny = told(&[("learning_rate", "1e-20")], "float32").unwrap();
        assert!(
            tiny.starts_with("the learning rate is 1e-20 at most"),
            "{tiny}"
        );
        assert_eq!(told(&[("learning_rate", "1e-9")], "float32"), None);
    }

    #[test]
    fn unpacked_blocks_are_as_long_as_their_longest_example() {
        let (unpacked, _) = settled(&[("sample_packing", "false")], 100_000, 200);
        assert_eq!(unpacked.sequence_len, 208);
    }

    #[test]
    fn times_in_an_epoch_and_shares_of_the_run_become_steps() {
        // 100 blocks in steps of 8: 13 in an epoch, 39 in all.
        let fields = [
            ("sequence_len", "64"),
            ("sample_packing", "false"),
            ("global_batch_size", "8"),
            ("num_epochs", "3"),
            ("val_set_size", "1"),
        ];
        for (given, expected) in [
            (("saves_per_epoch", "1"), 13),
            (("saves_per_epoch", "4"), 4),
            (("saves_per_epoch", "1000"), 1),
            (("save_steps", "0.1"), 4),
            (("save_steps", "0.5"), 20),
        ] {
            let (job, steps) = settled(&[&fields[..], &[given]].concat(), 100, 64);
            assert_eq!(steps, 39);
            assert_eq!(job.save_steps, SaveSteps::Every(expected), "{given:?}");
        }
        let evaluated = [("evals_per_epoch", "2"), ("max_steps", "20")];
        let (job, _) = settled(&[&fields[..], &evaluated].concat(), 100, 64);
        assert_eq!(
            job.eval_steps,
            Some(7),
            "of an epoch, however few steps are made"
        );
    }
}
