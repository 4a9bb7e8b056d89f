//! A feed-forward half that is dense and has experts beside that (Gemma 4): `x + norm(norm(mlp(x)) + norm(experts(x)))`.

use super::experts::{ExpertActivations, Experts};
use super::mlp::{Mlp, MlpActivations};
use super::{Pass, norm_backward};
use crate::engine::buffer::Buffer;
use crate::engine::ops::add_in_place;
use crate::engine::ops::element::Element;
use crate::engine::ops::rms_norm::RmsNorm;

/// A feed-forward half that is dense and has experts.
pub struct DenseAndExperts {
    /// The dense half, with the norm of what it gives.
    pub dense: Mlp,
    pub experts: Experts,
    /// Of what the experts give.
    pub experts_norm: RmsNorm,
    /// Of both together, before they are added to the residual.
    pub output_norm: RmsNorm,
}

/// What its backward pass needs beside the input. What both halves give is computed again.
pub struct BothActivations<E> {
    dense: MlpActivations<E>,
    pub(super) experts: ExpertActivations<E>,
}

#[cfg(test)]
impl<E: Element> BothActivations<E> {
    pub fn bytes(&self) -> usize {
        self.dense.bytes() + self.experts.bytes()
    }
}

impl DenseAndExperts {
    /// Bytes that are kept for each token; the few of adapters are not counted.
    pub fn kept_bytes(&self, element: usize) -> usize {
        self.dense.gate_up.out() * element + self.experts.kept_bytes(element)
    }

    /// Runs forward up to the last activations that backward reads. `x` is `[tokens][hidden]`.
    pub fn forward_saving<E: Element>(&self, x: &[f32], pass: Pass) -> BothActivations<E> {
        BothActivations {
            dense: self.dense.forward_saving(x, pass),
            experts: self.experts.forward_saving(x, pass),
        }
    }

    /// Runs the rest of the forward pass, and returns the result, `[tokens][hidden]`.
    pub fn forward_output<E: Element>(
        &self,
        x: &[f32],
        activations: &BothActivations<E>,
        pass: Pass,
    ) -> Buffer<f32> {
        let (sum, _) = self.sum(x.len(), activations, pass);
        let mut y = pass.pool.take::<f32>(x.len());
        self.output_norm.forward(&sum, &mut y[..]);
        add_in_place(&mut y, x);
        y
    }

    /// What both halves give, normed, and what the experts give.
    fn sum<E: Element>(
        &self,
        len: usize,
        activations: &BothActivations<E>,
        pass: Pass,
    ) -> (Buffer<f32>, Buffer<f32>) {
        let pool = pass.pool;
        let zeros = pool.zeroed::<f32>(len);
        let mut sum = self.dense.forward_output(&zeros, &activations.dense, pass);
        drop(zeros);
        let mut of_experts = pool.zeroed::<f32>(len);
        self.experts
            .forward_onto(&activations.experts, &mut of_experts, pass);
        let mut normed = pool.take::<f32>(len);
        self.experts_norm.forward(&of_experts, &mut normed[..]);
        add_in_place(&mut sum, &normed);
        (sum, of_experts)
    }

    /// Runs backward: turns `gradient`, that of the result, into that of `x`.
    pub fn backward<E: Element>(
        &self,
        x: &[f32],
        activations: BothActivations<E>,
        gradient: &mut [f32],
        pass: Pass,
    ) {
        let pool = pass.pool;
        let (sum, of_experts) = self.sum(x.len(), &activations, pass);
        let mut d_sum = pool.zeroed::<f32>(x.len());
        self.output_norm.backward(&sum, gradient, &mut d_sum);
        drop(sum);
        let mut d_experts = pool.zeroed::<f32>(x.len());
        self.experts_norm
            .backward(&of_experts, &d_sum, &mut d_experts);
        drop(of_experts);
        let read = self
            .experts
            .backward_to_input(x, activations.experts, &d_experts, pass);
        let dense = &self.dense;
        let d_normed = dense.backward_to_normed(x, activations.dense, &d_sum, pass);
        norm_backward(&dense.norm, x, &d_normed, gradient);
        self.experts.backward_to_residual(x, &read, gradient);
    }
}
