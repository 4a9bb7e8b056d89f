//! The first half of a decoder layer, in which tokens see each other, of whichever kind that layer has: attention, or linear
//! attention.

use super::Pass;
use super::attention::{AttentionActivations, AttentionBlock};
use super::gated_delta_net::{DeltaActivations, GatedDeltaNet};
use super::layer_state::LayerState;
use super::shared_keys::SharedKeys;
use crate::engine::buffer::Buffer;
use crate::engine::ops::element::Element;

/// The first half of a decoder layer.
pub enum TokenMixer {
    Attention(Box<AttentionBlock>),
    Linear(Box<GatedDeltaNet>),
}

/// What its backward pass needs beside the input.
pub enum MixerActivations<E> {
    Attention(AttentionActivations<E>),
    Linear(DeltaActivations<E>),
}

#[cfg(test)]
impl<E: Element> MixerActivations<E> {
    pub fn bytes(&self) -> usize {
        match self {
            Self::Attention(activations) => activations.bytes(),
            Self::Linear(activations) => activations.bytes(),
        }
    }
}

impl TokenMixer {
    /// Bytes that are kept for each token; the few of adapters are not counted.
    pub fn kept_bytes(&self, element: usize) -> usize {
        match self {
            Self::Attention(attention) => attention.kept_bytes(element),
            Self::Linear(linear) => linear.kept_bytes(element),
        }
    }

    /// Width of the residual.
    pub fn hidden(&self) -> usize {
        match self {
            Self::Attention(attention) => attention.output.out(),
            Self::Linear(linear) => linear.output.out(),
        }
    }

    /// Runs forward: `x` is `[tokens][hidden]`, and so is the result.
    pub fn forward<E: Element>(
        &self,
        x: &[f32],
        shared: &mut SharedKeys<E>,
        pass: Pass,
    ) -> (Buffer<f32>, MixerActivations<E>) {
        match self {
            Self::Attention(attention) => {
                let (y, activations) = attention.forward(x, shared, pass);
                (y, MixerActivations::Attention(activations))
            }
            Self::Linear(linear) => {
                let (y, activations) = linear.forward(x, pass);
                (y, MixerActivations::Linear(activations))
            }
        }
    }

    /// Runs forward over the last tokens of a text. `states` is what all layers know of those before them, and what this one, of that
    /// number, does of theirs is added.
    pub fn forward_last<E: Element>(
        &self,
        x: &[f32],
        (states, layer): (&mut [LayerState<E>], usize),
        pass: Pass,
    ) -> Buffer<f32> {
        match self {
            Self::Attention(attention) => attention.forward_last(x, states, pass),
            Self::Linear(linear) => linear.forward_last(x, &mut states[layer].linear, pass),
        }
    }

    /// Runs backward: turns `gradient`, that of the result, into that of `x` where that is `wanted`.
    pub fn backward<E: Element>(
        &self,
        x: &[f32],
        activations: MixerActivations<E>,
        gradient: &mut [f32],
        wanted: bool,
        (shared, pass): (&mut SharedKeys<E>, Pass),
    ) {
        match (self, activations) {
            (Self::Attention(attention), MixerActivations::Attention(activations)) => {
                attention.backward(x, activations, gradient, wanted, (shared, pass));
            }
            (Self::Linear(linear), MixerActivations::Linear(activations)) => {
                linear.backward(x, activations, gradient, wanted, pass);
            }
            _ => unreachable!("activations of another layer"),
        }
    }
}
