//! The clamped SwiGLU of GPT-OSS, on columns in which gates and ups alternate: `h = (u + 1) · g · sigmoid(alpha · g)`, where
//! `g = min(gate, limit)` and `u = min(max(up, -limit), limit)`. The backward pass computes `h` again along the way, for the gradient
//! of the layer behind it.

use rayon::prelude::*;

use super::ROW_TILE;
use super::element::Element;
use super::vector::{dispatch, sigmoid};

/// The numbers of a clamped SwiGLU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClampedSwiglu {
    /// What the gate is multiplied by within its sigmoid.
    pub alpha: f32,
    pub limit: f32,
}

struct Gradient {
    h: f32,
    d_gate: f32,
    d_up: f32,
}

impl ClampedSwiglu {
    /// Computes `h` `[tokens][width]` from `gate_up` `[tokens][2 * width]`, a gate before each up.
    pub fn forward<E: Element>(&self, gate_up: &[E], h: &mut [E], width: usize) {
        let pairs = pairs(gate_up);
        assert_eq!(pairs.len(), h.len(), "a pair for each result");
        let tile = ROW_TILE * width;
        h.par_chunks_mut(tile)
            .zip(pairs.par_chunks(tile))
            .for_each(|(h, pairs)| {
                dispatch(
                    #[inline(always)]
                    || {
                        for (h, [gate, up]) in h.iter_mut().zip(pairs) {
                            let (g, u) = self.clamped(gate.wide(), up.wide());
                            *h = E::round_from((u + 1.0) * g * sigmoid(self.alpha * g));
                        }
                    },
                );
            });
    }

    /// Writes the gradient of `gate_up`, and `h` as the forward pass had it.
    pub fn backward<E: Element>(
        &self,
        gate_up: &[E],
        dh: &[f32],
        (d_gate_up, h): (&mut [E], &mut [E]),
        width: usize,
    ) {
        let (pairs, d_pairs) = (pairs(gate_up), d_gate_up.as_chunks_mut::<2>().0);
        assert!(
            pairs.len() == h.len() && d_pairs.len() == h.len() && dh.len() == h.len(),
            "a pair for each result"
        );
        let tile = ROW_TILE * width;
        d_pairs
            .par_chunks_mut(tile)
            .zip(h.par_chunks_mut(tile))
            .zip(pairs.par_chunks(tile))
            .zip(dh.par_chunks(tile))
            .for_each(|(((d_pairs, h), pairs), dh)| {
                dispatch(
                    #[inline(always)]
                    || {
                        let out = d_pairs.iter_mut().zip(h);
                        for ((d_pair, h), ([gate, up], dh)) in out.zip(pairs.iter().zip(dh)) {
                            let value = self.gradient(gate.wide(), up.wide(), *dh);
                            *h = E::round_from(value.h);
                            *d_pair = [value.d_gate, value.d_up].map(E::round_from);
                        }
                    },
                );
            });
    }

    #[inline(always)]
    fn clamped(&self, gate: f32, up: f32) -> (f32, f32) {
        let below = |x: f32| if x > self.limit { self.limit } else { x };
        let up = if up < -self.limit { -self.limit } else { up };
        (below(gate), below(up))
    }

    /// With `s = sigmoid(alpha · g)` the slope of `g · s` is `s (1 + alpha · g (1 - s))`; what is clamped has none.
    #[inline(always)]
    fn gradient(&self, gate: f32, up: f32, dh: f32) -> Gradient {
        let (g, u) = self.clamped(gate, up);
        let s = sigmoid(self.alpha * g);
        let slope = s * (1.0 + self.alpha * g * (1.0 - s));
        let passes = |is_free: bool, gradient: f32| if is_free { gradient } else { 0.0 };
        Gradient {
            h: (u + 1.0) * g * s,
            d_gate: passes(gate <= self.limit, dh * (u + 1.0) * slope),
            d_up: passes(up.abs() <= self.limit, dh * g * s),
        }
    }
}

fn pairs<E>(gate_up: &[E]) -> &[[E; 2]] {
    gate_up.as_chunks::<2>().0
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::testing::{TestWeights, check_op, random_tensor};
    use candle_core::{Result, Tensor};

    const NUMBERS: ClampedSwiglu = ClampedSwiglu {
        alpha: 1.7,
        limit: 2.0,
    };

    fn reference(gate_up: &Tensor) -> Result<Tensor> {
        let (rows, columns) = gate_up.dims2()?;
        let pairs = gate_up.reshape((rows, columns / 2, 2))?;
        let column = |index: usize| pairs.narrow(2, index, 1)?.squeeze(2);
        let limit = f64::from(NUMBERS.limit);
        // min(x, limit) = limit - relu(limit - x), whose gradient is that of a clamp.
        let below = |x: &Tensor| (limit - x)?.relu()?.affine(-1.0, limit);
        let above = |x: &Tensor| (x + limit)?.relu()? - limit;
        let (g, u) = (below(&column(0)?)?, above(&below(&column(1)?)?)?);
        let s = ((&g * -f64::from(NUMBERS.alpha))?.exp()? + 1.0)?.recip()?;
        (u + 1.0)? * (g * s)?
    }

    #[test]
    fn values_and_gradients_equal_the_reference() {
        for (rows, width) in [(1, 3), (130, 37)] {
            let run = |x: &[f32], dy: &[f32]| {
                let (mut h, mut again) = (vec![0.0; x.len() / 2], vec![0.0; x.len() / 2]);
                let mut dx = vec![0.0; x.len()];
                NUMBERS.forward(x, &mut h, width);
                NUMBERS.backward(x, dy, (&mut dx, &mut again), width);
                assert_eq!(h, again);
                (h, dx)
            };
            let x = (random_tensor(rows, 2 * width, 1) * 2.0).unwrap();
            check_op(&x, &TestWeights::new(&[]), &[], &run, &reference);
        }
    }
}
