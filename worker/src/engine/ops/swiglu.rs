//! SwiGLU, `h = silu(gate) · up`, and GeGLU with GELU in its place (Shazeer, 2020), on the two halves of a fused projection. The backward pass computes `h`
//! again along the way, for the gradient of the layer behind it.

use common::model::Activation;
use rayon::prelude::*;

use super::ROW_TILE;
use super::element::Element;
use super::vector::{self, dispatch, sigmoid};

const LANES: usize = 16;

/// Computes `h` `[tokens][width]` from `gate_up` `[tokens][2 * width]`, the gates first.
pub fn forward<E: Element>(gate_up: &[E], h: &mut [E], width: usize, activation: Activation) {
    match activation {
        Activation::Silu => forward_with::<E, Silu>(gate_up, h, width),
        Activation::GeluTanh => forward_with::<E, GeluTanh>(gate_up, h, width),
    }
}

fn forward_with<E: Element, A: Gate>(gate_up: &[E], h: &mut [E], width: usize) {
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
                        forward_row::<E, A>(gate_up, h);
                    }
                },
            );
        });
}

/// Writes the gradient of `gate_up`, and `h` as the forward pass had it.
pub fn backward<E: Element>(
    gate_up: &[E],
    dh: &[f32],
    (d_gate_up, h): (&mut [E], &mut [E]),
    width: usize,
    activation: Activation,
) {
    match activation {
        Activation::Silu => backward_with::<E, Silu>(gate_up, dh, d_gate_up, h, width),
        Activation::GeluTanh => backward_with::<E, GeluTanh>(gate_up, dh, d_gate_up, h, width),
    }
}

fn backward_with<E: Element, A: Gate>(
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
                        backward_row::<E, A>(x, dh, d, h);
                    }
                },
            );
        });
}

#[inline(always)]
fn forward_row<E: Element, A: Gate>(gate_up: &[E], h: &mut [E]) {
    let (gate, up) = gate_up.split_at(h.len());
    for ((h, g), u) in h.iter_mut().zip(gate).zip(up) {
        let (g, u) = (g.wide(), u.wide());
        *h = E::round_from(A::value(g) * u);
    }
}

/// Computes one row of the backward pass, in groups of fixed length: with six slices the compiler would not see that none
/// overlaps, and make no vector code.
#[inline(always)]
fn backward_row<E: Element, A: Gate>(gate_up: &[E], dh: &[f32], d_gate_up: &mut [E], h: &mut [E]) {
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
            let value = gradient::<A>(gate[lane].wide(), up[lane].wide(), dh[lane]);
            hidden[lane] = E::round_from(value.h);
            of_gate[lane] = E::round_from(value.d_gate);
            of_up[lane] = E::round_from(value.d_up);
        }
        (hs[i], d_gates[i], d_ups[i]) = (hidden, of_gate, of_up);
    }
    for (i, dh) in dhs_rest.iter().enumerate() {
        let value = gradient::<A>(gates_rest[i].wide(), ups_rest[i].wide(), *dh);
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

#[inline(always)]
fn gradient<A: Gate>(g: f32, u: f32, dh: f32) -> Gradient {
    let (value, slope) = A::value_and_slope(g);
    Gradient {
        h: value * u,
        d_gate: dh * u * slope,
        d_up: dh * value,
    }
}

/// What the gate goes through.
trait Gate {
    fn value(g: f32) -> f32;
    fn value_and_slope(g: f32) -> (f32, f32);
}

/// `g s` with `s = sigmoid(g)`, whose slope is `s (1 + g (1 - s))`.
struct Silu;

impl Gate for Silu {
    #[inline(always)]
    fn value(g: f32) -> f32 {
        g * sigmoid(g)
    }

    #[inline(always)]
    fn value_and_slope(g: f32) -> (f32, f32) {
        let s = sigmoid(g);
        (g * s, s * (1.0 + g * (1.0 - s)))
    }
}

/// `g (1 + t) / 2` with `t = tanh(a (g + b g³))` (Hendrycks & Gimpel, 2016).
struct GeluTanh;

impl GeluTanh {
    /// sqrt(2 / pi)
    const A: f32 = 0.797_884_6;
    const B: f32 = 0.044_715;

    #[inline(always)]
    fn tanh(g: f32) -> f32 {
        vector::tanh(Self::A * (g + Self::B * g * g * g))
    }
}

impl Gate for GeluTanh {
    #[inline(always)]
    fn value(g: f32) -> f32 {
        0.5 * g * (1.0 + Self::tanh(g))
    }

    #[inline(always)]
    fn value_and_slope(g: f32) -> (f32, f32) {
        let t = Self::tanh(g);
        let inner = Self::A * (1.0 + 3.0 * Self::B * g * g);
        let slope = 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * inner;
        (0.5 * g * (1.0 + t), slope)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::testing::{TestWeights, check_op, random_tensor};
    use candle_core::{Result, Tensor};

    fn reference(gate_up: &Tensor, activation: Activation) -> Result<Tensor> {
        let width = gate_up.dim(1)? / 2;
        let gate = gate_up.narrow(1, 0, width)?;
        let gate = match activation {
            Activation::Silu => gate.silu()?,
            Activation::GeluTanh => gate.gelu()?,
        };
        gate * gate_up.narrow(1, width, width)?
    }

    #[test]
    fn values_and_gradients_equal_the_reference() {
        for ((rows, width), activation) in [
            ((1, 3), Activation::Silu),
            ((130, 37), Activation::Silu),
            ((130, 37), Activation::GeluTanh),
        ] {
            let run = |x: &[f32], dy: &[f32]| {
                let (mut h, mut again) = (vec![0.0; x.len() / 2], vec![0.0; x.len() / 2]);
                let mut dx = vec![0.0; x.len()];
                forward(x, &mut h, width, activation);
                backward(x, dy, (&mut dx, &mut again), width, activation);
                assert_eq!(h, again);
                (h, dx)
            };
            let x = (random_tensor(rows, 2 * width, 1) * 3.0).unwrap();
            check_op(&x, &TestWeights::new(&[]), &[], &run, &|x| {
                reference(x, activation)
            });
        }
    }
}
