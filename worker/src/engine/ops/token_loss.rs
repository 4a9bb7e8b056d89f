//! The loss of one token, and the gradient of its logits: the cross-entropy, or one that is made of it. In: a row of logits and
//! the token that is due. A function of these alone, with the same bits on every machine of a class.

use common::job::{Eaft, TokenLoss};

use super::vector;

/// Turns a row of logits into their gradient, and returns the loss and whether the target was the likeliest.
#[inline(always)]
pub(super) fn loss_row(logits: &mut [f32], target: usize, loss: TokenLoss) -> (f64, bool) {
    let max = vector::max(logits);
    let at_target = logits[target];
    let seen = Seen::of(logits, loss);
    let sum = vector::exp_shifted_sum(logits, max);
    vector::scale(logits, 1.0 / sum);
    let log_sum = libm::log(f64::from(sum)) + f64::from(max);
    let cross_entropy = log_sum - f64::from(at_target);
    let loss = match seen {
        Seen::Nothing => {
            logits[target] -= 1.0;
            cross_entropy
        }
        Seen::Weight(weight) => {
            let weight = weight.unwrap_or(logits[target]);
            logits[target] -= 1.0;
            vector::scale(logits, weight);
            cross_entropy * f64::from(weight)
        }
        Seen::Mean { share, mean } => {
            let everywhere = (share / logits.len() as f64) as f32;
            for logit in logits.iter_mut() {
                *logit -= everywhere;
            }
            logits[target] -= (1.0 - share) as f32;
            (1.0 - share) * cross_entropy + share * (log_sum - mean)
        }
    };
    (loss, at_target >= max)
}

/// What a loss takes of the logits before their gradient is in their place.
enum Seen {
    Nothing,
    /// Factor on the cross-entropy. None: the probability of the target.
    Weight(Option<f32>),
    Mean {
        share: f64,
        mean: f64,
    },
}

impl Seen {
    #[inline(always)]
    fn of(logits: &[f32], loss: TokenLoss) -> Self {
        match loss {
            TokenLoss::CrossEntropy => Self::Nothing,
            TokenLoss::Dft => Self::Weight(None),
            TokenLoss::Eaft(eaft) => Self::Weight(Some(entropy_weight(logits, eaft))),
            TokenLoss::Smoothed { share } => Self::Mean {
                share,
                mean: mean(logits),
            },
        }
    }
}

/// The mean, summed in eight interleaved lanes.
fn mean(logits: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut sums = [0.0f64; LANES];
    let (groups, rest) = logits.as_chunks::<LANES>();
    for group in groups {
        for (sum, x) in sums.iter_mut().zip(group) {
            *sum += f64::from(*x);
        }
    }
    let tail: f64 = rest.iter().map(|x| f64::from(*x)).sum();
    (sums.iter().sum::<f64>() + tail) / logits.len() as f64
}

/// The power of the entropy of the likeliest tokens among themselves. Not a number where a logit is none.
///
/// The system's own logarithm may differ by a bit from one machine to another, which a reported loss may and a gradient may not.
fn entropy_weight(logits: &[f32], Eaft { alpha, k, divisor }: Eaft) -> f32 {
    let mut likeliest = logits.to_vec();
    let falling = |a: &f32, b: &f32| b.total_cmp(a);
    if k < likeliest.len() {
        likeliest.select_nth_unstable_by(k - 1, falling);
        likeliest.truncate(k);
    }
    likeliest.sort_unstable_by(falling);
    let max = f64::from(likeliest[0]);
    let (mut sum, mut weighted) = (0.0, 0.0);
    for logit in likeliest {
        let below = f64::from(logit) - max;
        let share = libm::exp(below);
        sum += share;
        // What is infinitely unlikely adds nothing.
        if share > 0.0 || share.is_nan() {
            weighted += share * below;
        }
    }
    let entropy = libm::log(sum) - weighted / sum;
    let entropy = if entropy < 0.0 { 0.0 } else { entropy };
    libm::pow(entropy / divisor, alpha) as f32
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::Value;

    /// Losses and gradients by the code of LLaMA-Factory, Axolotl, TRL and Transformers (`golden/make_losses.py`).
    const GOLDEN: &str = include_str!("golden/losses.json");

    fn numbers(value: &Value) -> Vec<f32> {
        serde_json::from_value(value.clone()).unwrap()
    }

    #[test]
    fn losses_and_gradients_are_their_owners() {
        let golden: Value = serde_json::from_str(GOLDEN).unwrap();
        let width = golden["width"].as_u64().unwrap() as usize;
        let targets: Vec<usize> = serde_json::from_value(golden["targets"].clone()).unwrap();
        let logits = numbers(&golden["logits"]);
        let cases = golden["cases"].as_array().unwrap();
        assert_eq!(cases.len(), 9);
        for case in cases {
            let loss: TokenLoss = serde_json::from_value(case["loss"].clone()).unwrap();
            let mut found = logits.clone();
            let rows = found.chunks_exact_mut(width).zip(&targets);
            let sum: f64 = rows
                .map(|(row, target)| loss_row(row, *target, loss).0)
                .sum();
            let expected = case["sum"].as_f64().unwrap();
            let name = &case["name"];
            assert!(
                (sum / expected - 1.0).abs() < 2e-6,
                "{name}: {sum} {expected}"
            );
            for (found, expected) in found.iter().zip(numbers(&case["gradient"])) {
                assert!(
                    (found - expected).abs() < 1e-6,
                    "{name}: {found} {expected}"
                );
            }
        }
    }

    #[test]
    fn what_is_not_a_number_reaches_loss_and_gradient() {
        let eaft = Eaft {
            alpha: 1.0,
            k: 2,
            divisor: 3.0,
        };
        for loss in [
            TokenLoss::CrossEntropy,
            TokenLoss::Dft,
            TokenLoss::Eaft(eaft),
            TokenLoss::Smoothed { share: 0.1 },
        ] {
            let mut logits = [0.0, f32::NAN, 1.0, 2.0];
            assert!(loss_row(&mut logits, 2, loss).0.is_nan(), "{loss:?}");
            assert!(logits.iter().any(|x| x.is_nan()), "{loss:?}");
        }
    }
}
