//! How much a head of linear attention keeps and writes at a token (gated DeltaNet; Yang et al., 2024): the logarithm of what is kept,
//! `-exp(A) · softplus(a + bias)`, and the share that is written, `sigmoid(b)`.

use rayon::prelude::*;

use super::element::Element;
use super::matrix::View;
use super::vector::{exp, sigmoid};
use super::{ROW_TILE, add_partials};
use crate::engine::params::Weight;

/// The gates of all heads, with weights `[heads]`.
#[derive(Clone, Debug)]
pub struct DeltaGates {
    /// The logarithm of how fast each head forgets.
    pub decay: Weight,
    pub bias: Weight,
}

/// Gates, or their gradients, of every token: `[tokens][heads]` each.
pub struct Gates<T> {
    /// The share that is written.
    pub written: T,
    /// The logarithm of what is kept.
    pub kept: T,
}

impl DeltaGates {
    pub fn heads(&self) -> usize {
        self.decay.scalars()
    }

    /// Computes the gates from `projected`, `[tokens][2 * heads]`: what says how much is written, then how much is kept.
    pub fn forward<E: Element>(&self, projected: View<E>, gates: Gates<&mut [f32]>) {
        let heads = self.heads();
        let (decay, bias) = (self.decay.read_f32(), self.bias.read_f32());
        let (decay, bias) = (&*decay, &*bias);
        gates
            .written
            .par_chunks_mut(heads)
            .zip(gates.kept.par_chunks_mut(heads))
            .with_min_len(ROW_TILE)
            .enumerate()
            .for_each(|(token, (written, kept))| {
                let (b, a) = projected.row(token).split_at(heads);
                for head in 0..heads {
                    written[head] = sigmoid(b[head].wide());
                    kept[head] = -exp(decay[head]) * softplus(a[head].wide() + bias[head]);
                }
            });
    }

    /// Writes the gradient of `projected` into the columns of `d_projected`, `[tokens][stride]`, from `column` on.
    pub fn backward<E: Element>(
        &self,
        projected: View<E>,
        gradients: Gates<&[f32]>,
        (d_projected, stride, column): (&mut [E], usize, usize),
    ) {
        let heads = self.heads();
        let partials: Vec<[Vec<f32>; 2]> = {
            let (decay, bias) = (self.decay.read_f32(), self.bias.read_f32());
            let (decay, bias) = (&*decay, &*bias);
            d_projected
                .par_chunks_mut(ROW_TILE * stride)
                .enumerate()
                .map(|(tile, rows)| {
                    let mut sums = [vec![0.0; heads], vec![0.0; heads]];
                    for (index, row) in rows.chunks_exact_mut(stride).enumerate() {
                        let token = tile * ROW_TILE + index;
                        let (b, a) = projected.row(token).split_at(heads);
                        let (d_b, d_a) = row[column..column + 2 * heads].split_at_mut(heads);
                        for head in 0..heads {
                            let at = token * heads + head;
                            let written = sigmoid(b[head].wide());
                            let d_written = gradients.written[at] * written * (1.0 - written);
                            d_b[head] = E::round_from(d_written);
                            let (x, d_kept) = (a[head].wide() + bias[head], gradients.kept[at]);
                            let speed = -exp(decay[head]);
                            let d_x = d_kept * speed * sigmoid(x);
                            d_a[head] = E::round_from(d_x);
                            sums[0][head] += d_kept * speed * softplus(x);
                            sums[1][head] += d_x;
                        }
                    }
                    sums
                })
                .collect()
        };
        let (decays, biases): (Vec<_>, Vec<_>) = partials
            .into_iter()
            .map(|[decay, bias]| (decay, bias))
            .unzip();
        for (weight, partials) in [(&self.decay, decays), (&self.bias, biases)] {
            weight.add_gradient(|_, gradient, accumulate| {
                add_partials(gradient, accumulate, &partials);
            });
        }
    }
}

/// `log(1 + e^x)`, to about 1e-7 of itself, by sums and products alone.
#[inline(always)]
fn softplus(x: f32) -> f32 {
    // log(1 + y) = 2 artanh(y / (2 + y)), where y is at most one and what artanh reads at most a third.
    let y = exp(-x.abs());
    let s = y / (2.0 + y);
    let square = s * s;
    let mut series = 1.0 / 15.0;
    for odd in [13.0, 11.0, 9.0, 7.0, 5.0, 3.0, 1.0] {
        series = series * square + 1.0 / odd;
    }
    let above = if x > 0.0 { x } else { 0.0 };
    above + 2.0 * s * series
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::Tensor;

    use super::*;
    use crate::engine::testing::{TestWeights, check_op, random_tensor};

    #[test]
    fn softplus_is_close_to_what_it_stands_for() {
        for i in -4000..=4000 {
            let x = i as f32 * 0.01;
            let expected = f64::from(x).exp().ln_1p();
            let error = (f64::from(softplus(x)) / expected - 1.0).abs();
            assert!(error < 5e-7, "softplus({x}): relative error {error}");
        }
        assert!(softplus(f32::NAN).is_nan());
    }

    #[test]
    fn values_and_gradients_equal_the_plain_formulas() {
        const HEADS: usize = 3;
        let weights = TestWeights::new(&[("decay", &[HEADS]), ("bias", &[HEADS])]);
        let x = random_tensor(150, 2 * HEADS, 1);
        let gates = DeltaGates {
            decay: weights.trainable("decay"),
            bias: weights.trainable("bias"),
        };
        let both = |rows: &[f32]| -> (Vec<f32>, Vec<f32>) {
            let rows = rows.chunks(2 * HEADS).map(|row| row.split_at(HEADS));
            let (written, kept): (Vec<_>, Vec<_>) = rows.unzip();
            (written.concat(), kept.concat())
        };
        let run = |x: &[f32], dy: &[f32]| {
            let projected = View::new(x, 150, 2 * HEADS);
            let (mut written, mut kept) = (vec![0.0; 150 * HEADS], vec![0.0; 150 * HEADS]);
            gates.forward(
                projected,
                Gates {
                    written: &mut written,
                    kept: &mut kept,
                },
            );
            let rows = written.chunks(HEADS).zip(kept.chunks(HEADS));
            let y = rows.flat_map(|(w, k)| [w, k].concat()).collect();
            let (d_written, d_kept) = both(dy);
            let mut dx = vec![0.0; x.len()];
            let gradients = Gates {
                written: &d_written[..],
                kept: &d_kept[..],
            };
            gates.backward(projected, gradients, (&mut dx, 2 * HEADS, 0));
            (y, dx)
        };
        check_op(&x, &weights, &[], &run, &|x| {
            let (b, a) = (x.narrow(1, 0, HEADS)?, x.narrow(1, HEADS, HEADS)?);
            let written = ((b.neg()?.exp()? + 1.0)?).recip()?;
            let a = a.broadcast_add(&weights.variable("bias"))?;
            let softplus = (a.exp()? + 1.0)?.log()?;
            let speed = weights.variable("decay").exp()?.neg()?;
            Tensor::cat(&[written, softplus.broadcast_mul(&speed)?], 1)
        });
    }
}
