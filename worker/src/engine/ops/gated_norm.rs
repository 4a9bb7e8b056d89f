//! The norm of each head's result in linear attention, through a gate: `y = w · rms_norm(x) · silu(gate)`.

use rayon::prelude::*;

use super::causal_conv::silu_slope;
use super::element::Element;
use super::matrix::View;
use super::rms_norm::{RowGradient, inverse_rms};
use super::vector::{dispatch, sigmoid};
use super::{ROW_TILE, add_partials};
use crate::engine::params::Weight;

/// The norm, with the weight of a head, the same for all, in float32.
#[derive(Clone, Debug)]
pub struct GatedNorm {
    pub weight: Weight,
    pub epsilon: f32,
}

impl GatedNorm {
    /// Computes `y` of `x`, both `[tokens][heads * width]`, as the gates are.
    pub fn forward<E: Element>(&self, x: &[E], gates: View<E>, y: &mut [E]) {
        let weight = self.weight.read_f32();
        let (weight, width, columns) = (&*weight, weight.len(), gates.columns);
        y.par_chunks_mut(ROW_TILE * columns)
            .zip(x.par_chunks(ROW_TILE * columns))
            .enumerate()
            .for_each(|(tile, (y, x))| {
                let mut wide = vec![0.0; width];
                let rows = y.chunks_exact_mut(columns).zip(x.chunks_exact(columns));
                for (index, (y, x)) in rows.enumerate() {
                    let gates = gates.row(tile * ROW_TILE + index);
                    let heads = y.chunks_exact_mut(width).zip(x.chunks_exact(width));
                    for ((y, x), gates) in heads.zip(gates.chunks_exact(width)) {
                        dispatch(
                            #[inline(always)]
                            || {
                                widen_head(x, &mut wide);
                                let inverse = inverse_rms(&wide, self.epsilon);
                                let values = y.iter_mut().zip(&wide).zip(gates).zip(weight);
                                for (((y, x), gate), w) in values {
                                    let gate = gate.wide();
                                    let open = gate * sigmoid(gate);
                                    *y = E::round_from(w * (x * inverse) * open);
                                }
                            },
                        );
                    }
                }
            });
    }

    /// Turns `dy`, the gradient of the result, into that of `x`, and writes that of the gates into the columns of `d_gates`,
    /// `[tokens][stride]`, from `column` on.
    pub fn backward<E: Element>(
        &self,
        x: &[E],
        gates: View<E>,
        dy: &mut [f32],
        (d_gates, stride, column): (&mut [E], usize, usize),
    ) {
        let partials: Vec<Vec<f32>> = {
            let weight = self.weight.read_f32();
            let (weight, columns) = (&*weight, gates.columns);
            dy.par_chunks_mut(ROW_TILE * columns)
                .zip(x.par_chunks(ROW_TILE * columns))
                .zip(d_gates.par_chunks_mut(ROW_TILE * stride))
                .enumerate()
                .map(|(tile, ((dy, x), d_gates))| {
                    let mut of_tile = TileGradient::new(self, weight);
                    let rows = dy.chunks_exact_mut(columns).zip(x.chunks_exact(columns));
                    let rows = rows.zip(d_gates.chunks_exact_mut(stride));
                    for (index, ((dy, x), d_gates)) in rows.enumerate() {
                        let gates = gates.row(tile * ROW_TILE + index);
                        let d_gates = &mut d_gates[column..column + columns];
                        of_tile.add_row(x, gates, dy, d_gates);
                    }
                    of_tile.d_weight
                })
                .collect()
        };
        self.weight.add_gradient(|_, gradient, accumulate| {
            add_partials(gradient, accumulate, &partials);
        });
    }
}

/// The backward pass of some rows, one after the other.
struct TileGradient<'a> {
    weight: &'a [f32],
    epsilon: f32,
    /// Empty where it is not wanted.
    d_weight: Vec<f32>,
    wide: Vec<f32>,
    d_normed: Vec<f32>,
}

impl<'a> TileGradient<'a> {
    fn new(norm: &GatedNorm, weight: &'a [f32]) -> Self {
        let width = weight.len();
        Self {
            weight,
            epsilon: norm.epsilon,
            d_weight: vec![0.0; if norm.weight.is_trainable() { width } else { 0 }],
            wide: vec![0.0; width],
            d_normed: vec![0.0; width],
        }
    }

    fn add_row<E: Element>(&mut self, x: &[E], gates: &[E], dy: &mut [f32], d_gates: &mut [E]) {
        let width = self.weight.len();
        let heads = x.chunks_exact(width).zip(gates.chunks_exact(width));
        let outs = dy
            .chunks_exact_mut(width)
            .zip(d_gates.chunks_exact_mut(width));
        for ((x, gates), (dy, d_gates)) in heads.zip(outs) {
            dispatch(
                #[inline(always)]
                || self.add_head(x, gates, dy, d_gates),
            );
        }
    }

    #[inline(always)]
    fn add_head<E: Element>(&mut self, x: &[E], gates: &[E], dy: &mut [f32], d_gates: &mut [E]) {
        let Self {
            weight,
            epsilon,
            d_weight,
            wide,
            d_normed,
        } = self;
        widen_head(x, wide);
        let inverse = inverse_rms(wide, *epsilon);
        let values = wide.iter().zip(*weight).zip(gates.iter().zip(&*dy));
        let outs = d_normed.iter_mut().zip(d_gates);
        for (((x, w), (gate, dy)), (d_normed, d_gate)) in values.zip(outs) {
            let gate = gate.wide();
            *d_gate = E::round_from(dy * (w * (x * inverse)) * silu_slope(gate));
            *d_normed = dy * (gate * sigmoid(gate));
        }
        let d_weight = (!d_weight.is_empty()).then_some(&mut d_weight[..]);
        let row = RowGradient::new(wide, weight, *epsilon, d_normed, d_weight);
        for (((dx, x), g), w) in dy.iter_mut().zip(&*wide).zip(&*d_normed).zip(*weight) {
            *dx = row.of(*x, *g, *w);
        }
    }
}

#[inline(always)]
fn widen_head<E: Element>(from: &[E], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.wide();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::testing::{TestWeights, check_op, random_tensor};

    const HEADS: usize = 3;
    const WIDTH: usize = 20;
    const COLUMNS: usize = HEADS * WIDTH;

    #[test]
    fn value_and_gradients_equal_the_plain_formula() {
        let weights = TestWeights::new(&[("w", &[WIDTH])]);
        // What is normed, and the gates behind it.
        let x = random_tensor(70, 2 * COLUMNS, 1);
        for is_trained in [true, false] {
            let norm = GatedNorm {
                weight: match is_trained {
                    true => weights.trainable("w"),
                    false => weights.frozen("w"),
                },
                epsilon: 1e-5,
            };
            let frozen: &[&str] = if is_trained { &[] } else { &["w"] };
            let run = |both: &[f32], dy: &[f32]| {
                let gates = View::new(both, 70, 2 * COLUMNS).part(COLUMNS, COLUMNS);
                let x: Vec<f32> = both
                    .chunks(2 * COLUMNS)
                    .flat_map(|row| row[..COLUMNS].to_vec())
                    .collect();
                let mut y = vec![0.0; x.len()];
                norm.forward(&x, gates, &mut y);
                let (mut dx, mut d_both) = (dy.to_vec(), vec![0.0; both.len()]);
                norm.backward(&x, gates, &mut dx, (&mut d_both, 2 * COLUMNS, COLUMNS));
                for (to, dx) in d_both.chunks_mut(2 * COLUMNS).zip(dx.chunks(COLUMNS)) {
                    to[..COLUMNS].copy_from_slice(dx);
                }
                (y, d_both)
            };
            check_op(&x, &weights, frozen, &run, &|both| {
                let x = both.narrow(1, 0, COLUMNS)?.reshape((70 * HEADS, WIDTH))?;
                let gates = both
                    .narrow(1, COLUMNS, COLUMNS)?
                    .reshape((70 * HEADS, WIDTH))?;
                let mean = x.sqr()?.mean_keepdim(1)?;
                let normed = x.broadcast_div(&(mean + 1e-5)?.sqrt()?)?;
                let open = (&gates / (gates.neg()?.exp()? + 1.0)?)?;
                let y = (normed.broadcast_mul(&weights.variable("w"))? * open)?;
                y.reshape((70, COLUMNS))
            });
        }
    }
}
