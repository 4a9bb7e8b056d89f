//! What all layers have of each token beside the residual (Gemma 4's per-layer embeddings): a row of an embedding of theirs, and what
//! the token's own embedding is projected to, `(scale · row + norm(h^-1/2 · projection(x))) / sqrt(2)`.
//!
//! Enters: tokens and their embeddings. Leaves: `[layers][tokens][width]`, and back the gradients of what is trained.

use rayon::prelude::*;

use crate::engine::buffer::Buffer;
use crate::engine::ops::element::Element;
use crate::engine::ops::embedding::Embedding;
use crate::engine::ops::projection::{Context, Projection};
use crate::engine::ops::rms_norm::RmsNorm;
use crate::engine::ops::{add_in_place, round_into, scale_in_place};

/// What the layers' own inputs are computed from.
pub struct OwnInputs {
    /// A row of each token, in which the columns of all layers lie side by side.
    pub embedding: Embedding,
    /// What its rows are multiplied by.
    pub scale: f32,
    /// From the width of the residual to the columns of all layers.
    pub projection: Projection,
    /// Of the columns of each layer.
    pub norm: RmsNorm,
    /// Columns of a layer.
    pub width: usize,
    pub layers: usize,
}

impl OwnInputs {
    /// Whether anything of it is trained.
    pub fn is_trained(&self) -> bool {
        self.embedding.is_trained() || self.projection.learns() || self.norm.weight.is_trainable()
    }

    fn columns(&self) -> usize {
        self.layers * self.width
    }

    /// The inputs of all layers, `[layers][tokens][width]`, from the embeddings `x`, `[tokens][hidden]`.
    pub fn forward<E: Element>(&self, ids: &[u32], x: &[f32], context: Context) -> Buffer<f32> {
        let pool = context.pool;
        let mut sum = self.projected::<E>(x, context);
        {
            let mut normed = pool.take::<f32>(sum.len());
            self.norm.forward(&sum, &mut normed[..]);
            self.embedding.forward(ids, &mut sum, pool);
            scale_in_place(&mut sum, self.scale);
            add_in_place(&mut sum, &normed);
        }
        let mut inputs = pool.take::<f32>(sum.len());
        let (width, columns) = (self.width, self.columns());
        let of_layers = inputs.par_chunks_mut((ids.len() * width).max(1));
        of_layers.enumerate().for_each(|(layer, inputs)| {
            let rows = sum.chunks_exact(columns);
            for (to, row) in inputs.chunks_exact_mut(width).zip(rows) {
                let from = &row[layer * width..][..width];
                for (to, from) in to.iter_mut().zip(from) {
                    *to = from * HALF_ROOT;
                }
            }
        });
        inputs
    }

    /// Hands over the gradients of what is trained, from that of the inputs; and adds that of `x` to `dx` where it is wanted.
    pub fn backward<E: Element>(
        &self,
        (ids, x): (&[u32], &[f32]),
        d_inputs: &[f32],
        dx: Option<&mut [f32]>,
        context: Context,
    ) {
        let pool = context.pool;
        let (width, columns) = (self.width, self.columns());
        let mut d_sum = pool.take::<f32>(d_inputs.len());
        d_sum
            .par_chunks_mut(columns)
            .enumerate()
            .for_each(|(token, row)| {
                for (layer, to) in row.chunks_exact_mut(width).enumerate() {
                    let from = &d_inputs[(layer * ids.len() + token) * width..][..width];
                    for (to, from) in to.iter_mut().zip(from) {
                        *to = from * HALF_ROOT;
                    }
                }
            });
        let mut d_projected = pool.zeroed::<f32>(d_sum.len());
        let projected = self.projected::<E>(x, context);
        self.norm.backward(&projected, &d_sum, &mut d_projected);
        drop(projected);
        scale_in_place(&mut d_sum, self.scale);
        self.embedding.backward(ids, &d_sum, pool);
        drop(d_sum);
        let learns = self.projection.learns();
        if !learns && dx.is_none() {
            return;
        }
        scale_in_place(&mut d_projected, self.factor());
        let mut dy = pool.take::<E>(d_projected.len());
        round_into(&d_projected, &mut dy);
        drop(d_projected);
        let mut through = pool.take::<f32>(x.len());
        let du = self
            .projection
            .backward_input(&dy[..], &mut through, context);
        if let Some(dx) = dx {
            add_in_place(dx, &through);
        }
        if learns {
            let mut read = pool.take::<E>(x.len());
            round_into(x, &mut read);
            let u = self.projection.low_rank(&read[..], context);
            self.projection
                .backward_weights(&read, &u, &dy, &du, context);
        }
    }

    /// What the embeddings are projected to, times the factor, `[tokens][columns]`.
    fn projected<E: Element>(&self, x: &[f32], context: Context) -> Buffer<f32> {
        let pool = context.pool;
        let mut read = pool.take::<E>(x.len());
        round_into(x, &mut read);
        let mut projected = pool.take::<f32>(context.tokens * self.columns());
        self.projection
            .forward_wide(&read[..], &mut projected, context);
        scale_in_place(&mut projected, self.factor());
        projected
    }

    /// `hidden ^ -1/2`
    fn factor(&self) -> f32 {
        let hidden = self.projection.0.first();
        let hidden = hidden.map_or(1, |linear| linear.weight.matrix_dims().1);
        1.0 / (hidden as f64).sqrt() as f32
    }
}

/// `2 ^ -1/2`
const HALF_ROOT: f32 = std::f32::consts::FRAC_1_SQRT_2;
