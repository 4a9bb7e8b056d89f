//! The feed-forward half of a decoder layer, of whichever kind that layer has: dense, of experts, or both.

use super::Pass;
use super::dense_and_experts::{BothActivations, DenseAndExperts};
use super::experts::{ExpertActivations, Experts};
use super::mlp::{Mlp, MlpActivations};
use crate::engine::buffer::Buffer;
use crate::engine::ops::element::Element;
use crate::engine::ops::router_loss::RouterLoss;

/// The feed-forward half of a decoder layer.
pub enum FeedForward {
    Dense(Box<Mlp>),
    Experts(Box<Experts>),
    Both(Box<DenseAndExperts>),
}

/// What its backward pass needs beside the input.
pub enum FeedForwardActivations<E> {
    Dense(MlpActivations<E>),
    Experts(ExpertActivations<E>),
    Both(BothActivations<E>),
}

#[cfg(test)]
impl<E: Element> FeedForwardActivations<E> {
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense(activations) => activations.bytes(),
            Self::Experts(activations) => activations.bytes(),
            Self::Both(activations) => activations.bytes(),
        }
    }
}

impl FeedForward {
    /// Bytes that are kept for each token; the few of adapters are not counted.
    pub fn kept_bytes(&self, element: usize) -> usize {
        match self {
            Self::Dense(mlp) => mlp.gate_up.out() * element,
            Self::Experts(experts) => experts.kept_bytes(element),
            Self::Both(both) => both.kept_bytes(element),
        }
    }

    /// Runs forward up to the last activation that backward reads. `x` is `[tokens][hidden]`.
    pub fn forward_saving<E: Element>(&self, x: &[f32], pass: Pass) -> FeedForwardActivations<E> {
        match self {
            Self::Dense(mlp) => FeedForwardActivations::Dense(mlp.forward_saving(x, pass)),
            Self::Experts(experts) => {
                FeedForwardActivations::Experts(experts.forward_saving(x, pass))
            }
            Self::Both(both) => FeedForwardActivations::Both(both.forward_saving(x, pass)),
        }
    }

    /// Takes note of the layer for the router's loss, if it has experts.
    pub fn add_to<E>(&self, loss: &RouterLoss, activations: &FeedForwardActivations<E>) {
        match (self, activations) {
            (Self::Experts(experts), FeedForwardActivations::Experts(activations)) => {
                experts.add_to(loss, activations);
            }
            (Self::Both(both), FeedForwardActivations::Both(activations)) => {
                both.experts.add_to(loss, &activations.experts);
            }
            _ => {}
        }
    }

    /// Runs the rest of the forward pass, and returns the result, `[tokens][hidden]`.
    pub fn forward_output<E: Element>(
        &self,
        x: &[f32],
        activations: &FeedForwardActivations<E>,
        pass: Pass,
    ) -> Buffer<f32> {
        match (self, activations) {
            (Self::Dense(mlp), FeedForwardActivations::Dense(activations)) => {
                mlp.forward_output(x, activations, pass)
            }
            (Self::Experts(experts), FeedForwardActivations::Experts(activations)) => {
                experts.forward_output(x, activations, pass)
            }
            (Self::Both(both), FeedForwardActivations::Both(activations)) => {
                both.forward_output(x, activations, pass)
            }
            _ => unreachable!("activations of another layer"),
        }
    }

    /// Runs backward: turns `gradient`, that of the result, into that of `x`.
    pub fn backward<E: Element>(
        &self,
        x: &[f32],
        activations: FeedForwardActivations<E>,
        gradient: &mut [f32],
        pass: Pass,
    ) {
        match (self, activations) {
            (Self::Dense(mlp), FeedForwardActivations::Dense(activations)) => {
                mlp.backward(x, activations, gradient, pass);
            }
            (Self::Experts(experts), FeedForwardActivations::Experts(activations)) => {
                experts.backward(x, activations, gradient, pass);
            }
            (Self::Both(both), FeedForwardActivations::Both(activations)) => {
                both.backward(x, activations, gradient, pass);
            }
            _ => unreachable!("activations of another layer"),
        }
    }
}
