//! `y = w · x / sqrt(mean(x²) + epsilon)` over each row (Zhang & Sennrich, 2019).

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::vector::{self, dispatch};
use super::{ROW_TILE, add_partials, f32_slice, output, to_tensor, with_f32};
use crate::engine::params::Weight;

/// `x` is `[tokens, width]`, `weight` is `[width]` in float32.
pub fn rms_norm(x: &Tensor, weight: &Weight, epsilon: f32) -> Result<Tensor> {
    x.apply_op1(RmsNorm {
        weight: weight.clone(),
        epsilon,
    })
}

/// The operation: its weight is `[width]`, in float32.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    pub weight: Weight,
    pub epsilon: f32,
}

/// One row forward.
#[inline(always)]
pub(super) fn forward_row(x: &[f32], weight: &[f32], epsilon: f32, y: &mut [f32]) {
    let inverse = inverse_rms(x, epsilon);
    for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
        *y = w * (x * inverse);
    }
}

/// One row backward: `dx = w g r - x r³ mean(w g x)`; adds `g x r` to `dw` where it is wanted.
#[inline(always)]
pub(super) fn backward_row(
    x: &[f32],
    weight: &[f32],
    epsilon: f32,
    g: &[f32],
    dx: &mut [f32],
    dw: Option<&mut [f32]>,
) {
    let inverse = inverse_rms(x, epsilon);
    for ((d, g), w) in dx.iter_mut().zip(g).zip(weight) {
        *d = g * w;
    }
    let mean = vector::dot(dx, x) / x.len() as f32;
    let factor = inverse * inverse * inverse * mean;
    for (d, x) in dx.iter_mut().zip(x) {
        *d = *d * inverse - x * factor;
    }
    if let Some(dw) = dw {
        for ((dw, g), x) in dw.iter_mut().zip(g).zip(x) {
            *dw += g * (x * inverse);
        }
    }
}

#[inline(always)]
fn inverse_rms(x: &[f32], epsilon: f32) -> f32 {
    1.0 / (vector::sum_squares(x) / x.len() as f32 + epsilon).sqrt()
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = layout.shape().dims2()?;
        let x = f32_slice(storage, layout)?;
        let mut y = vec![0.0; x.len()];
        self.weight.with_f32(|weight| {
            y.par_chunks_mut(ROW_TILE * width)
                .zip(x.par_chunks(ROW_TILE * width))
                .for_each(|(y, x)| {
                    dispatch(
                        #[inline(always)]
                        || {
                            for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                                forward_row(x, weight, self.epsilon, y);
                            }
                        },
                    );
                });
            Ok(())
        })?;
        Ok(output(y, rows, width))
    }

    fn bwd(&self, arg: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (rows, width) = arg.dims2()?;
        let mut dx = vec![0.0; rows * width];
        let trainable = self.weight.is_trainable();
        let tile = ROW_TILE * width;
        let partials: Vec<Vec<f32>> = with_f32(arg, |x| {
            with_f32(grad, |g| {
                self.weight.with_f32(|weight| {
                    Ok(dx
                        .par_chunks_mut(tile)
                        .zip(x.par_chunks(tile).zip(g.par_chunks(tile)))
                        .map(|(dx, (x, g))| {
                            let mut dw = vec![0.0; if trainable { width } else { 0 }];
                            dispatch(
                                #[inline(always)]
                                || {
                                    for ((dx, x), g) in dx
                                        .chunks_exact_mut(width)
                                        .zip(x.chunks_exact(width))
                                        .zip(g.chunks_exact(width))
                                    {
                                        let dw = trainable.then_some(dw.as_mut_slice());
                                        backward_row(x, weight, self.epsilon, g, dx, dw);
                                    }
                                },
                            );
                            dw
                        })
                        .collect())
                })
            })
        })?;
        self.weight.add_gradient(|gradient, accumulate| {
            add_partials(gradient, accumulate, &partials);
            Ok(())
        })?;
        Ok(Some(to_tensor(dx, rows, width)?))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::testing::{TestWeights, check_op, random_tensor};

    fn reference(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let mean = x.sqr()?.mean_keepdim(1)?;
        x.broadcast_div(&(mean + 1e-5)?.sqrt()?)?
            .broadcast_mul(weight)
    }

    #[test]
    fn values_and_gradients_equal_the_reference() {
        for (rows, width) in [(1, 5), (150, 40), (64, 33)] {
            let weights = TestWeights::new(&[("w", &[width])]);
            let x = random_tensor(rows, width, 1);
            let plain = |x: &Tensor| reference(x, &weights.variable("w"));
            let trainable = |x: &Tensor| rms_norm(x, &weights.trainable("w"), 1e-5);
            check_op(&x, &weights, &[], &trainable, &plain);
            let frozen = |x: &Tensor| rms_norm(x, &weights.frozen("w"), 1e-5);
            check_op(&x, &weights, &["w"], &frozen, &plain);
        }
    }
}
