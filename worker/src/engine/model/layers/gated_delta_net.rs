//! Linear attention in place of the attention half of a decoder layer (gated DeltaNet; Yang et al., 2024):
//! `x + output(gated_norm(delta_rule(conv(qkv(norm(x)))), z(norm(x))))`. What a head knows of the tokens before is a state of fixed
//! size, which begins anew with each segment, as does what the convolution reads.

use std::ops::Range;

use super::residual::Residual;
use super::{Pass, norm_backward, norm_forward};
use crate::engine::buffer::Buffer;
use crate::engine::ops::causal_conv::CausalConv;
use crate::engine::ops::delta_gates::{DeltaGates, Gates};
use crate::engine::ops::delta_rule::{DeltaHeads, DeltaRule, Inputs};
use crate::engine::ops::element::Element;
use crate::engine::ops::gated_norm::GatedNorm;
use crate::engine::ops::key_groups::KeyGroups;
use crate::engine::ops::matrix::View;
use crate::engine::ops::projection::{LowRank, Projection};
use crate::engine::ops::rms_norm::RmsNorm;

/// Linear attention in place of the attention half of a decoder layer.
pub struct GatedDeltaNet {
    /// Of what it reads; none where that is the residual itself.
    pub norm: Option<RmsNorm>,
    /// The projections of queries, keys and values, of the gates of the output, and of how much is written and kept, side by side.
    pub input: Projection,
    /// What puts these into that order, where the projections have them in another.
    pub groups: Option<KeyGroups>,
    pub heads: DeltaHeads,
    pub conv: CausalConv,
    pub gates: DeltaGates,
    pub output_norm: GatedNorm,
    pub output: Projection,
    pub residual: Residual,
}

/// What the backward pass needs beside the input. All else is computed again.
pub struct DeltaActivations<E> {
    /// What was projected, `[tokens][input.out()]`.
    projected: Buffer<E>,
    low_rank: LowRank<E>,
    /// What was read of the states, `[tokens][heads.values()]`.
    read: Buffer<E>,
    output_low_rank: LowRank<E>,
}

/// What is known of the tokens before, of a text that goes on.
#[derive(Default)]
pub struct DeltaState<E> {
    /// What was projected of the last tokens for the convolution, `[at most its reach][heads.width()]`.
    convolved: Vec<E>,
    /// The states of all heads; empty where no token was.
    states: Vec<f32>,
}

#[cfg(test)]
impl<E: Element> DeltaActivations<E> {
    pub fn bytes(&self) -> usize {
        let Self {
            projected,
            low_rank: _,
            read,
            output_low_rank: _,
        } = self;
        size_of_val(&projected[..]) + size_of_val(&read[..])
    }
}

/// What the delta rule reads, or its gradients.
struct RuleBuffers {
    qkv: Buffer<f32>,
    written: Buffer<f32>,
    kept: Buffer<f32>,
}

impl RuleBuffers {
    fn inputs(&self) -> Inputs<'_> {
        Inputs {
            qkv: &self.qkv,
            written: &self.written,
            kept: &self.kept,
        }
    }
}

impl GatedDeltaNet {
    /// Bytes that are kept for each token; the few of adapters are not counted.
    pub fn kept_bytes(&self, element: usize) -> usize {
        (self.input.out() + self.heads.values()) * element
    }

    /// Runs forward: `x` is `[tokens][hidden]`, and so is the result.
    pub fn forward<E: Element>(&self, x: &[f32], pass: Pass) -> (Buffer<f32>, DeltaActivations<E>) {
        let (projected, low_rank) = self.project::<E>(x, pass);
        let mut read = pass.pool.take::<E>(pass.tokens() * self.heads.values());
        {
            let columns = self.columns(&projected, pass);
            let buffers = self.rule_buffers(columns, columns.qkv, pass);
            let segments = segments(&pass.batch.positions);
            self.rule(&segments).forward(buffers.inputs(), &mut read);
        }
        let mut y = pass.pool.take(x.len());
        let output_low_rank = {
            let h = self.gated(&projected, &read, pass);
            self.residual
                .forward(&self.output, (x, &h[..]), &mut y, pass)
        };
        let activations = DeltaActivations {
            projected,
            low_rank,
            read,
            output_low_rank,
        };
        (y, activations)
    }

    /// Runs forward over the last tokens of a text, from what is known of those before them.
    pub fn forward_last<E: Element>(
        &self,
        x: &[f32],
        state: &mut DeltaState<E>,
        pass: Pass,
    ) -> Buffer<f32> {
        let (projected, _) = self.project::<E>(x, pass);
        let columns = self.columns(&projected, pass);
        let width = self.heads.width();
        let known = std::mem::take(&mut state.convolved);
        let rows = (0..pass.tokens()).flat_map(|token| columns.qkv.row(token));
        let all: Vec<E> = known.iter().chain(rows).copied().collect();
        let mut read = pass.pool.take::<E>(pass.tokens() * self.heads.values());
        {
            let convolved = View::new(&all[..], all.len() / width, width);
            let buffers = self.rule_buffers(columns, convolved, pass);
            let states = self.heads.value_heads * self.heads.key_dim * self.heads.value_dim;
            state.states.resize(states, 0.0);
            let text = 0..pass.tokens();
            self.rule(std::slice::from_ref(&text)).forward_last(
                buffers.inputs(),
                &mut state.states,
                &mut read,
            );
        }
        let first = all.len().saturating_sub(self.conv.reach() * width);
        state.convolved = all[first..].to_vec();
        let mut y = pass.pool.take(x.len());
        let h = self.gated(&projected, &read, pass);
        self.residual
            .forward(&self.output, (x, &h[..]), &mut y, pass);
        y
    }

    /// Runs backward: turns `gradient`, that of the result, into that of `x` where that is `wanted`.
    pub fn backward<E: Element>(
        &self,
        x: &[f32],
        activations: DeltaActivations<E>,
        gradient: &mut [f32],
        wanted: bool,
        pass: Pass,
    ) {
        let d_projected = self.backward_to_projected(&activations, gradient, pass);
        let context = pass.context();
        let norm_learns = self.norm.as_ref().is_some_and(|n| n.weight.is_trainable());
        let du = match wanted || norm_learns {
            true => {
                let mut d_normed = pass.pool.take::<f32>(x.len());
                let du = self
                    .input
                    .backward_input(&d_projected[..], &mut d_normed, context);
                norm_backward(&self.norm, x, &d_normed, gradient);
                du
            }
            false => self.input.backward_low_rank(&d_projected[..], context),
        };
        if self.input.learns() {
            let normed = norm_forward::<E>(&self.norm, x, pass);
            let u = &activations.low_rank;
            self.input
                .backward_weights(&normed, u, &d_projected, &du, context);
        }
    }

    /// Computes the gradient of what the projections gave, in their order.
    fn backward_to_projected<E: Element>(
        &self,
        activations: &DeltaActivations<E>,
        gradient: &[f32],
        pass: Pass,
    ) -> Buffer<E> {
        let (pool, stride) = (pass.pool, self.input.out());
        let DeltaActivations {
            projected, read, ..
        } = activations;
        let mut d_read = pool.take(read.len());
        {
            let gated = || self.gated(projected, read, pass);
            let dy = self.residual.backward(&self.output, gated, gradient, pass);
            let du = self
                .output
                .backward_input(&dy[..], &mut d_read, pass.context());
            if self.output.learns() {
                let u = &activations.output_low_rank;
                self.output
                    .backward_weights(&gated(), u, &dy, &du, pass.context());
            }
        }
        let mut d_projected = pool.take::<E>(projected.len());
        let columns = self.columns(projected, pass);
        let [z, gates] = self.first_columns();
        self.output_norm
            .backward(read, columns.z, &mut d_read, (&mut d_projected, stride, z));
        let mut gradients = self.take_rule_buffers(pass);
        {
            let buffers = self.rule_buffers(columns, columns.qkv, pass);
            let segments = segments(&pass.batch.positions);
            let d_gates = Gates {
                written: &mut gradients.written[..],
                kept: &mut gradients.kept[..],
            };
            let rule = self.rule(&segments);
            rule.backward(buffers.inputs(), &d_read, &mut gradients.qkv, d_gates);
        }
        drop(d_read);
        let d_gates = Gates {
            written: &gradients.written[..],
            kept: &gradients.kept[..],
        };
        self.gates
            .backward(columns.gates, d_gates, (&mut d_projected, stride, gates));
        let positions = &pass.batch.positions;
        let to = (&mut d_projected[..], stride);
        self.conv
            .backward(columns.qkv, positions, &mut gradients.qkv, to);
        if let Some(groups) = self.groups {
            groups.join(&mut d_projected[..]);
        }
        d_projected
    }

    fn project<E: Element>(&self, x: &[f32], pass: Pass) -> (Buffer<E>, LowRank<E>) {
        let mut projected = pass.pool.take(pass.tokens() * self.input.out());
        let normed = norm_forward::<E>(&self.norm, x, pass);
        let low_rank = self.input.forward(&normed, &mut projected, pass.context());
        if let Some(groups) = self.groups {
            groups.split(&mut projected[..]);
        }
        (projected, low_rank)
    }

    /// Columns of what was projected at which the gates of the output begin, and the gates of the rule.
    fn first_columns(&self) -> [usize; 2] {
        let z = self.heads.width();
        [z, z + self.heads.values()]
    }

    fn columns<'a, E: Element>(&self, projected: &'a [E], pass: Pass) -> Columns<'a, E> {
        let all = View::new(projected, pass.tokens(), self.input.out());
        let [z, gates] = self.first_columns();
        Columns {
            qkv: all.part(0, z),
            z: all.part(z, gates - z),
            gates: all.part(gates, 2 * self.heads.value_heads),
        }
    }

    fn take_rule_buffers(&self, pass: Pass) -> RuleBuffers {
        let gates = pass.tokens() * self.heads.value_heads;
        RuleBuffers {
            qkv: pass.pool.take(pass.tokens() * self.heads.width()),
            written: pass.pool.take(gates),
            kept: pass.pool.take(gates),
        }
    }

    /// Computes what the rule reads; `convolved` has the rows that the convolution does.
    fn rule_buffers<E: Element>(
        &self,
        columns: Columns<E>,
        convolved: View<E>,
        pass: Pass,
    ) -> RuleBuffers {
        let mut buffers = self.take_rule_buffers(pass);
        self.conv
            .forward(convolved, &pass.batch.positions, &mut buffers.qkv);
        let gates = Gates {
            written: &mut buffers.written[..],
            kept: &mut buffers.kept[..],
        };
        self.gates.forward(columns.gates, gates);
        buffers
    }

    fn rule<'a>(&self, segments: &'a [Range<usize>]) -> DeltaRule<'a> {
        DeltaRule {
            heads: self.heads,
            segments,
        }
    }

    /// What the output layer reads, `[tokens][heads.values()]`.
    fn gated<E: Element>(&self, projected: &[E], read: &[E], pass: Pass) -> Buffer<E> {
        let mut gated = pass.pool.take::<E>(read.len());
        let gates = self.columns(projected, pass).z;
        self.output_norm.forward(read, gates, &mut gated);
        gated
    }
}

/// What was projected, by what it is for.
#[derive(Clone, Copy)]
struct Columns<'a, E> {
    qkv: View<'a, E>,
    z: View<'a, E>,
    gates: View<'a, E>,
}

/// The tokens of each segment: positions grow within one.
fn segments(positions: &[u32]) -> Vec<Range<usize>> {
    let mut start = 0;
    let texts = positions.chunk_by(|position, next| next > position);
    let segments = texts.map(|text| {
        let first = start;
        start += text.len();
        first..start
    });
    segments.collect()
}
