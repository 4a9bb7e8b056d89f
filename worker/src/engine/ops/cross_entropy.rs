//! The output layer and the loss in one: `-log softmax(hidden Wᵀ)[target]`, summed over the trained tokens only.
//!
//! Goes through the rows in chunks, so that the logits of all tokens never stand in memory; the gradients are computed
//! along the way, where the logits are at hand, and kept for the backward pass.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::gemm::{
    Matrix, MatrixMut, all_threads, multiply, multiply_by_transposed_weight, multiply_by_weight,
};
use super::vector::{self, dispatch};
use super::{f32_slice, to_tensor, with_f32};
use crate::engine::params::Weight;

/// Logits that stand in memory at a time.
const CHUNK_SCALARS: usize = 32 << 20;
/// A chunk has at most this many rows, and at least [`MIN_CHUNK_ROWS`].
const MAX_CHUNK_ROWS: usize = 512;
const MIN_CHUNK_ROWS: usize = 16;

/// One trained token: the row that predicts it, and its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    pub row: usize,
    pub id: u32,
}

/// Loss and accuracy over all targets.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSum {
    pub loss: f64,
    pub correct: u64,
}

/// `hidden` is `[tokens, width]` (after the final norm), `head` is `[vocabulary, width]`. Returns the summed loss as a
/// scalar on the graph and in float64. With `gradients`, those of `head` are handed over at once.
pub fn cross_entropy(
    hidden: &Tensor,
    head: &Weight,
    targets: Arc<Vec<Target>>,
    gradients: bool,
) -> Result<(Tensor, LossSum)> {
    let sum = Arc::new(Mutex::new(LossSum::default()));
    let loss = hidden.apply_op1(CrossEntropy {
        head: head.clone(),
        targets,
        gradients,
        sum: sum.clone(),
        d_hidden: Mutex::new(None),
    })?;
    let sum = *sum.lock().unwrap_or_else(PoisonError::into_inner);
    Ok((loss, sum))
}

struct CrossEntropy {
    head: Weight,
    targets: Arc<Vec<Target>>,
    gradients: bool,
    sum: Arc<Mutex<LossSum>>,
    /// Gradient rows of the targets, in order.
    d_hidden: Mutex<Option<Vec<f32>>>,
}

/// Turns a row of logits into their gradient (softmax minus one at the target) and returns its loss and whether the
/// target was the likeliest.
#[inline(always)]
fn loss_row(logits: &mut [f32], target: usize) -> (f64, bool) {
    let max = vector::max(logits);
    let at_target = logits[target];
    let sum = vector::exp_shifted_sum(logits, max);
    vector::scale(logits, 1.0 / sum);
    logits[target] -= 1.0;
    let loss = f64::from(sum).ln() + f64::from(max) - f64::from(at_target);
    (loss, at_target >= max)
}

impl CrossEntropy {
    fn chunk_rows(vocabulary: usize) -> usize {
        (CHUNK_SCALARS / vocabulary).clamp(MIN_CHUNK_ROWS, MAX_CHUNK_ROWS)
    }

    /// Losses of a chunk whose rows were gathered into `hidden`; leaves the logits' gradients in `logits`.
    fn chunk(
        &self,
        hidden: Matrix,
        targets: &[Target],
        vocabulary: usize,
        logits: &mut [f32],
    ) -> Result<LossSum> {
        self.head.with(|head| {
            let mut y = MatrixMut::new(logits, targets.len(), vocabulary);
            multiply_by_transposed_weight(&mut y, false, hidden, head);
            Ok(())
        })?;
        let rows: Vec<(f64, bool)> = logits
            .par_chunks_mut(vocabulary)
            .zip(targets.par_iter())
            .map(|(logits, target)| {
                dispatch(
                    #[inline(always)]
                    || loss_row(logits, target.id as usize),
                )
            })
            .collect();
        let mut sum = LossSum::default();
        for (loss, correct) in rows {
            sum.loss += loss;
            sum.correct += u64::from(correct);
        }
        Ok(sum)
    }

    fn add_head_gradient(&self, hidden: Matrix, d_logits: Matrix) -> Result<()> {
        let (vocabulary, width) = self.head.matrix_dims()?;
        self.head.add_gradient(|gradient, accumulate| {
            multiply(
                &mut MatrixMut::new(gradient, vocabulary, width),
                accumulate,
                1.0,
                d_logits.transposed(),
                hidden,
                all_threads(),
            );
            Ok(())
        })
    }
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (tokens, width) = layout.shape().dims2()?;
        let (vocabulary, head_width) = self.head.matrix_dims()?;
        let hidden = f32_slice(storage, layout)?;
        let fits = |target: &Target| target.row < tokens && (target.id as usize) < vocabulary;
        if head_width != width || !self.targets.iter().all(fits) {
            candle_core::bail!("targets or an output layer of another shape");
        }
        let chunk_rows = Self::chunk_rows(vocabulary);
        let mut d_hidden = vec![
            0.0;
            if self.gradients {
                self.targets.len() * width
            } else {
                0
            }
        ];
        let mut gathered = vec![0.0; chunk_rows.min(self.targets.len()) * width];
        let mut logits = vec![0.0; chunk_rows.min(self.targets.len()) * vocabulary];
        let mut total = LossSum::default();
        for (index, targets) in self.targets.chunks(chunk_rows).enumerate() {
            let gathered = &mut gathered[..targets.len() * width];
            for (out, target) in gathered.chunks_exact_mut(width).zip(targets) {
                out.copy_from_slice(&hidden[target.row * width..(target.row + 1) * width]);
            }
            let rows = Matrix::new(gathered, targets.len(), width);
            let logits = &mut logits[..targets.len() * vocabulary];
            let sum = self.chunk(rows, targets, vocabulary, logits)?;
            total.loss += sum.loss;
            total.correct += sum.correct;
            if self.gradients {
                let d_logits = Matrix::new(logits, targets.len(), vocabulary);
                let start = index * chunk_rows * width;
                let part = &mut d_hidden[start..start + targets.len() * width];
                let mut part = MatrixMut::new(part, targets.len(), width);
                self.head.with(|head| {
                    multiply_by_weight(&mut part, false, d_logits, head);
                    Ok(())
                })?;
                self.add_head_gradient(rows, d_logits)?;
            }
        }
        *self.sum.lock().unwrap_or_else(PoisonError::into_inner) = total;
        if self.gradients {
            *self.d_hidden.lock().unwrap_or_else(PoisonError::into_inner) = Some(d_hidden);
        }
        Ok((CpuStorage::F32(vec![total.loss as f32]), Shape::from(())))
    }

    fn bwd(&self, arg: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (tokens, width) = arg.dims2()?;
        let kept = self
            .d_hidden
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(kept) = kept else {
            candle_core::bail!("the loss was computed without gradients, or walked back twice");
        };
        if with_f32(grad, |grad| Ok(grad[0]))? != 1.0 {
            candle_core::bail!("the summed loss must be the end of the graph");
        }
        let mut d_hidden = vec![0.0; tokens * width];
        // A row predicts one token, so no two targets share one; adding is right even so.
        for (target, row) in self.targets.iter().zip(kept.chunks_exact(width)) {
            let out = &mut d_hidden[target.row * width..(target.row + 1) * width];
            dispatch(
                #[inline(always)]
                || vector::add_scaled(out, row, 1.0),
            );
        }
        Ok(Some(to_tensor(d_hidden, tokens, width)?))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::testing::{TestWeights, check_op, random_tensor};
    use candle_core::{D, Device};

    fn reference(hidden: &Tensor, head: &Tensor, targets: &[Target]) -> Result<Tensor> {
        let logits = hidden.matmul(&head.t()?)?;
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

    fn targets(tokens: usize, vocabulary: usize) -> Arc<Vec<Target>> {
        let target = |row| Target {
            row,
            id: (row * 7 % vocabulary) as u32,
        };
        Arc::new((0..tokens).filter(|row| row % 3 != 1).map(target).collect())
    }

    #[test]
    fn values_and_gradients_equal_the_reference() {
        // The second has more targets than a chunk has rows.
        for (tokens, vocabulary) in [(10, 31), (900, 17)] {
            let weights = TestWeights::new(&[("head", &[vocabulary, 12])]);
            let targets = targets(tokens, vocabulary);
            let plain = |x: &Tensor| reference(x, &weights.variable("head"), &targets);
            let run =
                |x: &Tensor, head: &Weight| Ok(cross_entropy(x, head, targets.clone(), true)?.0);
            let x = random_tensor(tokens, 12, 1);
            let trainable = |x: &Tensor| run(x, &weights.trainable("head"));
            check_op(&x, &weights, &[], &trainable, &plain);
            let frozen = |x: &Tensor| run(x, &weights.frozen("head"));
            check_op(&x, &weights, &["head"], &frozen, &plain);
        }
    }

    #[test]
    fn correct_tokens_are_those_with_the_largest_logit() {
        let head = Tensor::new(&[[1.0f32, 0.0], [0.0, 1.0]], &Device::Cpu).unwrap();
        let hidden = Tensor::new(&[[2.0f32, 1.0], [2.0, 1.0], [0.0, 5.0]], &Device::Cpu).unwrap();
        let targets = [(0, 0), (1, 1), (2, 1)].map(|(row, id)| Target { row, id });
        let head = Weight::frozen(head).unwrap();
        let (_, sum) = cross_entropy(&hidden, &head, Arc::new(targets.to_vec()), false).unwrap();
        assert_eq!(sum.correct, 2);
        let expected = 2.0 * (1.0 + (-1.0f64).exp()).ln() + 1.0 + (1.0 + (-5.0f64).exp()).ln();
        assert!(
            (sum.loss - expected).abs() < 1e-5,
            "{} {expected}",
            sum.loss
        );
    }

    #[test]
    fn not_a_number_reaches_the_loss() {
        let hidden = Tensor::new(&[[f32::NAN, 1.0]], &Device::Cpu).unwrap();
        let head = Weight::frozen(random_tensor(5, 2, 1)).unwrap();
        let targets = Arc::new(vec![Target { row: 0, id: 1 }]);
        assert!(
            cross_entropy(&hidden, &head, targets, false)
                .unwrap()
                .1
                .loss
                .is_nan()
        );
    }
}
