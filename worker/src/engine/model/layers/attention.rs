//! The attention half of a decoder layer: `x + output(attention(rope(qkv(norm(x)))))`.

use common::model::LayerKind;

use super::residual::Residual;
use super::{Pass, norm_backward, norm_forward};
use crate::engine::buffer::Buffer;
use crate::engine::ops::attention::{Attention, Saved};
use crate::engine::ops::element::Element;
use crate::engine::ops::projection::{LowRank, Projection};
use crate::engine::ops::rms_norm::RmsNorm;
use crate::engine::ops::rope::{HeadLayout, HeadNorms, Rope};
use crate::engine::params::Weight;

/// The attention half of a decoder layer.
pub struct AttentionBlock {
    /// Of what it reads; none where that is the residual itself.
    pub norm: Option<RmsNorm>,
    /// The projections of queries, keys and values, side by side.
    pub qkv: Projection,
    pub output: Projection,
    pub residual: Residual,
    pub layout: HeadLayout,
    pub head_norms: Option<HeadNorms>,
    pub kind: LayerKind,
    /// What scores are multiplied by.
    pub scale: f32,
    /// What they are limited to then.
    pub cap: Option<f32>,
    /// A logit of each head that stands for no token, where they have some.
    pub sinks: Option<Weight>,
}

/// What the backward pass needs beside the input. Norms and positions are computed again.
pub struct AttentionActivations<E> {
    /// Queries, keys and values as projected, without positions, `[tokens][layout.width()]`.
    qkv: Buffer<E>,
    qkv_low_rank: LowRank<E>,
    log_sums: Buffer<f32>,
    /// Output of the attention, before the output layer, `[tokens][heads * head_dim]`.
    context: Buffer<E>,
    output_low_rank: LowRank<E>,
}

#[cfg(test)]
impl<E: Element> AttentionActivations<E> {
    pub fn bytes(&self) -> usize {
        let Self {
            qkv,
            qkv_low_rank: _,
            log_sums,
            context,
            output_low_rank: _,
        } = self;
        size_of_val(&qkv[..]) + size_of_val(&log_sums[..]) + size_of_val(&context[..])
    }
}

impl AttentionBlock {
    /// Runs forward: `x` is `[tokens][hidden]`, and so is the result.
    pub fn forward<E: Element>(
        &self,
        x: &[f32],
        pass: Pass,
    ) -> (Buffer<f32>, AttentionActivations<E>) {
        let (tokens, pool) = (pass.tokens(), pass.pool);
        let mut qkv = pool.take(tokens * self.layout.width());
        let qkv_low_rank = {
            let normed = self.normed::<E>(x, pass);
            self.qkv.forward(&normed, &mut qkv, pass.context())
        };
        let mut log_sums = pool.take(tokens * self.layout.heads);
        let mut context = pool.take(tokens * self.layout.heads * self.layout.head_dim);
        {
            let mut rotated = pool.take::<E>(qkv.len());
            self.rope(pass).forward(&qkv, &mut rotated);
            let sinks = self.sinks.as_ref().map(Weight::read_f32);
            self.attention(sinks.as_deref(), pass).forward(
                &rotated,
                &mut context[..],
                &mut log_sums,
            );
        }
        let mut y = pool.take(x.len());
        let output_low_rank = self
            .residual
            .forward(&self.output, (x, &context[..]), &mut y, pass);
        let activations = AttentionActivations {
            qkv,
            qkv_low_rank,
            log_sums,
            context,
            output_low_rank,
        };
        (y, activations)
    }

    /// Runs forward over the last tokens of a text. `keys_values` has the keys and values of those before them,
    /// `[tokens][2 * key_value_heads * head_dim]`, and theirs are added.
    pub fn forward_last<E: Element>(
        &self,
        x: &[f32],
        keys_values: &mut Vec<E>,
        pass: Pass,
    ) -> Buffer<f32> {
        let (tokens, pool) = (pass.tokens(), pass.pool);
        let (width, queries) = (
            self.layout.width(),
            self.layout.heads * self.layout.head_dim,
        );
        let mut qkv = pool.take::<E>(tokens * width);
        self.qkv
            .forward(&self.normed::<E>(x, pass), &mut qkv, pass.context());
        let mut rotated = pool.take::<E>(qkv.len());
        self.rope(pass).forward(&qkv, &mut rotated);
        for row in rotated.chunks_exact(width) {
            keys_values.extend_from_slice(&row[queries..]);
        }
        let mut log_sums = pool.take(tokens * self.layout.heads);
        let mut context = pool.take::<E>(tokens * queries);
        let sinks = self.sinks.as_ref().map(Weight::read_f32);
        self.attention(sinks.as_deref(), pass).forward_last(
            &rotated,
            keys_values,
            &mut context,
            &mut log_sums,
        );
        let mut y = pool.take(x.len());
        self.residual
            .forward(&self.output, (x, &context[..]), &mut y, pass);
        y
    }

    /// Runs backward: turns `gradient`, that of the result, into that of `x` where that is `wanted`.
    pub fn backward<E: Element>(
        &self,
        x: &[f32],
        activations: AttentionActivations<E>,
        gradient: &mut [f32],
        wanted: bool,
        pass: Pass,
    ) {
        let d_qkv = self.backward_to_qkv(&activations, gradient, pass);
        let context = pass.context();
        let norm_learns = self.norm.as_ref().is_some_and(|n| n.weight.is_trainable());
        let du = match wanted || norm_learns {
            true => {
                let mut d_normed = pass.pool.take::<f32>(x.len());
                let du = self.qkv.backward_input(&d_qkv[..], &mut d_normed, context);
                norm_backward(&self.norm, x, &d_normed, gradient);
                du
            }
            false => self.qkv.backward_low_rank(&d_qkv[..], context),
        };
        if self.qkv.learns() {
            let normed = self.normed::<E>(x, pass);
            let u = &activations.qkv_low_rank;
            self.qkv.backward_weights(&normed, u, &d_qkv, &du, context);
        }
    }

    fn backward_to_qkv<E: Element>(
        &self,
        activations: &AttentionActivations<E>,
        gradient: &[f32],
        pass: Pass,
    ) -> Buffer<E> {
        let pool = pass.pool;
        let mut d_context = pool.take(activations.context.len());
        {
            let context = || {
                let mut copy = pool.take::<E>(activations.context.len());
                copy.copy_from_slice(&activations.context);
                copy
            };
            let dy = self
                .residual
                .backward(&self.output, context, gradient, pass);
            let du = self
                .output
                .backward_input(&dy[..], &mut d_context, pass.context());
            if self.output.learns() {
                let u = &activations.output_low_rank;
                self.output
                    .backward_weights(&activations.context, u, &dy, &du, pass.context());
            }
        }
        let mut d_rotated = pool.take(activations.qkv.len());
        {
            let mut rotated = pool.take::<E>(activations.qkv.len());
            self.rope(pass).forward(&activations.qkv, &mut rotated);
            let saved = Saved {
                qkv: &rotated,
                out: &activations.context[..],
                d_out: &d_context,
                log_sums: &activations.log_sums,
            };
            let sinks = self.sinks.as_ref().map(Weight::read_f32);
            let attention = self.attention(sinks.as_deref(), pass);
            attention.backward(&saved, &mut d_rotated);
            if let Some(sinks) = &self.sinks {
                sinks.add_gradient(|_, d_sinks, accumulate| {
                    attention.backward_sinks(&saved, d_sinks, accumulate);
                });
            }
        }
        let mut d_qkv = pool.take(activations.qkv.len());
        self.rope(pass)
            .backward(&activations.qkv[..], &d_rotated, &mut d_qkv);
        d_qkv
    }

    fn normed<E: Element>(&self, x: &[f32], pass: Pass) -> Buffer<E> {
        norm_forward(&self.norm, x, pass)
    }

    fn rope<'a>(&'a self, pass: Pass<'a>) -> Rope<'a> {
        Rope {
            layout: self.layout,
            norms: self.head_norms.as_ref(),
            rows: &pass.ropes.rows,
            table: pass.ropes.tables.of(self.kind.rotation),
        }
    }

    fn attention<'a>(&'a self, sinks: Option<&'a [f32]>, pass: Pass<'a>) -> Attention<'a> {
        Attention {
            layout: self.layout,
            segments: pass.segments.through(self.kind.window),
            scale: self.scale,
            cap: self.cap,
            sinks,
        }
    }
}
