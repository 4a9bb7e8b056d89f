//! The feed-forward half of a decoder layer: `x + down(swiglu(gate_up(norm(x))))`.

use common::model::Activation;

use super::residual::Residual;
use super::{Pass, norm_backward, norm_forward};
use crate::engine::buffer::Buffer;
use crate::engine::ops::element::Element;
use crate::engine::ops::projection::{LowRank, Projection};
use crate::engine::ops::rms_norm::RmsNorm;
use crate::engine::ops::swiglu;

/// The feed-forward half of a decoder layer.
pub struct Mlp {
    /// Of what it reads; none where that is the residual itself.
    pub norm: Option<RmsNorm>,
    /// The gate and up projections, side by side.
    pub gate_up: Projection,
    pub down: Projection,
    pub residual: Residual,
    pub activation: Activation,
}

/// What the backward pass needs beside the input. The norm and what `down` reads are computed again.
pub struct MlpActivations<E> {
    /// Output of the gate and up projections, `[tokens][2 * intermediate]`.
    gate_up: Buffer<E>,
    low_rank: LowRank<E>,
}

#[cfg(test)]
impl<E: Element> MlpActivations<E> {
    pub fn bytes(&self) -> usize {
        let Self {
            gate_up,
            low_rank: _,
        } = self;
        size_of_val(&gate_up[..])
    }
}

impl Mlp {
    /// Runs forward up to the last activation that backward reads, the output of gate and up. `x` is `[tokens][hidden]`.
    pub fn forward_saving<E: Element>(&self, x: &[f32], pass: Pass) -> MlpActivations<E> {
        let normed = self.normed::<E>(x, pass);
        let mut gate_up = pass.pool.take(pass.tokens() * self.gate_up.out());
        let low_rank = self.gate_up.forward(&normed, &mut gate_up, pass.context());
        MlpActivations { gate_up, low_rank }
    }

    /// Runs the rest of the forward pass, and returns the result, `[tokens][hidden]`.
    pub fn forward_output<E: Element>(
        &self,
        x: &[f32],
        activations: &MlpActivations<E>,
        pass: Pass,
    ) -> Buffer<f32> {
        let h = self.hidden(activations, pass);
        let mut y = pass.pool.take(x.len());
        self.residual.forward(&self.down, (x, &h[..]), &mut y, pass);
        y
    }

    /// Runs backward: turns `gradient`, that of the result, into that of `x`.
    pub fn backward<E: Element>(
        &self,
        x: &[f32],
        activations: MlpActivations<E>,
        gradient: &mut [f32],
        pass: Pass,
    ) {
        let d_normed = self.backward_to_normed(x, activations, gradient, pass);
        norm_backward(&self.norm, x, &d_normed, gradient);
    }

    /// The gradient of what gate and up read, from that of what is added to the residual.
    pub fn backward_to_normed<E: Element>(
        &self,
        x: &[f32],
        activations: MlpActivations<E>,
        gradient: &[f32],
        pass: Pass,
    ) -> Buffer<f32> {
        let d_gate_up = self.backward_to_gate_up(&activations, gradient, pass);
        let mut d_normed = pass.pool.take::<f32>(x.len());
        let du = self
            .gate_up
            .backward_input(&d_gate_up[..], &mut d_normed, pass.context());
        if self.gate_up.learns() {
            let normed = self.normed::<E>(x, pass);
            self.gate_up.backward_weights(
                &normed,
                &activations.low_rank,
                &d_gate_up,
                &du,
                pass.context(),
            );
        }
        d_normed
    }

    /// What `down` reads, `[tokens][intermediate]`.
    fn hidden<E: Element>(&self, activations: &MlpActivations<E>, pass: Pass) -> Buffer<E> {
        let mut h = pass.pool.take::<E>(activations.gate_up.len() / 2);
        let width = self.gate_up.out() / 2;
        swiglu::forward(&activations.gate_up, &mut h, width, self.activation);
        h
    }

    fn backward_to_gate_up<E: Element>(
        &self,
        activations: &MlpActivations<E>,
        gradient: &[f32],
        pass: Pass,
    ) -> Buffer<E> {
        let (pool, width) = (pass.pool, self.gate_up.out() / 2);
        let hidden = || self.hidden(activations, pass);
        let dy = self.residual.backward(&self.down, hidden, gradient, pass);
        let mut dh = pool.take(pass.tokens() * width);
        let du = self.down.backward_input(&dy[..], &mut dh, pass.context());
        let mut d_gate_up = pool.take(activations.gate_up.len());
        let mut h = pool.take::<E>(dh.len());
        let outs = (&mut d_gate_up[..], &mut h[..]);
        swiglu::backward(&activations.gate_up, &dh, outs, width, self.activation);
        if self.down.learns() {
            let u = self.down.low_rank(&h[..], pass.context());
            self.down.backward_weights(&h, &u, &dy, &du, pass.context());
        }
        d_gate_up
    }

    fn normed<E: Element>(&self, x: &[f32], pass: Pass) -> Buffer<E> {
        norm_forward(&self.norm, x, pass)
    }
}
