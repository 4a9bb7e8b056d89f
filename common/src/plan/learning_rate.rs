//! The learning rate as a function of the step: those of Transformers (`transformers/optimization.py`), of Axolotl
//! (`axolotl/utils/schedulers.py`) and PyTorch's `OneCycleLR`. In: a job, a step and the number of steps. Out: a number.
//!
//! The operations stand in the order in which those have them, so that the rates are the same in their last digits.

use std::f64::consts::PI;

use crate::job::{Anneal, JobSpec, LrScheduler, OneCycle, Stage, Warmup, WarmupStableDecay};

/// Warm-up that Transformers' `inverse_sqrt` takes its curve from where there is none, in steps.
const TIMESCALE_WITHOUT_WARMUP: f64 = 10_000.0;

/// The learning rate of the update after `step` earlier ones: a warm-up, then the curve that the job names.
pub fn learning_rate(job: &JobSpec, step: u64, total_steps: u64) -> f64 {
    let at = At {
        step: step as f64,
        warmup: warmup_steps(job.warmup, total_steps) as f64,
        total: total_steps as f64,
    };
    let peak = job.learning_rate;
    match warming_up(&job.lr_scheduler, peak, &at) {
        Some(rate) => rate,
        None => peak * factor(&job.lr_scheduler, peak, &at).max(0.0),
    }
}

/// The highest learning rate of all steps: where the curve has its peak, or at the last step if it does not come so far.
pub fn highest_rate(job: &JobSpec, total_steps: u64) -> f64 {
    let last = total_steps.saturating_sub(1);
    let warmup = warmup_steps(job.warmup, total_steps);
    let mut steps = vec![warmup.saturating_sub(1), warmup, last];
    if let LrScheduler::OneCycle(OneCycle {
        pct_start: Some(share),
        ..
    }) = job.lr_scheduler
    {
        let peak = share * total_steps as f64 - 1.0;
        steps.extend([peak.floor() as u64, peak.ceil() as u64]);
    }
    let rates = steps
        .into_iter()
        .map(|step| learning_rate(job, step.min(last), total_steps));
    rates.fold(0.0, f64::max)
}

/// Whether some step has a learning rate that weights can follow: without one they end as they began. Updates are applied in
/// float32, which has no number of full precision below its least one.
pub fn learns(job: &JobSpec, total_steps: u64) -> bool {
    highest_rate(job, total_steps) >= f64::from(f32::MIN_POSITIVE)
}

/// Number of steps over which the learning rate rises.
pub fn warmup_steps(warmup: Warmup, total_steps: u64) -> u64 {
    match warmup {
        Warmup::Steps(steps) => steps,
        Warmup::Ratio(ratio) => (ratio * total_steps as f64).ceil() as u64,
    }
}

/// A step of a run, and what the curve is stretched to. All are numbers of steps.
struct At {
    step: f64,
    warmup: f64,
    total: f64,
}

impl At {
    /// Share of the steps after the warm-up that are done.
    fn progress(&self) -> f64 {
        (self.step - self.warmup) / (self.total - self.warmup).max(1.0)
    }
}

/// The rate in the warm-up. None where the step is none of it, or the curve has its own.
fn warming_up(scheduler: &LrScheduler, peak: f64, at: &At) -> Option<f64> {
    let share = at.step / at.warmup.max(1.0);
    match *scheduler {
        LrScheduler::Constant | LrScheduler::OneCycle(_) => None,
        // It begins a step later than the others, and so not at 0.
        LrScheduler::Rex { .. } => {
            (at.step < at.warmup).then(|| peak * (at.step + 1.0) / at.warmup)
        }
        _ if at.step >= at.warmup => None,
        LrScheduler::CosineAfterQuadraticWarmup => Some(peak * (share * share)),
        LrScheduler::CosineWarmupWithMinLr { warmup_lr_rate, .. } => {
            Some(peak * warmup_from(warmup_lr_rate, at))
        }
        LrScheduler::WarmupStableDecay(stages) => {
            let factor = match stages.warmup_type {
                Stage::Linear => share,
                Stage::Cosine => 0.5 * (1.0 - libm::cos(PI * share)),
                Stage::OneMinusSqrt => 1.0 - (1.0 - share).sqrt(),
            };
            Some(peak * above(stages.min_lr_ratio, factor))
        }
        _ => Some(peak * at.step / at.warmup.max(1.0)),
    }
}

fn warmup_from(first: Option<f64>, at: &At) -> f64 {
    match first {
        None => (at.step + 1.0) / at.warmup.max(1.0),
        Some(first) => first + (1.0 - first) * at.step / (at.warmup - 1.0).max(1.0),
    }
}

/// Share of the peak rate after the warm-up, which may fall below 0 where rounding has it so.
fn factor(scheduler: &LrScheduler, peak: f64, at: &At) -> f64 {
    match *scheduler {
        LrScheduler::Constant | LrScheduler::ConstantWithWarmup => 1.0,
        LrScheduler::Linear => 1.0 - at.progress(),
        LrScheduler::Cosine | LrScheduler::CosineAfterQuadraticWarmup => {
            0.5 * (1.0 + libm::cos(PI * at.progress()))
        }
        LrScheduler::CosineWaves { num_cycles } => waves(num_cycles, at.progress()),
        LrScheduler::CosineThenConstant {
            min_lr_ratio,
            constant_lr_ratio,
        } => cosine_then_constant(min_lr_ratio, constant_lr_ratio, at),
        LrScheduler::CosineWithRestarts { num_cycles } => {
            0.5 * (1.0 + libm::cos(PI * ((num_cycles * at.progress()) % 1.0)))
        }
        LrScheduler::CosineWithMinLr {
            min_lr_rate,
            num_cycles,
        } => above(min_lr_rate, waves(num_cycles, at.progress())),
        LrScheduler::CosineWarmupWithMinLr {
            min_lr_rate,
            num_cycles,
            ..
        } => {
            let progress = (at.step - at.warmup + 1.0) / (at.total - at.warmup).max(1.0);
            above(min_lr_rate, waves(num_cycles, progress))
        }
        LrScheduler::Polynomial { lr_end, power } => {
            let left = 1.0 - at.progress();
            ((peak - lr_end) * libm::pow(left, power) + lr_end) / peak
        }
        LrScheduler::InverseSqrt { timescale } => inverse_sqrt(timescale, at),
        LrScheduler::WarmupStableDecay(stages) => stable_and_decay(&stages, at),
        LrScheduler::OneCycle(cycle) => one_cycle(&cycle, at),
        LrScheduler::Rex { min_lr_ratio } => rex(min_lr_ratio, at),
    }
}

/// `factor` of the way from the lowest rate to the peak.
fn above(lowest: f64, factor: f64) -> f64 {
    factor * (1.0 - lowest) + lowest
}

fn waves(num_cycles: f64, progress: f64) -> f64 {
    0.5 * (1.0 + libm::cos(PI * num_cycles * 2.0 * progress))
}

fn cosine_then_constant(lowest: f64, cosine_share: f64, at: &At) -> f64 {
    let cosine_steps = (at.total * cosine_share).floor();
    let done = at.step.min(cosine_steps) - at.warmup;
    let progress = done / (cosine_steps - at.warmup).max(1.0);
    (1.0 - lowest) * 0.5 * (1.0 + libm::cos(PI * progress)) + lowest
}

fn inverse_sqrt(timescale: Option<u64>, at: &At) -> f64 {
    let timescale = match timescale {
        Some(steps) => steps as f64,
        None if at.warmup > 0.0 => at.warmup,
        None => TIMESCALE_WITHOUT_WARMUP,
    };
    let shift = timescale - at.warmup;
    1.0 / ((at.step + shift) / timescale).sqrt()
}

fn stable_and_decay(stages: &WarmupStableDecay, at: &At) -> f64 {
    let after_warmup = at.total - at.warmup;
    let third = (after_warmup / 3.0).floor();
    let (stable, decay) = match (stages.num_stable_steps, stages.num_decay_steps) {
        (Some(stable), Some(decay)) => (stable as f64, decay as f64),
        // Less than none where the decay is longer than the run: it has begun before its first step.
        (None, Some(decay)) => (after_warmup - decay as f64, decay as f64),
        (stable, None) => (
            stable.map_or(third, |steps| steps as f64),
            after_warmup - third,
        ),
    };
    let in_decay = at.step - at.warmup - stable;
    if in_decay < 0.0 {
        return 1.0;
    }
    if in_decay >= decay {
        return stages.min_lr_ratio;
    }
    let progress = in_decay / decay.max(1.0);
    let factor = match stages.decay_type {
        Stage::Linear => 1.0 - progress,
        Stage::Cosine => waves(stages.num_cycles, progress),
        Stage::OneMinusSqrt => 1.0 - progress.sqrt(),
    };
    above(stages.min_lr_ratio, factor)
}

fn one_cycle(cycle: &OneCycle, at: &At) -> f64 {
    let first = 1.0 / cycle.div_factor;
    let last = first / cycle.final_div_factor;
    let rising = match cycle.pct_start {
        Some(share) => share * at.total,
        None => at.warmup,
    };
    let (up, down) = ((rising - 1.0, 1.0), (at.total - 1.0, last));
    let mirror = (2.0 * rising - 2.0, first);
    let ends = match cycle.three_phase {
        true => vec![up, mirror, down],
        false => vec![up, down],
    };
    let mut from = (0.0, first);
    for (index, to) in ends.iter().enumerate() {
        if at.step <= to.0 || index + 1 == ends.len() {
            return anneal(cycle.anneal_strategy, from, *to, at.step);
        }
        from = *to;
    }
    last
}

/// The value at `step` on the way between two steps with their values. A way of no steps is at its end.
fn anneal(strategy: Anneal, from: (f64, f64), to: (f64, f64), step: f64) -> f64 {
    let steps = to.0 - from.0;
    let progress = match steps > 0.0 {
        true => (step - from.0) / steps,
        false => 1.0,
    };
    match strategy {
        Anneal::Cos => to.1 + (from.1 - to.1) / 2.0 * (1.0 + libm::cos(PI * progress)),
        Anneal::Linear => (to.1 - from.1) * progress + from.1,
    }
}

fn rex(lowest: f64, at: &At) -> f64 {
    let left = at.total - at.warmup;
    let done = at.step + 1.0 - at.warmup;
    if done >= left {
        return lowest;
    }
    let share_left = (left - done) / left;
    lowest + (1.0 - lowest) * (share_left / (0.1 + 0.9 * share_left))
}
