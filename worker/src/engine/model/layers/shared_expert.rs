//! The expert that every token goes through beside its own, weighted by a gate: `sigmoid(gate(x)) · down(swiglu(gate_up(x)))`.

use common::model::Activation;

use super::Pass;
use crate::engine::buffer::Buffer;
use crate::engine::ops::element::Element;
use crate::engine::ops::projection::{LowRank, Projection};
use crate::engine::ops::token_rows::{add_weighted, dots, gather_rounded, scale};
use crate::engine::ops::vector::sigmoid;
use crate::engine::ops::{add_in_place, round_into, swiglu};

/// The expert that every token goes through.
pub struct SharedExpert {
    /// The gate and up projections, side by side.
    pub gate_up: Projection,
    pub down: Projection,
    /// What the result is weighted by, one number for each token.
    pub gate: Projection,
    pub activation: Activation,
}

/// What the backward pass needs beside the input. What `down` reads and gives is computed again.
pub struct SharedActivations<E> {
    /// Output of the gate and up projections, `[tokens][2 * intermediate]`.
    gate_up: Buffer<E>,
    gate_up_low_rank: LowRank<E>,
    /// Weight of each token's result.
    weights: Buffer<f32>,
    gate_low_rank: LowRank<E>,
}

#[cfg(test)]
impl<E: Element> SharedActivations<E> {
    pub fn bytes(&self) -> usize {
        size_of_val(&self.gate_up[..]) + size_of_val(&self.weights[..])
    }
}

impl SharedExpert {
    /// Bytes that are kept for each token; the few of adapters are not counted.
    pub fn kept_bytes(&self, element: usize) -> usize {
        self.gate_up.out() * element + size_of::<f32>()
    }

    /// Runs forward up to the last activations that backward reads. `x` is `[tokens][hidden]`.
    pub fn forward_saving<E: Element>(&self, x: &[E], pass: Pass) -> SharedActivations<E> {
        let context = pass.context();
        let mut gate_up = pass.pool.take(pass.tokens() * self.gate_up.out());
        let gate_up_low_rank = self.gate_up.forward(x, &mut gate_up, context);
        let mut weights = pass.pool.take::<f32>(pass.tokens());
        let gate_low_rank = self.gate.forward_wide(x, &mut weights, context);
        for weight in weights.iter_mut() {
            *weight = sigmoid(*weight);
        }
        SharedActivations {
            gate_up,
            gate_up_low_rank,
            weights,
            gate_low_rank,
        }
    }

    /// Adds the result to `y`, `[tokens][hidden]`.
    pub fn forward_onto<E: Element>(
        &self,
        activations: &SharedActivations<E>,
        y: &mut [f32],
        pass: Pass,
    ) {
        let (_, results, _) = self.results(activations, pass);
        let hidden = self.down.out();
        let weights = &activations.weights;
        add_weighted(y, &all_tokens(pass), &results, weights, hidden);
    }

    /// Runs backward: adds to the gradient of what it reads, `x`, from that of the result.
    pub fn backward<E: Element>(
        &self,
        x: &[E],
        activations: SharedActivations<E>,
        gradient: &[f32],
        dx: &mut [f32],
        pass: Pass,
    ) {
        let (pool, context) = (pass.pool, pass.context());
        let hidden = self.down.out();
        let (mut h, results, u) = self.results(&activations, pass);
        let weights = &activations.weights;
        let mut d_weights = pool.take::<f32>(pass.tokens());
        dots(gradient, &results[..], &mut d_weights, hidden);
        drop(results);
        let mut dy = pool.take::<E>(gradient.len());
        gather_rounded(gradient, &all_tokens(pass), &mut dy, hidden);
        scale(&mut dy[..], weights, hidden);
        let mut dh = pool.take::<f32>(h.len());
        let du = self.down.backward_input(&dy[..], &mut dh, context);
        let mut d_gate_up = pool.take::<E>(activations.gate_up.len());
        let outs = (&mut d_gate_up[..], &mut h[..]);
        let width = self.gate_up.out() / 2;
        swiglu::backward(&activations.gate_up, &dh, outs, width, self.activation);
        if self.down.learns() {
            self.down.backward_weights(&h, &u, &dy, &du, context);
        }
        // The slope of the sigmoid.
        for (d, weight) in d_weights.iter_mut().zip(weights.iter()) {
            *d *= weight * (1.0 - weight);
        }
        let mut d_gate = pool.take::<E>(d_weights.len());
        round_into(&d_weights, &mut d_gate);
        let SharedActivations {
            gate_up_low_rank,
            gate_low_rank,
            ..
        } = activations;
        for (projection, u, dy) in [
            (&self.gate_up, gate_up_low_rank, d_gate_up),
            (&self.gate, gate_low_rank, d_gate),
        ] {
            let mut through = pool.take::<f32>(dx.len());
            let du = projection.backward_input(&dy[..], &mut through, context);
            add_in_place(dx, &through);
            if projection.learns() {
                projection.backward_weights(x, &u, &dy, &du, context);
            }
        }
    }

    /// What `down` reads, `[tokens][intermediate]`, and what it gives, `[tokens][hidden]`, with what its adapter needs.
    fn results<E: Element>(
        &self,
        activations: &SharedActivations<E>,
        pass: Pass,
    ) -> (Buffer<E>, Buffer<f32>, LowRank<E>) {
        let width = self.gate_up.out() / 2;
        let mut h = pass.pool.take::<E>(pass.tokens() * width);
        swiglu::forward(&activations.gate_up, &mut h, width, self.activation);
        let mut results = pass.pool.take::<f32>(pass.tokens() * self.down.out());
        let u = self.down.forward_wide(&h[..], &mut results, pass.context());
        (h, results, u)
    }
}

fn all_tokens(pass: Pass) -> Vec<u32> {
    (0..pass.tokens() as u32).collect()
}
