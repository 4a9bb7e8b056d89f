//! The low-rank part of a LoRA layer, `scale · drop(x) Aᵀ Bᵀ` (Hu et al., 2021): the arithmetic of both passes.
//! [`super::projection`] adds it to the frozen layer, whose own gradient is never computed.
//!
//! With `u = drop(x) Aᵀ`: `dB = scale · dyᵀ u`, `du = scale · dy B`, `dA = duᵀ drop(x)`, `dx += drop'(du A)`.

use std::borrow::Cow;

use candle_core::Result;
use common::rng::CounterRng;
use rayon::prelude::*;

use super::gemm::{Matrix, MatrixMut, all_threads, multiply};
use super::{ROW_TILE, vector};
use crate::engine::params::Weight;

/// Draw stream of the counter-based generator.
const STREAM_DROPOUT: u64 = 0x6472_6f70;

/// The trainable update of one linear layer: `A` is `[rank, in]`, `B` is `[out, rank]`.
#[derive(Clone, Debug)]
pub struct Lora {
    pub a: Weight,
    pub b: Weight,
    pub scale: f32,
    /// Probability that an input is dropped.
    pub dropout: f64,
    /// Which module this is, for the dropout mask.
    pub module: u64,
}

/// What a dropout mask is a function of, beside the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaskKey {
    pub seed: u64,
    pub step: u64,
    pub slot: u32,
}

impl Lora {
    /// `u = drop(x) Aᵀ`, `[tokens, rank]`. Without a mask key nothing is dropped.
    pub(super) fn reduce(
        &self,
        x: &[f32],
        tokens: usize,
        mask: Option<MaskKey>,
    ) -> Result<Vec<f32>> {
        let (rank, width) = self.a.matrix_dims()?;
        let x = self.dropped(x, width, mask);
        let mut u = vec![0.0; tokens * rank];
        self.a.with_f32(|a| {
            multiply(
                &mut MatrixMut::new(&mut u, tokens, rank),
                false,
                1.0,
                Matrix::new(&x, tokens, width),
                Matrix::new(a, rank, width).transposed(),
                all_threads(),
            );
            Ok(())
        })?;
        Ok(u)
    }

    /// `y += scale · u Bᵀ`, `[tokens, out]`.
    pub(super) fn expand(&self, y: &mut MatrixMut, u: &[f32], tokens: usize) -> Result<()> {
        let (out, rank) = self.b.matrix_dims()?;
        self.b.with_f32(|b| {
            let b = Matrix::new(b, out, rank).transposed();
            let u = Matrix::new(u, tokens, rank);
            multiply(y, true, self.scale, u, b, all_threads());
            Ok(())
        })
    }

    /// Adds to `dx` `[tokens, in]` and to the gradients of A and B.
    pub(super) fn backward(
        &self,
        dx: &mut [f32],
        x: &[f32],
        u: &[f32],
        dy: Matrix,
        tokens: usize,
        mask: Option<MaskKey>,
    ) -> Result<()> {
        let (out, rank) = self.b.matrix_dims()?;
        self.b.add_gradient(|gradient, accumulate| {
            multiply(
                &mut MatrixMut::new(gradient, out, rank),
                accumulate,
                self.scale,
                dy.transposed(),
                Matrix::new(u, tokens, rank),
                all_threads(),
            );
            Ok(())
        })?;
        let mut du = vec![0.0; tokens * rank];
        self.b.with_f32(|b| {
            multiply(
                &mut MatrixMut::new(&mut du, tokens, rank),
                false,
                self.scale,
                dy,
                Matrix::new(b, out, rank),
                all_threads(),
            );
            Ok(())
        })?;
        self.backward_through_a(dx, x, Matrix::new(&du, tokens, rank), tokens, mask)
    }

    /// From the gradient of `u`: adds to that of A, and to `dx`.
    fn backward_through_a(
        &self,
        dx: &mut [f32],
        x: &[f32],
        du: Matrix,
        tokens: usize,
        mask: Option<MaskKey>,
    ) -> Result<()> {
        let (rank, width) = self.a.matrix_dims()?;
        let x = self.dropped(x, width, mask);
        self.a.add_gradient(|gradient, accumulate| {
            multiply(
                &mut MatrixMut::new(gradient, rank, width),
                accumulate,
                1.0,
                du.transposed(),
                Matrix::new(&x, tokens, width),
                all_threads(),
            );
            Ok(())
        })?;
        self.a.with_f32(|a| {
            let a = Matrix::new(a, rank, width);
            self.add_input_gradient(dx, du, a, tokens, mask);
            Ok(())
        })
    }

    fn add_input_gradient(
        &self,
        dx: &mut [f32],
        du: Matrix,
        a: Matrix,
        tokens: usize,
        mask: Option<MaskKey>,
    ) {
        let width = dx.len() / tokens.max(1);
        let Some(key) = self.mask_key(mask) else {
            let mut dx = MatrixMut::new(dx, tokens, width);
            multiply(&mut dx, true, 1.0, du, a, all_threads());
            return;
        };
        let mut through_mask = vec![0.0; dx.len()];
        let mut target = MatrixMut::new(&mut through_mask, tokens, width);
        multiply(&mut target, false, 1.0, du, a, all_threads());
        self.apply_mask(&mut through_mask, width, key);
        dx.par_chunks_mut(ROW_TILE * width)
            .zip(through_mask.par_chunks(ROW_TILE * width))
            .for_each(|(dx, part)| {
                vector::dispatch(
                    #[inline(always)]
                    || vector::add_scaled(dx, part, 1.0),
                );
            });
    }

    fn mask_key(&self, mask: Option<MaskKey>) -> Option<MaskKey> {
        mask.filter(|_| self.dropout > 0.0)
    }

    fn dropped<'a>(&self, x: &'a [f32], width: usize, mask: Option<MaskKey>) -> Cow<'a, [f32]> {
        match self.mask_key(mask) {
            None => Cow::Borrowed(x),
            Some(key) => {
                let mut x = x.to_vec();
                self.apply_mask(&mut x, width, key);
                Cow::Owned(x)
            }
        }
    }

    /// Inverted dropout: kept inputs are scaled up. The mask is drawn afresh each time, tile of rows by tile of rows.
    fn apply_mask(&self, x: &mut [f32], width: usize, key: MaskKey) {
        let keep_scale = (1.0 / (1.0 - self.dropout)) as f32;
        let threshold = (self.dropout * 4_294_967_296.0) as u32;
        x.par_chunks_mut(ROW_TILE * width)
            .enumerate()
            .for_each(|(tile, x)| {
                let words = [
                    STREAM_DROPOUT,
                    key.step,
                    u64::from(key.slot),
                    self.module,
                    tile as u64,
                ];
                let mut rng = CounterRng::new(key.seed, &words);
                for pair in x.chunks_mut(2) {
                    let draw = rng.next_u64();
                    for (x, draw) in pair.iter_mut().zip([draw as u32, (draw >> 32) as u32]) {
                        *x = if draw < threshold {
                            0.0
                        } else {
                            *x * keep_scale
                        };
                    }
                }
            });
    }
}
