//! What a layer mixes in of its own input of each token (Gemma 4): `x + norm(output(gelu(gate(x)) · input))`.

use common::model::Activation;
use rayon::prelude::*;

use super::Pass;
use super::residual::Residual;
use crate::engine::buffer::Buffer;
use crate::engine::ops::element::Element;
use crate::engine::ops::projection::{LowRank, Projection};
use crate::engine::ops::{ROW_TILE, add_in_place, round_into, swiglu};

/// The part of a layer that mixes in its own input.
pub struct OwnInput {
    /// The number of the layer.
    pub layer: usize,
    pub gate: Projection,
    pub output: Projection,
    pub residual: Residual,
    pub activation: Activation,
}

/// What its backward pass needs. What `output` reads is computed again.
pub struct OwnInputActivations<E> {
    /// The residual that the input is mixed into, `[tokens][hidden]`.
    x: Buffer<f32>,
    /// As projected, `[tokens][width]`.
    gate: Buffer<E>,
    low_rank: LowRank<E>,
}

#[cfg(test)]
impl<E: Element> OwnInputActivations<E> {
    pub fn bytes(&self) -> usize {
        size_of_val(&self.x[..]) + size_of_val(&self.gate[..])
    }
}

impl OwnInput {
    /// Bytes that are kept for each token; the few of adapters are not counted.
    pub fn kept_bytes(&self, element: usize) -> usize {
        self.output.out() * size_of::<f32>() + self.width() * element
    }

    /// Columns of the input.
    fn width(&self) -> usize {
        self.gate.out()
    }

    /// Runs forward up to the last activation that backward reads. `x` is `[tokens][hidden]`.
    pub fn forward_saving<E: Element>(&self, x: Buffer<f32>, pass: Pass) -> OwnInputActivations<E> {
        let mut read = pass.pool.take::<E>(x.len());
        round_into(&x, &mut read);
        let mut gate = pass.pool.take(pass.tokens() * self.width());
        let low_rank = self.gate.forward(&read, &mut gate, pass.context());
        OwnInputActivations { x, gate, low_rank }
    }

    /// Runs the rest of the forward pass, and returns the result, `[tokens][hidden]`.
    pub fn forward_output<E: Element>(
        &self,
        activations: &OwnInputActivations<E>,
        pass: Pass,
    ) -> Buffer<f32> {
        let x = &activations.x[..];
        let h = self.hidden(activations, pass);
        let mut y = pass.pool.take(x.len());
        self.residual
            .forward(&self.output, (x, &h[..]), &mut y, pass);
        y
    }

    /// Runs backward: turns `gradient`, that of the result, into that of the residual, and writes that of the input where it is wanted.
    pub fn backward<E: Element>(
        &self,
        activations: OwnInputActivations<E>,
        gradient: &mut [f32],
        d_input: Option<&mut [f32]>,
        pass: Pass,
    ) {
        let (pool, context) = (pass.pool, pass.context());
        let hidden = || self.hidden(&activations, pass);
        let dy = self.residual.backward(&self.output, hidden, gradient, pass);
        let mut dh = pool.take(activations.gate.len());
        let du = self.output.backward_input(&dy[..], &mut dh, context);
        let beside = self.beside_input(&activations.gate, pass);
        let (mut d_beside, mut h) = (pool.take::<E>(beside.len()), pool.take::<E>(dh.len()));
        let outs = (&mut d_beside[..], &mut h[..]);
        swiglu::backward(&beside, &dh, outs, self.width(), self.activation);
        if self.output.learns() {
            let u = self.output.low_rank(&h[..], context);
            self.output.backward_weights(&h, &u, &dy, &du, context);
        }
        let mut d_gate = pool.take::<E>(dh.len());
        self.take_apart(&d_beside, &mut d_gate, d_input);
        let mut dx = pool.take::<f32>(gradient.len());
        let du = self.gate.backward_input(&d_gate[..], &mut dx, context);
        add_in_place(gradient, &dx);
        if self.gate.learns() {
            let mut read = pool.take::<E>(activations.x.len());
            round_into(&activations.x, &mut read);
            let u = &activations.low_rank;
            self.gate.backward_weights(&read, u, &d_gate, &du, context);
        }
    }

    /// What `output` reads, `[tokens][width]`.
    fn hidden<E: Element>(&self, activations: &OwnInputActivations<E>, pass: Pass) -> Buffer<E> {
        let beside = self.beside_input(&activations.gate, pass);
        let mut h = pass.pool.take::<E>(activations.gate.len());
        swiglu::forward(&beside, &mut h, self.width(), self.activation);
        h
    }

    /// The gate of each token, and its input beside it: `[tokens][2 * width]`.
    fn beside_input<E: Element>(&self, gate: &[E], pass: Pass) -> Buffer<E> {
        let width = self.width();
        let inputs = pass
            .own_inputs
            .expect("a pass has the inputs of its layers");
        let input = &inputs[self.layer * gate.len()..][..gate.len()];
        let mut beside = pass.pool.take::<E>(2 * gate.len());
        beside
            .par_chunks_mut(ROW_TILE * 2 * width)
            .zip(gate.par_chunks(ROW_TILE * width))
            .zip(input.par_chunks(ROW_TILE * width))
            .for_each(|((beside, gate), input)| {
                let rows = gate.chunks_exact(width).zip(input.chunks_exact(width));
                for (beside, (gate, input)) in beside.chunks_exact_mut(2 * width).zip(rows) {
                    let (to_gate, to_input) = beside.split_at_mut(width);
                    to_gate.copy_from_slice(gate);
                    for (to, x) in to_input.iter_mut().zip(input) {
                        *to = E::round_from(*x);
                    }
                }
            });
        beside
    }

    /// Takes the gradients of gate and input apart.
    fn take_apart<E: Element>(
        &self,
        d_beside: &[E],
        d_gate: &mut [E],
        d_input: Option<&mut [f32]>,
    ) {
        let width = self.width();
        let rows = d_beside.chunks_exact(2 * width);
        for (to, row) in d_gate.chunks_exact_mut(width).zip(rows.clone()) {
            to.copy_from_slice(&row[..width]);
        }
        if let Some(d_input) = d_input {
            let d_input = &mut d_input[self.layer * d_gate.len()..][..d_gate.len()];
            for (to, row) in d_input.chunks_exact_mut(width).zip(rows) {
                for (to, g) in to.iter_mut().zip(&row[width..]) {
                    *to = g.wide();
                }
            }
        }
    }
}
