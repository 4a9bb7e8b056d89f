//! The attention half of a decoder layer: `x + output(attention(rope(qkv(norm(x)))))`, where some models have a gate in front of the
//! output.

use common::model::LayerKind;

use super::layer_state::LayerState;
use super::residual::Residual;
use super::shared_keys::{KeySource, SharedKeys};
use super::{Pass, norm_backward, norm_forward};
use crate::engine::buffer::Buffer;
use crate::engine::ops::attention::{Attention, Saved};
use crate::engine::ops::element::Element;
use crate::engine::ops::output_gate;
use crate::engine::ops::projection::{LowRank, Projection};
use crate::engine::ops::rms_norm::RmsNorm;
use crate::engine::ops::rope::{HeadLayout, HeadNorms, Rope, Values};
use crate::engine::params::Weight;

/// The attention half of a decoder layer.
pub struct AttentionBlock {
    /// The number of the layer.
    pub layer: usize,
    pub keys: KeySource,
    /// Of what it reads; none where that is the residual itself.
    pub norm: Option<RmsNorm>,
    /// The projections of queries, keys and values, side by side; of gates behind the query of each head, where there are some.
    pub qkv: Projection,
    /// Whether what attention gives goes through gates.
    pub gated: bool,
    pub output: Projection,
    pub residual: Residual,
    pub layout: HeadLayout,
    pub head_norms: Option<HeadNorms>,
    pub values: Values,
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
    /// Queries, keys and values as projected, without positions: `[tokens][layout.width()]`, or fewer columns where values are keys or
    /// both are another layer's.
    qkv: Buffer<E>,
    qkv_low_rank: LowRank<E>,
    /// As projected, `[tokens][heads * head_dim]`.
    gates: Option<Buffer<E>>,
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
            gates,
            log_sums,
            context,
            output_low_rank: _,
        } = self;
        let gates = gates.as_ref().map_or(0, |gates| size_of_val(&gates[..]));
        size_of_val(&qkv[..]) + gates + size_of_val(&log_sums[..]) + size_of_val(&context[..])
    }
}

impl AttentionBlock {
    /// Bytes that are kept for each token; the few of adapters are not counted.
    pub fn kept_bytes(&self, element: usize) -> usize {
        let context = self.layout.heads * self.layout.head_dim;
        self.layout.heads * size_of::<f32>() + (self.qkv.out() + context) * element
    }

    /// Runs forward: `x` is `[tokens][hidden]`, and so is the result.
    pub fn forward<E: Element>(
        &self,
        x: &[f32],
        shared: &mut SharedKeys<E>,
        pass: Pass,
    ) -> (Buffer<f32>, AttentionActivations<E>) {
        let (tokens, pool) = (pass.tokens(), pass.pool);
        let (qkv, gates, qkv_low_rank) = self.project(x, pass);
        let mut log_sums = pool.take(tokens * self.layout.heads);
        let mut context = pool.take(tokens * self.layout.heads * self.layout.head_dim);
        {
            let rotated = self.rotated(&qkv, shared, pass);
            if self.keys == KeySource::Lent {
                shared.lend(self.layer, &rotated, self.layout, pool);
            }
            let sinks = self.sinks.as_ref().map(Weight::read_f32);
            self.attention(sinks.as_deref(), pass).forward(
                &rotated,
                &mut context[..],
                &mut log_sums,
            );
        }
        let mut y = pool.take(x.len());
        let output_low_rank = {
            let opened = open(&context, &gates, pass);
            let h = opened.as_ref().unwrap_or(&context);
            self.residual
                .forward(&self.output, (x, &h[..]), &mut y, pass)
        };
        let activations = AttentionActivations {
            qkv,
            qkv_low_rank,
            gates,
            log_sums,
            context,
            output_low_rank,
        };
        (y, activations)
    }

    /// Queries, keys and values as the attention reads them, `[tokens][layout.width()]`.
    fn rotated<E: Element>(&self, qkv: &[E], shared: &SharedKeys<E>, pass: Pass) -> Buffer<E> {
        let mut rotated = pass.pool.take::<E>(pass.tokens() * self.layout.width());
        self.rope(pass).forward(qkv, &mut rotated);
        if let KeySource::Borrowed(lender) = self.keys {
            shared.borrow(lender, &mut rotated, self.layout);
        }
        rotated
    }

    /// Queries, keys and values as projected, and gates, `[tokens][heads * head_dim]`.
    fn project<E: Element>(
        &self,
        x: &[f32],
        pass: Pass,
    ) -> (Buffer<E>, Option<Buffer<E>>, LowRank<E>) {
        let (tokens, pool) = (pass.tokens(), pass.pool);
        let mut projected = pool.take(tokens * self.qkv.out());
        let low_rank = {
            let normed = self.normed::<E>(x, pass);
            self.qkv.forward(&normed, &mut projected, pass.context())
        };
        if !self.gated {
            return (projected, None, low_rank);
        }
        let mut qkv = pool.take(tokens * self.layout.width());
        let mut gates = pool.take(tokens * output_gate::gates_width(self.layout));
        output_gate::split(&projected, self.layout, (&mut qkv, &mut gates));
        (qkv, Some(gates), low_rank)
    }

    /// Runs forward over the last tokens of a text. `states` are those of all layers, of which this one's has the keys and values of the
    /// tokens before them, and theirs are added.
    pub fn forward_last<E: Element>(
        &self,
        x: &[f32],
        states: &mut [LayerState<E>],
        pass: Pass,
    ) -> Buffer<f32> {
        let (tokens, pool) = (pass.tokens(), pass.pool);
        let (width, queries) = (self.layout.width(), self.layout.queries());
        let (qkv, gates, _) = self.project::<E>(x, pass);
        let mut rotated = pool.take::<E>(tokens * width);
        self.rope(pass).forward(&qkv, &mut rotated);
        let keys_values = match self.keys {
            KeySource::Borrowed(lender) => &states[lender].keys_values,
            KeySource::Own | KeySource::Lent => {
                let own = &mut states[self.layer].keys_values;
                for row in rotated.chunks_exact(width) {
                    own.extend_from_slice(&row[queries..]);
                }
                own
            }
        };
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
        let opened = open(&context, &gates, pass);
        let h = opened.as_ref().unwrap_or(&context);
        self.residual
            .forward(&self.output, (x, &h[..]), &mut y, pass);
        y
    }

    /// Runs backward: turns `gradient`, that of the result, into that of `x` where that is `wanted`.
    pub fn backward<E: Element>(
        &self,
        x: &[f32],
        activations: AttentionActivations<E>,
        gradient: &mut [f32],
        wanted: bool,
        (shared, pass): (&mut SharedKeys<E>, Pass),
    ) {
        let d_qkv = self.backward_to_qkv(&activations, gradient, (shared, pass));
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
        (shared, pass): (&mut SharedKeys<E>, Pass),
    ) -> Buffer<E> {
        let pool = pass.pool;
        let mut d_context = self.backward_to_context(activations, gradient, pass);
        let d_gates = activations.gates.as_ref().map(|gates| {
            let mut d_gates = pool.take::<E>(gates.len());
            output_gate::backward(&activations.context, gates, &mut d_context, &mut d_gates);
            d_gates
        });
        let d_rotated = self.backward_to_rotated(activations, &d_context, (shared, pass));
        let mut d_qkv = pool.take(activations.qkv.len());
        self.rope(pass)
            .backward(&activations.qkv[..], &d_rotated, &mut d_qkv);
        let Some(d_gates) = d_gates else {
            return d_qkv;
        };
        let mut d_projected = pool.take(pass.tokens() * self.qkv.out());
        output_gate::join((&d_qkv, &d_gates), self.layout, &mut d_projected);
        d_projected
    }

    /// Goes backward through the output layer, to what goes into it.
    fn backward_to_context<E: Element>(
        &self,
        activations: &AttentionActivations<E>,
        gradient: &[f32],
        pass: Pass,
    ) -> Buffer<f32> {
        let pool = pass.pool;
        let mut d_context = pool.take(activations.context.len());
        {
            let opened = || open(&activations.context, &activations.gates, pass);
            let context = || {
                opened().unwrap_or_else(|| {
                    let mut copy = pool.take::<E>(activations.context.len());
                    copy.copy_from_slice(&activations.context);
                    copy
                })
            };
            let dy = self
                .residual
                .backward(&self.output, context, gradient, pass);
            let du = self
                .output
                .backward_input(&dy[..], &mut d_context, pass.context());
            if self.output.learns() {
                let u = &activations.output_low_rank;
                let opened = opened();
                let h = opened.as_ref().unwrap_or(&activations.context);
                self.output.backward_weights(h, u, &dy, &du, pass.context());
            }
        }
        d_context
    }

    /// Goes backward through the attention, to queries, keys and values as it reads them.
    fn backward_to_rotated<E: Element>(
        &self,
        activations: &AttentionActivations<E>,
        d_context: &[f32],
        (shared, pass): (&mut SharedKeys<E>, Pass),
    ) -> Buffer<f32> {
        let pool = pass.pool;
        let rotated = self.rotated(&activations.qkv, shared, pass);
        let mut d_rotated = pool.take(rotated.len());
        let saved = Saved {
            qkv: &rotated,
            out: &activations.context[..],
            d_out: d_context,
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
        match self.keys {
            KeySource::Own => {}
            KeySource::Lent => shared.take_back(self.layer, &mut d_rotated, self.layout),
            KeySource::Borrowed(lender) => {
                shared.give_back(lender, &d_rotated, self.layout, pool);
            }
        }
        d_rotated
    }

    fn normed<E: Element>(&self, x: &[f32], pass: Pass) -> Buffer<E> {
        norm_forward(&self.norm, x, pass)
    }

    fn rope<'a>(&'a self, pass: Pass<'a>) -> Rope<'a> {
        Rope {
            layout: self.layout,
            norms: self.head_norms.as_ref(),
            values: self.values,
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

/// What the output layer reads where there are gates.
fn open<E: Element>(context: &[E], gates: &Option<Buffer<E>>, pass: Pass) -> Option<Buffer<E>> {
    let gates = gates.as_ref()?;
    let mut opened = pass.pool.take::<E>(context.len());
    output_gate::forward(context, gates, &mut opened);
    Some(opened)
}
