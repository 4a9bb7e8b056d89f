//! `h = silu(gate) · up` (Shazeer, 2020), on the two halves of a fused projection.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::vector::{dispatch, sigmoid};
use super::{ROW_TILE, f32_slice, output, to_tensor, with_f32};

/// `gate_up` is `[tokens, 2 * width]`, the gates first; the result is `[tokens, width]`.
pub fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    gate_up.apply_op1(Swiglu)
}

/// The operation.
pub struct Swiglu;

#[inline(always)]
fn forward_row(gate_up: &[f32], h: &mut [f32]) {
    let (gate, up) = gate_up.split_at(h.len());
    for ((h, g), u) in h.iter_mut().zip(gate).zip(up) {
        *h = g * sigmoid(*g) * u;
    }
}

/// `silu'(g) = s (1 + g (1 - s))` with `s = sigmoid(g)`.
#[inline(always)]
fn backward_row(gate_up: &[f32], dh: &[f32], d_gate_up: &mut [f32]) {
    let (gate, up) = gate_up.split_at(dh.len());
    let (d_gate, d_up) = d_gate_up.split_at_mut(dh.len());
    for ((((dg, du), g), u), dh) in d_gate.iter_mut().zip(d_up).zip(gate).zip(up).zip(dh) {
        let s = sigmoid(*g);
        *dg = dh * u * (s * (1.0 + g * (1.0 - s)));
        *du = dh * (g * s);
    }
}

impl CustomOp1 for Swiglu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, double) = layout.shape().dims2()?;
        let width = double / 2;
        let gate_up = f32_slice(storage, layout)?;
        let mut h = vec![0.0; rows * width];
        h.par_chunks_mut(ROW_TILE * width)
            .zip(gate_up.par_chunks(ROW_TILE * double))
            .for_each(|(h, gate_up)| {
                dispatch(
                    #[inline(always)]
                    || {
                        for (h, gate_up) in
                            h.chunks_exact_mut(width).zip(gate_up.chunks_exact(double))
                        {
                            forward_row(gate_up, h);
                        }
                    },
                );
            });
        Ok(output(h, rows, width))
    }

    fn bwd(&self, arg: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (rows, double) = arg.dims2()?;
        let width = double / 2;
        let mut d_gate_up = vec![0.0; rows * double];
        with_f32(arg, |gate_up| {
            with_f32(grad, |dh| {
                d_gate_up
                    .par_chunks_mut(ROW_TILE * double)
                    .zip(gate_up.par_chunks(ROW_TILE * double))
                    .zip(dh.par_chunks(ROW_TILE * width))
                    .for_each(|((d_gate_up, gate_up), dh)| {
                        dispatch(
                            #[inline(always)]
                            || {
                                for ((d, x), dh) in d_gate_up
                                    .chunks_exact_mut(double)
                                    .zip(gate_up.chunks_exact(double))
                                    .zip(dh.chunks_exact(width))
                                {
                                    backward_row(x, dh, d);
                                }
                            },
                        );
                    });
                Ok(())
            })
        })?;
        Ok(Some(to_tensor(d_gate_up, rows, double)?))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::testing::{TestWeights, check_op, random_tensor};

    fn reference(gate_up: &Tensor) -> Result<Tensor> {
        let width = gate_up.dim(1)? / 2;
        gate_up.narrow(1, 0, width)?.silu()? * gate_up.narrow(1, width, width)?
    }

    #[test]
    fn values_and_gradients_equal_the_reference() {
        for (rows, width) in [(1, 3), (130, 37)] {
            let x = (random_tensor(rows, 2 * width, 1) * 3.0).unwrap();
            check_op(&x, &TestWeights::new(&[]), &[], &swiglu, &reference);
        }
    }
}
