//! SwiGLU, `h = silu(gate) · up` (Shazeer, 2020), on the two halves of a fused projection. The backward pass computes `h`
//! again along the way, for the gradient of the layer behind it.

use rayon::prelude::*;

use super::ROW_TILE;
use super::element::Element;
use super::vector::{self, dispatch, sigmoid};

const LANES: usize = 16;

/// Computes `h` `[tokens][width]` from `gate_up` `[tokens][2 * width]`, the gates first.
pub fn forward<E: Element>(gate_up: &[E], h: &mut [E], width: usize) {
    h.par_chunks_mut(ROW_TILE * width)
        .zip(gate_up.par_chunks(ROW_TILE * 2 * width))
        .for_each(|(h, gate_up)| {
            dispatch(
                #[inline(always)]
                || {
                    for (h, gate_up) in h
                        .chunks_exact_mut(width)
                        .zip(gate_up.chunks_exact(2 * width))
                    {
                        forward_row(gate_up, h);
                    }
                },
            );
        });
}

/// Writes the gradient of `gate_up`, and `h` as the forward pass had it.
pub fn backward<E: Element>(
    gate_up: &[E],
    dh: &[f32],
    d_gate_up: &mut [E],
    h: &mut [E],
    width: usize,
) {
    d_gate_up
        .par_chunks_mut(ROW_TILE * 2 * width)
        .zip(h.par_chunks_mut(ROW_TILE * width))
        .zip(gate_up.par_chunks(ROW_TILE * 2 * width))
        .zip(dh.par_chunks(ROW_TILE * width))
        .for_each(|(((d_gate_up, h), gate_up), dh)| {
            dispatch(
                #[inline(always)]
                || {
                    for (((d, h), x), dh) in d_gate_up
                        .chunks_exact_mut(2 * width)
                        .zip(h.chunks_exact_mut(width))
                        .zip(gate_up.chunks_exact(2 * width))
                        .zip(dh.chunks_exact(width))
                    {
                        backward_row(x, dh, d, h);
                    }
                },
            );
        });
}

#[inline(always)]
fn forward_row<E: Element>(gate_up: &[E], h: &mut [E]) {
    let (gate, up) = gate_up.split_at(h.len());
    for ((h, g), u) in h.iter_mut().zip(gate).zip(up) {
        let (g, u) = (g.wide(), u.wide());
        *h = E::round_from(g * sigmoid(g) * u);
    }
}

/// Computes one row of the backward pass, in groups of fixed length: with six slices the compiler would not see that none
/// overlaps, and make no vector code.
#[inline(always)]
fn backward_row<E: Element>(gate_up: &[E], dh: &[f32], d_gate_up: &mut [E], h: &mut [E]) {
    let (gate, up) = gate_up.split_at(dh.len());
    let (d_gate, d_up) = d_gate_up.split_at_mut(dh.len());
    let (gates, gates_rest) = gate.as_chunks::<LANES>();
    let (ups, ups_rest) = up.as_chunks::<LANES>();
    let (dhs, dhs_rest) = dh.as_chunks::<LANES>();
    let (d_gates, d_gates_rest) = d_gate.as_chunks_mut::<LANES>();
    let (d_ups, d_ups_rest) = d_up.as_chunks_mut::<LANES>();
    let (hs, hs_rest) = h.as_chunks_mut::<LANES>();
    for (i, dh) in dhs.iter().enumerate() {
        let (mut hidden, mut of_gate) = ([E::zeroed(); LANES], [E::zeroed(); LANES]);
        let mut of_up = [E::zeroed(); LANES];
        let (gate, up) = (&gates[i], &ups[i]);
        vector::lanes_only();
        for lane in 0..LANES {
            let value = gradient(gate[lane].wide(), up[lane].wide(), dh[lane]);
            hidden[lane] = E::round_from(value.h);
            of_gate[lane] = E::round_from(value.d_gate);
            of_up[lane] = E::round_from(value.d_up);
        }
        (hs[i], d_gates[i], d_ups[i]) = (hidden, of_gate, of_up);
    }
    for (i, dh) in dhs_rest.iter().enumerate() {
        let value = gradient(gates_rest[i].wide(), ups_rest[i].wide(), *dh);
        hs_rest[i] = E::round_from(value.h);
        d_gates_rest[i] = E::round_from(value.d_gate);
        d_ups_rest[i] = E::round_from(value.d_up);
    }
}

struct Gradient {
    h: f32,
    d_gate: f32,
    d_up: f32,
}

/// Gradients of gate and up, with `silu'(g) = s (1 + g (1 - s))` and `s = sigmoid(g)`.
#[inline(always)]
fn gradient(g: f32, u: f32, dh: f32) -> Gradient {
    let s = sigmoid(g);
    Gradient {
        h: g * s * u,
        d_gate: dh * u * (s * (1.0 + g * (1.0 - s))),
        d_up: dh * (g * s),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::testing::{TestWeights, check_op, random_tensor};
    use candle_core::{Result, Tensor};

    fn reference(gate_up: &Tensor) -> Result<Tensor> {
        let width = gate_up.dim(1)? / 2;
        gate_up.narrow(1, 0, width)?.silu()? * gate_up.narrow(1, width, width)?
    }

    #[test]
    fn values_and_gradients_equal_the_reference() {
        for (rows, width) in [(1, 3), (130, 37)] {
            let run = |x: &[f32], dy: &[f32]| {
                let (mut h, mut again) = (vec![0.0; x.len() / 2], vec![0.0; x.len() / 2]);
                let mut dx = vec![0.0; x.len()];
                forward(x, &mut h, width);
                backward(x, dy, &mut dx, &mut again, width);
                assert_eq!(h, again);
                (h, dx)
            };
            let x = (random_tensor(rows, 2 * width, 1) * 3.0).unwrap();
            check_op(&x, &TestWeights::new(&[]), &[], &run, &reference);
        }
    }
}
