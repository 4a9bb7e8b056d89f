//! The decoder: layers of attention and feed-forward on a residual.
//!
//! The residual is float32; what lies between is stored as the base model is. With gradient checkpointing (Chen et al.,
//! 2016) a layer keeps its input alone and runs forward again when the backward pass comes to it. The same bits as
//! without, because the second run repeats the first.

use super::Pass;
use super::attention::{AttentionBlock, AttentionTape};
use super::mlp::{Mlp, MlpTape};
use crate::engine::buffer::Buffer;
use crate::engine::ops::element::Element;
use crate::engine::ops::rope::HeadLayout;

/// A decoder layer: attention, then feed-forward.
pub struct DecoderLayer {
    pub attention: AttentionBlock,
    pub mlp: Mlp,
}

/// What is kept of a forward pass for the backward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    Nothing,
    /// Only the input of each layer, which runs again in the backward pass.
    Inputs,
    Everything,
}

/// What a forward pass keeps, from the first layer to the last.
pub struct Tape<E> {
    layers: Vec<KeptLayer<E>>,
}

struct KeptLayer<E> {
    /// Input of the layer, `[tokens][hidden]`.
    x: Buffer<f32>,
    inner: Option<Inner<E>>,
}

/// What a layer computes between its input and its output.
struct Inner<E> {
    attention: AttentionTape<E>,
    /// The residual between the layer's two halves, `[tokens][hidden]`.
    middle: Buffer<f32>,
    mlp: MlpTape<E>,
}

/// Runs all layers forward: `x` is `[tokens][hidden]`, and so is the result. None where the pass was abandoned.
pub fn forward<E: Element>(
    layers: &[DecoderLayer],
    mut x: Buffer<f32>,
    pass: Pass,
    keep: Keep,
) -> Option<(Buffer<f32>, Tape<E>)> {
    let mut tape = Tape { layers: Vec::new() };
    for layer in layers {
        if pass.is_abandoned() {
            return None;
        }
        let inner = layer.open::<E>(&x, pass);
        let y = layer.mlp.close(&inner.middle, &inner.mlp, pass);
        match keep {
            Keep::Nothing => {}
            Keep::Inputs => tape.layers.push(KeptLayer { x, inner: None }),
            Keep::Everything => tape.layers.push(KeptLayer {
                x,
                inner: Some(inner),
            }),
        }
        x = y;
    }
    Some((x, tape))
}

/// Runs all layers backward: turns `gradient`, that of the result, into that of the first layer's input, or into anything
/// where that is not `wanted`.
///
/// Gives memory back layer by layer. None where the pass was abandoned.
pub fn backward<E: Element>(
    layers: &[DecoderLayer],
    mut tape: Tape<E>,
    gradient: &mut [f32],
    wanted: bool,
    pass: Pass,
) -> Option<()> {
    assert_eq!(tape.layers.len(), layers.len(), "a pass that kept nothing");
    let layers = layers.iter().zip(tape.layers.drain(..)).enumerate();
    for (index, (layer, KeptLayer { x, inner })) in layers.rev() {
        if pass.is_abandoned() {
            return None;
        }
        let Inner {
            attention,
            middle,
            mlp,
        } = inner.unwrap_or_else(|| layer.open(&x, pass));
        layer.mlp.backward(&middle, mlp, gradient, pass);
        let wanted = wanted || index > 0;
        let attention_block = &layer.attention;
        attention_block.backward(&x, attention, gradient, wanted, pass);
    }
    Some(())
}

#[cfg(test)]
impl<E: Element> Tape<E> {
    /// Bytes that are kept; the few of adapters are not counted.
    pub fn bytes(&self) -> usize {
        let inner = |inner: &Inner<E>| {
            let Inner {
                attention,
                middle,
                mlp,
            } = inner;
            attention.bytes() + size_of_val(&middle[..]) + mlp.bytes()
        };
        let layer = |layer: &KeptLayer<E>| {
            size_of_val(&layer.x[..]) + layer.inner.as_ref().map_or(0, inner)
        };
        self.layers.iter().map(layer).sum()
    }
}

impl DecoderLayer {
    /// Bytes that a layer keeps for each token with [`Keep::Everything`]; the few of adapters are not counted.
    pub fn kept_bytes(&self, element: usize) -> usize {
        let HeadLayout {
            heads, head_dim, ..
        } = self.attention.layout;
        let hidden = self.mlp.down.width();
        let inner = self.attention.qkv.width() + heads * head_dim + self.mlp.gate_up.width();
        (2 * hidden + heads) * size_of::<f32>() + inner * element
    }

    fn open<E: Element>(&self, x: &[f32], pass: Pass) -> Inner<E> {
        let (middle, attention) = self.attention.forward(x, pass);
        Inner {
            mlp: self.mlp.open(&middle, pass),
            middle,
            attention,
        }
    }
}
