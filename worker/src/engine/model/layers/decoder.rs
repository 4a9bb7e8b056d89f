//! The decoder: layers of attention and feed-forward on a residual.
//!
//! The residual is float32; what lies between is stored as the base model is. With gradient checkpointing (Chen et al.,
//! 2016) a layer keeps its input alone and runs forward again when the backward pass comes to it. The same bits as
//! without, because the second run repeats the first.

use super::Pass;
use super::feed_forward::{FeedForward, FeedForwardActivations};
use super::layer_state::LayerState;
use super::own_input::{OwnInput, OwnInputActivations};
use super::shared_keys::SharedKeys;
use super::token_mixer::{MixerActivations, TokenMixer};
use crate::engine::buffer::Buffer;
use crate::engine::ops::element::Element;
use crate::engine::ops::scale_in_place;

/// A decoder layer: attention or what stands in its place, then feed-forward.
pub struct DecoderLayer {
    pub mixer: TokenMixer,
    pub mlp: FeedForward,
    /// What it mixes in of its own input of each token, where it has some.
    pub own_input: Option<OwnInput>,
    /// What its result is multiplied by.
    pub scale: f32,
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
    shared: SharedKeys<E>,
}

/// What a backward pass begins with, and what it leaves.
pub struct Gradients<'a> {
    /// That of the last layer's result, which becomes that of the first layer's input.
    pub residual: &'a mut [f32],
    /// Whether that is wanted, or anything may be left.
    pub wanted: bool,
    /// That of the layers' own inputs, `[layers][tokens][width]`, where it is wanted.
    pub own_inputs: Option<&'a mut [f32]>,
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
    own_input: Option<OwnInputActivations<E>>,
}

/// Runs all layers forward: `x` is `[tokens][hidden]`, and so is the result. Of those before `first`, through which no gradient goes,
/// nothing is kept. None where the pass was abandoned.
pub fn forward<E: Element>(
    layers: &[DecoderLayer],
    mut x: Buffer<f32>,
    pass: Pass,
    (keep, first): (Keep, usize),
) -> Option<(Buffer<f32>, Tape<E>)> {
    let mut tape = Tape {
        layers: Vec::new(),
        shared: SharedKeys::default(),
    };
    for (index, layer) in layers.iter().enumerate() {
        if pass.is_abandoned() {
            return None;
        }
        let activations = layer.forward_saving::<E>(&x, &mut tape.shared, pass);
        // Here alone: a layer that runs again in the backward pass is the same one.
        if let Some(loss) = pass.router_loss {
            layer.mlp.add_to(loss, &activations.mlp);
        }
        let y = layer.forward_output(&activations, pass);
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

/// Runs the layers backward of which something was kept.
///
/// Gives memory back layer by layer. None where the pass was abandoned.
pub fn backward<E: Element>(
    layers: &[DecoderLayer],
    mut tape: Tape<E>,
    mut gradients: Gradients,
    pass: Pass,
) -> Option<()> {
    let first = layers.len() - tape.layers.len();
    let mut shared = tape.shared;
    shared.learning_from(first);
    let layers = layers[first..]
        .iter()
        .zip(tape.layers.drain(..))
        .enumerate();
    for (index, (layer, KeptLayer { x, activations })) in layers.rev() {
        if pass.is_abandoned() {
            return None;
        }
        let LayerActivations {
            mixer,
            post_attention_residual,
            mlp,
            own_input,
        } = activations.unwrap_or_else(|| layer.forward_saving(&x, &mut shared, pass));
        let gradient = &mut *gradients.residual;
        if layer.scale != 1.0 {
            scale_in_place(gradient, layer.scale);
        }
        if let (Some(own), Some(activations)) = (&layer.own_input, own_input) {
            let d_inputs = gradients.own_inputs.as_deref_mut();
            own.backward(activations, gradient, d_inputs, pass);
        }
        layer
            .mlp
            .backward(&post_attention_residual, mlp, gradient, pass);
        let wanted = gradients.wanted || index > 0;
        let across = (&mut shared, pass);
        layer.mixer.backward(&x, mixer, gradient, wanted, across);
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
                own_input,
            } = activations;
            let own = own_input.as_ref().map_or(0, OwnInputActivations::bytes);
            mixer.bytes() + size_of_val(&post_attention_residual[..]) + mlp.bytes() + own
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
        let own = self.own_input.as_ref();
        let own = own.map_or(0, |own| own.kept_bytes(element));
        residuals + self.mixer.kept_bytes(element) + self.mlp.kept_bytes(element) + own
    }

    /// Runs forward over the last tokens of a text, see [`TokenMixer::forward_last`].
    pub fn forward_last<E: Element>(
        &self,
        x: &[f32],
        states: (&mut [LayerState<E>], usize),
        pass: Pass,
    ) -> Buffer<f32> {
        let between = self.mixer.forward_last(x, states, pass);
        let mlp = self.mlp.forward_saving::<E>(&between, pass);
        let own_input = self.mix_saving(&between, &mlp, pass);
        self.output(&between, &mlp, own_input.as_ref(), pass)
    }

    fn forward_saving<E: Element>(
        &self,
        x: &[f32],
        shared: &mut SharedKeys<E>,
        pass: Pass,
    ) -> LayerActivations<E> {
        let (post_attention_residual, mixer) = self.mixer.forward(x, shared, pass);
        let mlp = self.mlp.forward_saving(&post_attention_residual, pass);
        LayerActivations {
            own_input: self.mix_saving(&post_attention_residual, &mlp, pass),
            mlp,
            post_attention_residual,
            mixer,
        }
    }

    /// What is kept of the layer's own input, which is mixed into what the feed-forward half gives.
    fn mix_saving<E: Element>(
        &self,
        between: &[f32],
        mlp: &FeedForwardActivations<E>,
        pass: Pass,
    ) -> Option<OwnInputActivations<E>> {
        let own = self.own_input.as_ref()?;
        let residual = self.mlp.forward_output(between, mlp, pass);
        Some(own.forward_saving(residual, pass))
    }

    /// Runs the rest of the forward pass, and returns the result, `[tokens][hidden]`.
    fn forward_output<E: Element>(
        &self,
        activations: &LayerActivations<E>,
        pass: Pass,
    ) -> Buffer<f32> {
        let LayerActivations {
            post_attention_residual,
            mlp,
            own_input,
            ..
        } = activations;
        self.output(post_attention_residual, mlp, own_input.as_ref(), pass)
    }

    fn output<E: Element>(
        &self,
        between: &[f32],
        mlp: &FeedForwardActivations<E>,
        own_input: Option<&OwnInputActivations<E>>,
        pass: Pass,
    ) -> Buffer<f32> {
        let mut y = match (&self.own_input, own_input) {
            (Some(own), Some(activations)) => own.forward_output(activations, pass),
            _ => self.mlp.forward_output(between, mlp, pass),
        };
        if self.scale != 1.0 {
            scale_in_place(&mut y, self.scale);
        }
        y
    }
}
