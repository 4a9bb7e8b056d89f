//! The decoder: layers of attention and feed-forward on a residual.
//!
//! The residual is float32; what lies between is stored as the base model is. With gradient checkpointing (Chen et al.,
//! 2016) a layer keeps its input alone and runs forward again when the backward pass comes to it. The same bits as
//! without, because the second run repeats the first.

use super::Pass;
use super::feed_forward::{FeedForward, FeedForwardActivations};
use super::token_mixer::{LayerState, MixerActivations, TokenMixer};
use crate::engine::buffer::Buffer;
use crate::engine::ops::element::Element;

/// A decoder layer: attention or what stands in its place, then feed-forward.
pub struct DecoderLayer {
    pub mixer: TokenMixer,
    pub mlp: FeedForward,
}

/// What is kept of a forward pass for the backward pass, of the layers that this goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    Nothing,
    /// Only the input of each layer, which runs again in the backward pass.
    Inputs,
    Everything,
}

/// What a forward pass keeps, from the first layer that learns to the last.
pub struct Tape<E> {
    layers: Vec<KeptLayer<E>>,
}

struct KeptLayer<E> {
    /// Input of the layer, `[tokens][hidden]`.
    x: Buffer<f32>,
    activations: Option<LayerActivations<E>>,
}

/// What a layer computes between its input and its output.
struct LayerActivations<E> {
    mixer: MixerActivations<E>,
    /// The residual between the layer's two halves, `[tokens][hidden]`.
    post_attention_residual: Buffer<f32>,
    mlp: FeedForwardActivations<E>,
}

/// Runs all layers forward: `x` is `[tokens][hidden]`, and so is the result. Of those before `first`, through which no gradient goes,
/// nothing is kept. None where the pass was abandoned.
pub fn forward<E: Element>(
    layers: &[DecoderLayer],
    mut x: Buffer<f32>,
    pass: Pass,
    (keep, first): (Keep, usize),
) -> Option<(Buffer<f32>, Tape<E>)> {
    let mut tape = Tape { layers: Vec::new() };
    for (index, layer) in layers.iter().enumerate() {
        if pass.is_abandoned() {
            return None;
        }
        let activations = layer.forward_saving::<E>(&x, pass);
        // Here alone: a layer that runs again in the backward pass is the same one.
        if let Some(loss) = pass.router_loss {
            layer.mlp.add_to(loss, &activations.mlp);
        }
        let y =
            layer
                .mlp
                .forward_output(&activations.post_attention_residual, &activations.mlp, pass);
        match keep {
            _ if index < first => {}
            Keep::Nothing => {}
            Keep::Inputs => tape.layers.push(KeptLayer {
                x,
                activations: None,
            }),
            Keep::Everything => tape.layers.push(KeptLayer {
                x,
                activations: Some(activations),
            }),
        }
        x = y;
    }
    Some((x, tape))
}

/// Runs the layers backward of which something was kept: turns `gradient`, that of the result, into that of the first one's input, or
/// into anything where that is not `wanted`.
///
/// Gives memory back layer by layer. None where the pass was abandoned.
pub fn backward<E: Element>(
    layers: &[DecoderLayer],
    mut tape: Tape<E>,
    gradient: &mut [f32],
    wanted: bool,
    pass: Pass,
) -> Option<()> {
    let layers = &layers[layers.len() - tape.layers.len()..];
    let layers = layers.iter().zip(tape.layers.drain(..)).enumerate();
    for (index, (layer, KeptLayer { x, activations })) in layers.rev() {
        if pass.is_abandoned() {
            return None;
        }
        let LayerActivations {
            mixer,
            post_attention_residual,
            mlp,
        } = activations.unwrap_or_else(|| layer.forward_saving(&x, pass));
        layer
            .mlp
            .backward(&post_attention_residual, mlp, gradient, pass);
        let wanted = wanted || index > 0;
        layer.mixer.backward(&x, mixer, gradient, wanted, pass);
    }
    Some(())
}

#[cfg(test)]
impl<E: Element> Tape<E> {
    /// Bytes that are kept; the few of adapters are not counted.
    pub fn bytes(&self) -> usize {
        let activations = |activations: &LayerActivations<E>| {
            let LayerActivations {
                mixer,
                post_attention_residual,
                mlp,
            } = activations;
            mixer.bytes() + size_of_val(&post_attention_residual[..]) + mlp.bytes()
        };
        let layer = |layer: &KeptLayer<E>| {
            size_of_val(&layer.x[..]) + layer.activations.as_ref().map_or(0, activations)
        };
        self.layers.iter().map(layer).sum()
    }
}

impl DecoderLayer {
    /// Bytes that a layer keeps for each token with [`Keep::Everything`]; the few of adapters are not counted.
    pub fn kept_bytes(&self, element: usize) -> usize {
        let residuals = 2 * self.mixer.hidden() * size_of::<f32>();
        residuals + self.mixer.kept_bytes(element) + self.mlp.kept_bytes(element)
    }

    /// Runs forward over the last tokens of a text, see [`TokenMixer::forward_last`].
    pub fn forward_last<E: Element>(
        &self,
        x: &[f32],
        state: &mut LayerState<E>,
        pass: Pass,
    ) -> Buffer<f32> {
        let between = self.mixer.forward_last(x, state, pass);
        let mlp = self.mlp.forward_saving::<E>(&between, pass);
        self.mlp.forward_output(&between, &mlp, pass)
    }

    fn forward_saving<E: Element>(&self, x: &[f32], pass: Pass) -> LayerActivations<E> {
        let (post_attention_residual, mixer) = self.mixer.forward(x, pass);
        LayerActivations {
            mlp: self.mlp.forward_saving(&post_attention_residual, pass),
            post_attention_residual,
            mixer,
        }
    }
}
