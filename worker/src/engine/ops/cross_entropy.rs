//! The end of the model in one operation: the final norm, the output layer and the loss,
//! `-log softmax(norm(x) Wᵀ)[target]` or one that is made of it (`token_loss`), summed over the trained tokens only.
//!
//! Goes through the trained rows in chunks, so that neither the logits nor the normed rows of all tokens ever stand in
//! memory; gradients are computed along the way, where the logits are at hand and give them their place.

use common::job::TokenLoss;
use common::memory::processor::chunk_rows;
use common::model::ModelConfig;
use rayon::prelude::*;

use super::element::{Element, round_in_place};
use super::lora_linear::MaskKey;
use super::matrix::View;
use super::output_layer::OutputLayer;
use super::projection::{Context, LowRank};
use super::rms_norm::RmsNorm;
use super::token_loss::loss_row;
use super::token_matrix::Factors;
use super::vector::{self, dispatch};
use crate::engine::buffer::{Buffer, Pool};

/// One trained token: the row that predicts it, and its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Row of the token before the trained one, whose logits predict it.
    pub row: usize,
    /// Id of the trained token.
    pub id: u32,
}

/// Loss and accuracy over all targets.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSum {
    /// Loss summed over the targets, in nats.
    pub loss: f64,
    /// Targets that were the likeliest token.
    pub correct: u64,
}

/// The part of the model behind its last layer.
pub struct LossHead<'a> {
    pub norm: &'a RmsNorm,
    /// The output layer.
    pub head: &'a OutputLayer,
    /// Key of the masks of an adapter's inputs; None where nothing is dropped.
    pub mask: Option<MaskKey>,
    pub pool: &'a Pool,
    pub loss: TokenLoss,
    pub logits: LogitRule,
}

/// What becomes of logits: `cap · tanh(scale · logit / cap)`, or `scale · logit` without a cap.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogitRule {
    pub scale: f32,
    pub cap: Option<f32>,
}

impl LogitRule {
    /// Logits as they come.
    pub const NONE: Self = Self {
        scale: 1.0,
        cap: None,
    };

    /// The rule of a model.
    pub fn of(config: &ModelConfig) -> Self {
        Self {
            scale: config.scales.logits as f32,
            cap: config.caps.logits.map(|cap| cap as f32),
        }
    }

    /// Applies the rule to a row of logits.
    pub fn apply(&self, row: &mut [f32]) {
        dispatch(
            #[inline(always)]
            || {
                if self.scale != 1.0 {
                    vector::scale(row, self.scale);
                }
                if let Some(cap) = self.cap {
                    vector::limit(row, cap);
                }
            },
        );
    }

    /// Turns the gradient of a row into that of the logits before the rule. `limited` is the row as [`apply`](Self::apply) left it,
    /// where there is a cap.
    fn back(&self, gradient: &mut [f32], limited: &[f32]) {
        dispatch(
            #[inline(always)]
            || {
                if let Some(cap) = self.cap {
                    for (g, limited) in gradient.iter_mut().zip(limited) {
                        let t = limited / cap;
                        *g *= 1.0 - t * t;
                    }
                }
                if self.scale != 1.0 {
                    vector::scale(gradient, self.scale);
                }
            },
        );
    }
}

impl LossHead<'_> {
    /// Sums the loss over the targets, whose rows are within `x` `[tokens][width]` and whose ids are within the vocabulary.
    ///
    /// With `dx`, the gradient of `x` is written there, and those of the weights are handed over.
    pub fn loss<E: Element>(
        &self,
        x: &[f32],
        targets: &[Target],
        mut dx: Option<&mut [f32]>,
    ) -> LossSum {
        let (vocabulary, width) = self.head.dims();
        // Evenly: a small last chunk would read the whole output layer for a few rows.
        let rows = targets
            .len()
            .div_ceil(chunk_count(targets.len(), vocabulary).max(1));
        let mut chunk = Chunk {
            width,
            vocabulary,
            x: self.pool.take::<f32>(rows * width),
            normed: self.pool.take::<E>(rows * width),
            logits: self.pool.take::<f32>(rows * vocabulary),
            head: self.head.factors(self.pool),
            low_rank: None,
        };
        if let Some(dx) = &mut dx {
            dx.fill(0.0);
        }
        let mut total = LossSum::default();
        for (part, targets) in targets.chunks(rows.max(1)).enumerate() {
            let context = Context {
                tokens: targets.len(),
                mask: self.mask.map(|mask| mask.of_part(part)),
                pool: self.pool,
            };
            let sum = self.forward(x, targets, &mut chunk, context);
            total.loss += sum.loss;
            total.correct += sum.correct;
            if let Some(dx) = &mut dx {
                self.backward(targets, &mut chunk, dx, context);
            }
        }
        total
    }

    /// Computes the losses of a chunk; leaves the logits' gradients in place of the logits.
    fn forward<E: Element>(
        &self,
        x: &[f32],
        targets: &[Target],
        chunk: &mut Chunk<E>,
        context: Context,
    ) -> LossSum {
        let (rows, width, vocabulary) = (targets.len(), chunk.width, chunk.vocabulary);
        for (row, target) in chunk.x.chunks_exact_mut(width).zip(targets) {
            row.copy_from_slice(&x[target.row * width..(target.row + 1) * width]);
        }
        let normed = &mut chunk.normed[..rows * width];
        self.norm.forward(&chunk.x[..rows * width], normed);
        let normed = View::new(&normed[..], rows, width);
        let logits = &mut chunk.logits[..rows * vocabulary];
        let head = chunk.head.as_ref();
        chunk.low_rank = self.head.multiply(head, normed, logits, context);
        let losses: Vec<(f64, bool)> = chunk.logits[..rows * vocabulary]
            .par_chunks_mut(vocabulary)
            .zip(targets)
            .map_init(Vec::new, |limited: &mut Vec<f32>, (logits, target)| {
                self.logits.apply(logits);
                limited.clear();
                if self.logits.cap.is_some() {
                    limited.extend_from_slice(logits);
                }
                let loss = dispatch(
                    #[inline(always)]
                    || loss_row(logits, target.id as usize, self.loss),
                );
                self.logits.back(logits, limited);
                round_in_place::<E>(logits);
                loss
            })
            .collect();
        let mut sum = LossSum::default();
        for (loss, correct) in losses {
            sum.loss += loss;
            sum.correct += u64::from(correct);
        }
        sum
    }

    fn backward<E: Element>(
        &self,
        targets: &[Target],
        chunk: &mut Chunk<E>,
        dx: &mut [f32],
        context: Context,
    ) {
        let (rows, width, vocabulary) = (targets.len(), chunk.width, chunk.vocabulary);
        let mut d_normed = self.pool.take::<f32>(rows * width);
        let normed = View::new(&chunk.normed[..rows * width], rows, width);
        let d_logits = &mut chunk.logits[..rows * vocabulary];
        let kept = (chunk.head.as_ref(), &chunk.low_rank);
        self.head
            .backward(kept, normed, d_logits, &mut d_normed, context);
        let mut d_rows = self.pool.zeroed::<f32>(rows * width);
        self.norm
            .backward(&chunk.x[..rows * width], &d_normed, &mut d_rows);
        // A row predicts one token, so no two targets share one; adding is right even so.
        for (target, row) in targets.iter().zip(d_rows.chunks_exact(width)) {
            let out = &mut dx[target.row * width..(target.row + 1) * width];
            dispatch(
                #[inline(always)]
                || vector::add_scaled(out, row, 1.0),
            );
        }
    }
}

/// Memory for the trained rows that are computed together.
struct Chunk<E> {
    width: usize,
    vocabulary: usize,
    x: Buffer<f32>,
    normed: Buffer<E>,
    logits: Buffer<f32>,
    /// The output layer as products take it, where it is a matrix.
    head: Option<Factors<E>>,
    /// What its adapter made of the rows, where it has one.
    low_rank: LowRank<E>,
}

/// Number of chunks: how often the output layer gets a gradient.
pub fn chunk_count(targets: usize, vocabulary: usize) -> usize {
    targets.div_ceil(chunk_rows(vocabulary))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::ops::token_matrix::TokenMatrix;
    use crate::engine::params::Weight;
    use crate::engine::testing::{TestWeights, check_op, flat, random_tensor, random_values};
    use candle_core::{D, Device, Result, Tensor};
    use half::bf16;

    const EPSILON: f32 = 1e-5;

    fn reference(x: &Tensor, norm: &Tensor, head: &Tensor, targets: &[Target]) -> Result<Tensor> {
        let mean = x.sqr()?.mean_keepdim(1)?;
        let normed = x
            .broadcast_div(&(mean + f64::from(EPSILON))?.sqrt()?)?
            .broadcast_mul(norm)?;
        let logits = normed.matmul(&head.t()?)?;
        let log_sum = logits.exp()?.sum_keepdim(D::Minus1)?.log()?;
        let log_p = logits.broadcast_sub(&log_sum)?.flatten_all()?;
        let vocabulary = head.dim(0)?;
        let index: Vec<u32> = targets
            .iter()
            .map(|target| (target.row * vocabulary) as u32 + target.id)
            .collect();
        log_p
            .index_select(&Tensor::new(index, &Device::Cpu)?, 0)?
            .sum_all()?
            .neg()
    }

    fn targets(tokens: usize, vocabulary: usize) -> Vec<Target> {
        let target = |row| Target {
            row,
            id: (row * 7 % vocabulary) as u32,
        };
        (0..tokens).filter(|row| row % 3 != 1).map(target).collect()
    }

    fn run(norm: Weight, head: &Weight, x: &[f32], targets: &[Target]) -> (LossSum, Vec<f32>) {
        run_with(TokenLoss::CrossEntropy, norm, head, x, targets)
    }

    fn run_with(
        loss: TokenLoss,
        norm: Weight,
        head: &Weight,
        x: &[f32],
        targets: &[Target],
    ) -> (LossSum, Vec<f32>) {
        let norm = RmsNorm {
            weight: norm,
            epsilon: EPSILON,
            offset: false,
        };
        let pool = Pool::default();
        let layer = OutputLayer::from(TokenMatrix::from(head.clone()));
        let head_is_bf16 = head.is_bf16();
        let head = LossHead {
            norm: &norm,
            head: &layer,
            mask: None,
            pool: &pool,
            loss,
            logits: LogitRule::NONE,
        };
        let mut dx = vec![f32::NAN; x.len()];
        let sum = match head_is_bf16 {
            true => head.loss::<bf16>(x, targets, Some(&mut dx)),
            false => head.loss::<f32>(x, targets, Some(&mut dx)),
        };
        (sum, dx)
    }

    #[test]
    fn values_and_gradients_equal_the_reference() {
        // The second has more targets than a chunk has rows.
        for (tokens, vocabulary) in [(10, 31), (900, 17)] {
            let weights = TestWeights::new(&[("head", &[vocabulary, 12]), ("norm", &[12])]);
            let targets = targets(tokens, vocabulary);
            let plain = |x: &Tensor| {
                let (norm, head) = (weights.variable("norm"), weights.variable("head"));
                reference(x, &norm, &head, &targets)
            };
            let x = random_tensor(tokens, 12, 1);
            let trainable = |x: &[f32], _: &[f32]| {
                let (norm, head) = (weights.trainable("norm"), weights.trainable("head"));
                let (sum, dx) = run(norm, &head, x, &targets);
                (vec![sum.loss as f32], dx)
            };
            check_op(&x, &weights, &[], &trainable, &plain);
            let frozen = |x: &[f32], _: &[f32]| {
                let (norm, head) = (weights.frozen("norm"), weights.frozen("head"));
                let (sum, dx) = run(norm, &head, x, &targets);
                (vec![sum.loss as f32], dx)
            };
            check_op(&x, &weights, &["head", "norm"], &frozen, &plain);
        }
    }

    #[test]
    fn a_bfloat16_output_layer_is_close_to_the_float32_one() {
        let (tokens, vocabulary) = (40, 50);
        let weights = TestWeights::new(&[("head", &[vocabulary, 12]), ("norm", &[12])]);
        let (x, targets) = (random_values(tokens * 12, 1), targets(tokens, vocabulary));
        let norm = || weights.frozen("norm");
        let (wide, wide_dx) = run(norm(), &weights.frozen("head"), &x, &targets);
        let (narrow, narrow_dx) = run(norm(), &weights.frozen_bf16("head"), &x, &targets);
        assert!((wide.loss - narrow.loss).abs() < 0.01 * wide.loss);
        let largest = wide_dx.iter().fold(0.0f32, |m, d| m.max(d.abs()));
        for (wide, narrow) in wide_dx.iter().zip(&narrow_dx) {
            assert!((wide - narrow).abs() < 0.03 * largest, "{wide} {narrow}");
        }
    }

    #[test]
    fn correct_tokens_are_those_with_the_largest_logit() {
        let weights = TestWeights::new(&[("head", &[2, 2]), ("norm", &[2])]);
        let head = weights.variable("head");
        let x = [2.0f32, 1.0, 2.0, 1.0, 0.0, 5.0];
        let tensor = Tensor::from_slice(&x, (3, 2), &Device::Cpu).unwrap();
        let targets = [(0, 0), (1, 1), (2, 1)].map(|(row, id)| Target { row, id });
        let expected = reference(&tensor, &weights.variable("norm"), &head, &targets).unwrap();
        let (sum, _) = run(
            weights.frozen("norm"),
            &weights.frozen("head"),
            &x,
            &targets,
        );
        assert!((sum.loss - f64::from(flat(&expected)[0])).abs() < 1e-5);
        // Rows 0 and 1 are equal and have different targets, so exactly one of them is right.
        let (one, _) = run(
            weights.frozen("norm"),
            &weights.frozen("head"),
            &x,
            &targets[..2],
        );
        assert_eq!(one.correct, 1);
    }

    #[test]
    fn not_a_number_reaches_the_loss() {
        let weights = TestWeights::new(&[("head", &[5, 2]), ("norm", &[2])]);
        let targets = [Target { row: 0, id: 1 }];
        let head = weights.frozen("head");
        let (sum, _) = run(weights.frozen("norm"), &head, &[f32::NAN, 1.0], &targets);
        assert!(sum.loss.is_nan());
    }
}
