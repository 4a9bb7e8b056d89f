//! The curves of the learning rate, with their settings. What they come to at a step is in `plan/learning_rate.rs`.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::limits::MAX_STEPS;
use crate::text::rate;

/// Curve of the learning rate after the warm-up, under the names of Transformers and Axolotl.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrScheduler {
    /// Half a wave of the cosine, down to 0.
    Cosine,
    Linear,
    Constant,
    ConstantWithWarmup,
    /// Transformers' `cosine` with another number of waves than half of one.
    CosineWaves {
        num_cycles: f64,
    },
    /// Axolotl's `lr_quadratic_warmup`: the cosine after a warm-up that rises as the square.
    CosineAfterQuadraticWarmup,
    /// Axolotl's `cosine_constant_lr_ratio`: the cosine ends at this share of the run, and its lowest rate stays.
    CosineThenConstant {
        min_lr_ratio: f64,
        constant_lr_ratio: f64,
    },
    CosineWithRestarts {
        num_cycles: f64,
    },
    /// Transformers' `cosine_with_min_lr`, and Axolotl's `cosine_min_lr_ratio`, which is the same curve.
    CosineWithMinLr {
        min_lr_rate: f64,
        num_cycles: f64,
    },
    CosineWarmupWithMinLr {
        min_lr_rate: f64,
        num_cycles: f64,
        /// Share of the peak rate that the warm-up begins at. Default: one step of it.
        warmup_lr_rate: Option<f64>,
    },
    Polynomial {
        lr_end: f64,
        power: f64,
    },
    InverseSqrt {
        /// Steps in which the rate falls to the square root of a half. Default: those of the warm-up, or 10,000 without one.
        timescale: Option<u64>,
    },
    WarmupStableDecay(WarmupStableDecay),
    OneCycle(OneCycle),
    /// Reflected exponential (Chen et al., 2021), as in Axolotl.
    Rex {
        min_lr_ratio: f64,
    },
}

/// Three stages: the rate rises, stays and falls.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct WarmupStableDecay {
    /// Default: what the steps of the warm-up and the decay leave; a third of those after the warm-up where neither is given.
    pub num_stable_steps: Option<u64>,
    /// Default: two thirds of the steps after the warm-up, as in LLaMA-Factory.
    pub num_decay_steps: Option<u64>,
    pub warmup_type: Stage,
    pub decay_type: Stage,
    pub min_lr_ratio: f64,
    pub num_cycles: f64,
}

/// How the rate changes in a stage of [`WarmupStableDecay`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    #[serde(rename = "linear")]
    Linear,
    #[serde(rename = "cosine")]
    Cosine,
    #[serde(rename = "1-sqrt")]
    OneMinusSqrt,
}

/// PyTorch's `OneCycleLR`: from a fraction of the peak rate up to it, and down to a smaller fraction (Smith and Topin, 2017).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct OneCycle {
    /// Share of the run that ends at the peak. Default: the warm-up.
    pub pct_start: Option<f64>,
    /// The first rate is the peak through this.
    pub div_factor: f64,
    /// The last rate is the first one through this.
    pub final_div_factor: f64,
    /// Whether the way down is a mirror of the way up, before it goes on to the last rate.
    pub three_phase: bool,
    pub anneal_strategy: Anneal,
}

/// How the rate of [`OneCycle`] goes from one value to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Anneal {
    Cos,
    Linear,
}

/// Values that a setting may have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Range {
    pub wanted: &'static str,
    least: f64,
    most: f64,
    is_whole: bool,
}

impl Range {
    const fn new(wanted: &'static str, least: f64, most: f64) -> Self {
        Self {
            wanted,
            least,
            most,
            is_whole: false,
        }
    }

    pub fn contains(&self, value: f64) -> bool {
        (self.least..=self.most).contains(&value) && (!self.is_whole || value.fract() == 0.0)
    }
}

pub(super) const SHARE: Range = Range::new("a number from 0 to 1", 0.0, 1.0);
pub(super) const RATE: Range = Range::new("a number from 0 to 1000", 0.0, 1e3);
pub(super) const POWER: Range = Range::new("a number from 0 to 1000", 0.0, 1e3);
pub(super) const CYCLES: Range = Range::new("a number from 0 to 1000000", 0.0, 1e6);
pub(super) const DIVISOR: Range = Range::new("a number from 1 to 1e12", 1.0, 1e12);
pub(super) const ANY_DIVISOR: Range = Range::new("a number from 1e-12 to 1e12", 1e-12, 1e12);
pub(super) const STEPS: Range = Range {
    is_whole: true,
    ..Range::new(
        "a whole number of steps, at most 10^9",
        0.0,
        MAX_STEPS as f64,
    )
};
pub(super) const TIMESCALE: Range = Range {
    is_whole: true,
    ..Range::new("a whole number from 1 to 10^9", 1.0, MAX_STEPS as f64)
};

impl LrScheduler {
    /// The value of `lr_scheduler` that asks for this curve.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Cosine
            | Self::CosineWaves { .. }
            | Self::CosineAfterQuadraticWarmup
            | Self::CosineThenConstant { .. } => "cosine",
            Self::Linear => "linear",
            Self::Constant => "constant",
            Self::ConstantWithWarmup => "constant_with_warmup",
            Self::CosineWithRestarts { .. } => "cosine_with_restarts",
            Self::CosineWithMinLr { .. } => "cosine_with_min_lr",
            Self::CosineWarmupWithMinLr { .. } => "cosine_warmup_with_min_lr",
            Self::Polynomial { .. } => "polynomial",
            Self::InverseSqrt { .. } => "inverse_sqrt",
            Self::WarmupStableDecay(_) => "warmup_stable_decay",
            Self::OneCycle(_) => "one_cycle",
            Self::Rex { .. } => "rex",
        }
    }

    /// Whether the warm-up decides anything.
    pub fn has_warmup(&self) -> bool {
        match self {
            Self::Constant => false,
            Self::OneCycle(cycle) => cycle.pct_start.is_none(),
            _ => true,
        }
    }

    /// Whether a longer run with the same steps of warm-up begins with the rates of a shorter one.
    pub fn is_the_same_in_a_longer_run(&self) -> bool {
        match self {
            Self::Constant | Self::ConstantWithWarmup | Self::InverseSqrt { .. } => true,
            Self::WarmupStableDecay(stages) => {
                stages.num_stable_steps.is_some() && stages.num_decay_steps.is_some()
            }
            _ => false,
        }
    }

    /// Checks the settings, with the peak rate that some are relative to.
    ///
    /// # Errors
    /// The setting that is out of its range; the text goes after the name of a field.
    pub fn check(&self, learning_rate: f64) -> Result<(), String> {
        for (name, range, value) in self.numbers() {
            if !range.contains(value) {
                return Err(format!(
                    "has a {name} of {value}: it must be {}",
                    range.wanted
                ));
            }
        }
        match self {
            Self::Polynomial { lr_end, .. } if *lr_end >= learning_rate => Err(format!(
                "has an lr_end of {lr_end}, which must be less than learning_rate ({learning_rate})"
            )),
            Self::OneCycle(cycle) if cycle.div_factor * cycle.final_div_factor < 1.0 => {
                Err(format!(
                    "has a div_factor of {} and a final_div_factor of {}, which end above learning_rate",
                    cycle.div_factor, cycle.final_div_factor
                ))
            }
            _ => Ok(()),
        }
    }

    /// Every number of the settings, with its name and its range.
    fn numbers(&self) -> Vec<(&'static str, Range, f64)> {
        let steps = |name, value: Option<u64>| value.map(|steps| (name, STEPS, steps as f64));
        match *self {
            Self::Cosine
            | Self::Linear
            | Self::Constant
            | Self::ConstantWithWarmup
            | Self::CosineAfterQuadraticWarmup => Vec::new(),
            Self::CosineWaves { num_cycles } | Self::CosineWithRestarts { num_cycles } => {
                vec![("num_cycles", CYCLES, num_cycles)]
            }
            Self::CosineThenConstant {
                min_lr_ratio,
                constant_lr_ratio,
            } => vec![
                ("min_lr_ratio", SHARE, min_lr_ratio),
                ("constant_lr_ratio", SHARE, constant_lr_ratio),
            ],
            Self::CosineWithMinLr {
                min_lr_rate,
                num_cycles,
            } => vec![
                ("min_lr_rate", SHARE, min_lr_rate),
                ("num_cycles", CYCLES, num_cycles),
            ],
            Self::CosineWarmupWithMinLr {
                min_lr_rate,
                num_cycles,
                warmup_lr_rate,
            } => vec![
                ("min_lr_rate", SHARE, min_lr_rate),
                ("num_cycles", CYCLES, num_cycles),
                ("warmup_lr_rate", SHARE, warmup_lr_rate.unwrap_or(0.0)),
            ],
            Self::Polynomial { lr_end, power } => {
                vec![("lr_end", RATE, lr_end), ("power", POWER, power)]
            }
            Self::InverseSqrt { timescale } => timescale
                .map(|steps| ("timescale", TIMESCALE, steps as f64))
                .into_iter()
                .collect(),
            Self::WarmupStableDecay(stages) => [
                steps("num_stable_steps", stages.num_stable_steps),
                steps("num_decay_steps", stages.num_decay_steps),
                Some(("min_lr_ratio", SHARE, stages.min_lr_ratio)),
                Some(("num_cycles", CYCLES, stages.num_cycles)),
            ]
            .into_iter()
            .flatten()
            .collect(),
            Self::OneCycle(cycle) => vec![
                ("pct_start", SHARE, cycle.pct_start.unwrap_or(0.0)),
                ("div_factor", DIVISOR, cycle.div_factor),
                ("final_div_factor", ANY_DIVISOR, cycle.final_div_factor),
            ],
            Self::Rex { min_lr_ratio } => vec![("min_lr_ratio", SHARE, min_lr_ratio)],
        }
    }
}

/// The curve for people, with how low it falls where that is not 0.
impl fmt::Display for LrScheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |share: f64| format!("{}%", (share * 1e5).round() / 1e3);
        let down_to = |share: f64| match share > 0.0 {
            true => format!(" down to {}", percent(share)),
            false => String::new(),
        };
        match self {
            // Its warm-up is told beside it.
            Self::ConstantWithWarmup => f.write_str("constant"),
            Self::CosineWithMinLr { min_lr_rate, .. }
            | Self::CosineWarmupWithMinLr { min_lr_rate, .. } => {
                write!(f, "cosine{}", down_to(*min_lr_rate))
            }
            Self::CosineThenConstant {
                min_lr_ratio,
                constant_lr_ratio,
            } => {
                let there = percent(*constant_lr_ratio);
                write!(
                    f,
                    "cosine{} at {there} of the steps",
                    down_to(*min_lr_ratio)
                )
            }
            Self::CosineAfterQuadraticWarmup => f.write_str("cosine after a quadratic warm-up"),
            Self::WarmupStableDecay(stages) => {
                write!(f, "{}{}", self.name(), down_to(stages.min_lr_ratio))
            }
            Self::Rex { min_lr_ratio } => write!(f, "rex{}", down_to(*min_lr_ratio)),
            Self::Polynomial { lr_end, .. } => write!(f, "polynomial down to {}", rate(*lr_end)),
            scheduler => f.write_str(scheduler.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_is_told_with_how_low_it_falls() {
        let polynomial = LrScheduler::Polynomial {
            lr_end: 1e-7,
            power: 1.0,
        };
        let early = LrScheduler::CosineThenConstant {
            min_lr_ratio: 0.07,
            constant_lr_ratio: 0.8,
        };
        for (scheduler, expected) in [
            (LrScheduler::Cosine, "cosine"),
            (LrScheduler::ConstantWithWarmup, "constant"),
            (LrScheduler::Rex { min_lr_ratio: 0.0 }, "rex"),
            (LrScheduler::Rex { min_lr_ratio: 0.1 }, "rex down to 10%"),
            (polynomial, "polynomial down to 1e-7"),
            (early, "cosine down to 7% at 80% of the steps"),
        ] {
            assert_eq!(scheduler.to_string(), expected);
        }
    }

    #[test]
    fn only_a_curve_that_is_not_stretched_over_the_run_is_the_same_in_a_longer_one() {
        let stages = WarmupStableDecay {
            num_stable_steps: Some(5),
            num_decay_steps: Some(10),
            warmup_type: Stage::Linear,
            decay_type: Stage::Cosine,
            min_lr_ratio: 0.0,
            num_cycles: 0.5,
        };
        let open = WarmupStableDecay {
            num_stable_steps: None,
            ..stages
        };
        for (scheduler, expected) in [
            (LrScheduler::Constant, true),
            (LrScheduler::InverseSqrt { timescale: None }, true),
            (LrScheduler::WarmupStableDecay(stages), true),
            (LrScheduler::WarmupStableDecay(open), false),
            (LrScheduler::Cosine, false),
            (LrScheduler::Rex { min_lr_ratio: 0.0 }, false),
        ] {
            assert_eq!(
                scheduler.is_the_same_in_a_longer_run(),
                expected,
                "{scheduler}"
            );
        }
    }
}
