//! What a trained token adds to the loss: its cross-entropy, or that with a weight of its own.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Loss of one token, a function of its logits alone; a step's is the mean over its trained tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenLoss {
    #[default]
    CrossEntropy,
    /// Dynamic Fine-Tuning (Wu et al., 2025): weighted by the token's own probability, through which no gradient goes.
    Dft,
    /// Entropy-adaptive: weighted by a power of the entropy of the likeliest tokens, through which no gradient goes.
    Eaft(Eaft),
    /// The cross-entropy with a target that has `share` of its probability spread evenly over all tokens.
    Smoothed { share: f64 },
}

/// The weight `(entropy / divisor) ^ alpha`, where the entropy, in nats, is of the `k` likeliest tokens among themselves.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Eaft {
    pub alpha: f64,
    pub k: usize,
    /// 3 in LLaMA-Factory, 1 in Axolotl.
    pub divisor: f64,
}

/// Most tokens that an entropy is computed of.
pub const MAX_EAFT_K: usize = 1024;

impl TokenLoss {
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// What is wrong with a number of it; goes after the field's name.
    pub fn check(&self) -> Result<(), String> {
        match *self {
            Self::Smoothed { share } if !(share > 0.0 && share < 1.0) => {
                Err(format!("spreads {share} of a target"))
            }
            Self::Eaft(Eaft { alpha, .. }) if !(0.0..=100.0).contains(&alpha) => {
                Err(format!("has an alpha of {alpha}"))
            }
            Self::Eaft(Eaft { k, .. }) if !(1..=MAX_EAFT_K).contains(&k) => {
                Err(format!("has a k of {k}"))
            }
            Self::Eaft(Eaft { divisor, .. }) if !(divisor >= 1.0 && divisor.is_finite()) => {
                Err(format!("has a divisor of {divisor}"))
            }
            _ => Ok(()),
        }
    }
}

/// The loss for people.
impl fmt::Display for TokenLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CrossEntropy => f.write_str("cross-entropy"),
            Self::Dft => f.write_str("dynamic fine-tuning (cross-entropy times probability)"),
            Self::Eaft(_) => f.write_str("entropy-adaptive (cross-entropy times entropy)"),
            Self::Smoothed { share } => write!(f, "cross-entropy, labels smoothed by {share}"),
        }
    }
}
