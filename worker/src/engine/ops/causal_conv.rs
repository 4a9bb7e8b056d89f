//! A causal convolution of each channel by itself, then SiLU: `y[t] = silu(Σ w[l] · x[t - l])`, where no token reads over the
//! beginning of its segment. The backward pass computes what SiLU reads again.

use std::borrow::Cow;
use std::ops::Range;

use rayon::prelude::*;

use super::ROW_TILE;
use super::element::{Element, WeightSlice, widen};
use super::matrix::View;
use super::vector::{self, dispatch, sigmoid};
use crate::engine::params::Weight;

/// Channels of which a task sums the gradient of the weights.
const CHANNELS: usize = 128;

/// The convolution, with its weight `[channels][1][kernel]`, whose last column is what a token is itself multiplied by.
#[derive(Clone, Debug)]
pub struct CausalConv {
    pub weight: Weight,
}

/// The weights by how far they look back: `[kernel][channels]`, the tokens themselves first.
struct Taps {
    values: Vec<f32>,
    channels: usize,
}

impl Taps {
    fn of(&self, back: usize) -> &[f32] {
        &self.values[back * self.channels..][..self.channels]
    }

    fn count(&self) -> usize {
        self.values.len() / self.channels
    }
}

impl CausalConv {
    /// Number of tokens before a token that it reads.
    pub fn reach(&self) -> usize {
        self.weight.dims()[2] - 1
    }

    fn channels(&self) -> usize {
        self.weight.dims()[0]
    }

    fn taps(&self) -> Taps {
        let (channels, kernel) = (self.channels(), self.weight.dims()[2]);
        let reading = self.weight.read();
        let weight: Cow<[f32]> = match reading.slice() {
            WeightSlice::F32(values) => Cow::Borrowed(values),
            WeightSlice::Bf16(values) => {
                let mut wide = vec![0.0; values.len()];
                widen(values, &mut wide);
                Cow::Owned(wide)
            }
            WeightSlice::Nf4(_) => unreachable!("only linear layers are kept in 4 bits"),
        };
        let back = (0..kernel).rev();
        let values = back.flat_map(|column| weight.iter().skip(column).step_by(kernel));
        Taps {
            values: values.copied().collect(),
            channels,
        }
    }

    /// Computes `y`, `[tokens][channels]`, from `x`, which may have rows of tokens before them. `positions` are the tokens' within
    /// their segments.
    pub fn forward<E: Element>(&self, x: View<E>, positions: &[u32], y: &mut [f32]) {
        let (taps, channels) = (self.taps(), self.channels());
        let before = x.rows - positions.len();
        assert_eq!(y.len(), positions.len() * channels, "a row for each token");
        y.par_chunks_mut(ROW_TILE * channels)
            .enumerate()
            .for_each(|(tile, y)| {
                for (index, y) in y.chunks_exact_mut(channels).enumerate() {
                    let token = tile * ROW_TILE + index;
                    convolve(&taps, x, before + token, positions[token], y);
                    dispatch(
                        #[inline(always)]
                        || y.iter_mut().for_each(|y| *y *= sigmoid(*y)),
                    );
                }
            });
    }

    /// Computes the gradient of `x`, whose rows are the tokens alone, into the first columns of `dx`, `[tokens][stride]`, from that of
    /// the result, and leaves anything in `dy`.
    pub fn backward<E: Element>(
        &self,
        x: View<E>,
        positions: &[u32],
        dy: &mut [f32],
        (dx, stride): (&mut [E], usize),
    ) {
        let (taps, channels) = (self.taps(), self.channels());
        assert!(
            x.rows == positions.len() && dy.len() == x.rows * channels,
            "a row for each token"
        );
        dy.par_chunks_mut(ROW_TILE * channels)
            .enumerate()
            .for_each(|(tile, dy)| {
                let mut read = vec![0.0; channels];
                for (index, dy) in dy.chunks_exact_mut(channels).enumerate() {
                    let token = tile * ROW_TILE + index;
                    convolve(&taps, x, token, positions[token], &mut read);
                    dispatch(
                        #[inline(always)]
                        || vector::update1(dy, &read, |dy, x| dy * silu_slope(x)),
                    );
                }
            });
        let d_read: &[f32] = dy;
        dx.par_chunks_mut(ROW_TILE * stride)
            .enumerate()
            .for_each(|(tile, dx)| {
                let mut sum = vec![0.0; channels];
                for (index, dx) in dx.chunks_exact_mut(stride).enumerate() {
                    let token = tile * ROW_TILE + index;
                    sum.fill(0.0);
                    for back in readers(positions, token, taps.count()) {
                        let d_read = &d_read[(token + back) * channels..][..channels];
                        let taps = taps.of(back);
                        dispatch(
                            #[inline(always)]
                            || vector::update2(&mut sum, taps, d_read, |s, w, d| s + w * d),
                        );
                    }
                    super::element::round_slice(&sum, 1.0, &mut dx[..channels]);
                }
            });
        self.backward_weight(x, positions, d_read);
    }

    /// Each weight's sum runs over the tokens in their order.
    fn backward_weight<E: Element>(&self, x: View<E>, positions: &[u32], d_read: &[f32]) {
        if !self.weight.is_trainable() {
            return;
        }
        let (channels, kernel) = (self.channels(), self.weight.dims()[2]);
        let mut sums = vec![0.0; channels * kernel];
        sums.par_chunks_mut(CHANNELS * kernel)
            .enumerate()
            .for_each(|(tile, sums)| {
                let first = tile * CHANNELS;
                let own = first..first + sums.len() / kernel;
                let mut by_tap = vec![0.0; sums.len()];
                for (token, position) in positions.iter().enumerate() {
                    let d_read = &d_read[token * channels..][own.clone()];
                    let reach = (kernel - 1).min(*position as usize).min(token);
                    for back in 0..=reach {
                        let x = &x.row(token - back)[own.clone()];
                        let sums = &mut by_tap[back * own.len()..][..own.len()];
                        dispatch(
                            #[inline(always)]
                            || {
                                for ((sum, d), x) in sums.iter_mut().zip(d_read).zip(x) {
                                    *sum += d * x.wide();
                                }
                            },
                        );
                    }
                }
                for (channel, sums) in sums.chunks_exact_mut(kernel).enumerate() {
                    for (column, sum) in sums.iter_mut().enumerate() {
                        *sum = by_tap[(kernel - 1 - column) * own.len() + channel];
                    }
                }
            });
        self.weight.add_gradient(|rows, gradient, accumulate| {
            let sums = &sums[rows.start * kernel..rows.end * kernel];
            match accumulate {
                true => super::add_in_place(gradient, sums),
                false => gradient.copy_from_slice(sums),
            }
        });
    }
}

/// How far behind a token those are that read it.
fn readers(positions: &[u32], token: usize, taps: usize) -> Range<usize> {
    let behind = &positions[token..];
    let reads = |back: &usize| behind.get(*back).is_some_and(|at| *at as usize >= *back);
    0..(0..taps).take_while(reads).count()
}

/// What SiLU reads of a token, which is `row` of `x`.
fn convolve<E: Element>(taps: &Taps, x: View<E>, row: usize, position: u32, y: &mut [f32]) {
    let reach = (taps.count() - 1).min(position as usize).min(row);
    y.fill(0.0);
    for back in (0..=reach).rev() {
        let (taps, x) = (taps.of(back), x.row(row - back));
        dispatch(
            #[inline(always)]
            || {
                for ((y, w), x) in y.iter_mut().zip(taps).zip(x) {
                    *y += w * x.wide();
                }
            },
        );
    }
}

/// The slope of `x · sigmoid(x)`.
#[inline(always)]
pub(super) fn silu_slope(x: f32) -> f32 {
    let s = sigmoid(x);
    s * (1.0 + x * (1.0 - s))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use candle_core::{Result, Tensor};

    use super::*;
    use crate::engine::testing::{TestWeights, check_op, random_tensor, random_values};

    const KERNEL: usize = 4;
    const CHANNELS: usize = 150;
    const SEGMENTS: [usize; 5] = [3, 1, 70, 2, 9];

    fn positions() -> Vec<u32> {
        SEGMENTS.iter().flat_map(|n| 0..*n as u32).collect()
    }

    fn reference(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let mut rows = Vec::new();
        let mut first = 0;
        for length in SEGMENTS {
            for token in first..first + length {
                let mut sum = Tensor::zeros((1, CHANNELS), x.dtype(), x.device())?;
                for back in 0..KERNEL.min(token - first + 1) {
                    let w = weight.narrow(2, KERNEL - 1 - back, 1)?;
                    let w = w.reshape((1, CHANNELS))?;
                    sum = (sum + (w * x.narrow(0, token - back, 1)?)?)?;
                }
                rows.push((&sum / ((sum.neg()?.exp())? + 1.0)?)?);
            }
            first += length;
        }
        Tensor::cat(&rows, 0)
    }

    #[test]
    fn value_and_gradients_equal_the_plain_sum_within_segments() {
        let weights = TestWeights::new(&[("w", &[CHANNELS, 1, KERNEL])]);
        let x = random_tensor(85, CHANNELS, 1);
        for is_trained in [true, false] {
            let weight = match is_trained {
                true => weights.trainable("w"),
                false => weights.frozen("w"),
            };
            let conv = CausalConv { weight };
            let frozen: &[&str] = if is_trained { &[] } else { &["w"] };
            let run = |x: &[f32], dy: &[f32]| {
                let view = View::new(x, 85, CHANNELS);
                let mut y = vec![0.0; x.len()];
                conv.forward(view, &positions(), &mut y);
                let (mut dy, mut dx) = (dy.to_vec(), vec![0.0; x.len()]);
                conv.backward(view, &positions(), &mut dy, (&mut dx, CHANNELS));
                (y, dx)
            };
            check_op(&x, &weights, frozen, &run, &|x| {
                reference(x, &weights.variable("w"))
            });
        }
    }

    #[test]
    fn a_text_goes_on_from_the_tokens_before() {
        let weights = TestWeights::new(&[("w", &[8, 1, KERNEL])]);
        let conv = CausalConv {
            weight: weights.frozen("w"),
        };
        let x = random_values(10 * 8, 2);
        let positions: Vec<u32> = (0..10).collect();
        let mut whole = vec![0.0; 80];
        conv.forward(View::new(&x, 10, 8), &positions, &mut whole);
        for known in 1..10 {
            let before = known.min(conv.reach());
            let x = &x[(known - before) * 8..];
            let mut rest = vec![0.0; (10 - known) * 8];
            conv.forward(
                View::new(x, 10 - known + before, 8),
                &positions[known..],
                &mut rest,
            );
            assert_eq!(rest, whole[known * 8..]);
        }
    }
}
