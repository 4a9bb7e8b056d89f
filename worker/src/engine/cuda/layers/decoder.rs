//! The decoder: layers of attention and feed-forward on a residual.
//!
//! The residual and its gradient are float32; what lies between is of the model's element type. With gradient
//! checkpointing (Chen et al., 2016) a layer keeps its input alone and runs forward again when the backward pass comes to it.

use cudarc::driver::{CudaView, CudaViewMut};

use super::Pass;
use super::feed_forward::{FeedForward, FeedForwardActivations};
use super::token_mixer::{MixerActivations, TokenMixer};
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu, Pace};
use crate::engine::cuda::params::GradientSink;
use crate::engine::model::layers::decoder::Keep;

/// A decoder layer: attention or what stands in its place, then feed-forward.
pub struct DecoderLayer<E> {
    pub mixer: TokenMixer<E>,
    pub mlp: FeedForward<E>,
}

/// What a forward pass keeps, from the first layer to the last.
pub struct Tape<E> {
    layers: Vec<KeptLayer<E>>,
}

struct KeptLayer<E> {
    /// Input of the layer, `[tokens][hidden]`.
    x: DeviceBuffer<f32>,
    activations: Option<LayerActivations<E>>,
}

/// What a layer computes between its input and its output.
struct LayerActivations<E> {
    mixer: MixerActivations<E>,
    /// The residual between the layer's two halves, `[tokens][hidden]`.
    post_attention_residual: DeviceBuffer<f32>,
    mlp: FeedForwardActivations<E>,
}

/// The result of the last layer, and what was kept.
type Forward<E> = (DeviceBuffer<f32>, Tape<E>);

/// Runs all layers forward: `x` is `[tokens][hidden]`, and so is the result. None where the pass was abandoned.
pub fn forward<E: GpuElement>(
    layers: &[DecoderLayer<E>],
    mut x: DeviceBuffer<f32>,
    pass: Pass,
    keep: Keep,
) -> Result<Option<Forward<E>>, GpuError> {
    let mut tape = Tape { layers: Vec::new() };
    let mut pace = Pace::default();
    for layer in layers {
        if pass.is_abandoned(&mut pace)? {
            return Ok(None);
        }
        let activations = layer.forward_saving(&x.as_view(), pass)?;
        // Here alone: a layer that runs again in the backward pass is the same one.
        if let Some(loss) = pass.router_loss {
            layer.mlp.add_to(loss, &activations.mlp, pass.gpu)?;
        }
        let residual = activations.post_attention_residual.as_view();
        let y = layer
            .mlp
            .forward_output(&residual, &activations.mlp, pass)?;
        match keep {
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
    Ok(Some((x, tape)))
}

/// Runs all layers backward: turns `gradient`, that of the result, into that of the first layer's input.
///
/// Gives memory back layer by layer. None where the pass was abandoned.
pub fn backward<E: GpuElement>(
    layers: &[DecoderLayer<E>],
    mut tape: Tape<E>,
    gradient: &mut CudaViewMut<f32>,
    pass: Pass,
    sink: &mut dyn GradientSink,
) -> Result<Option<()>, GpuError> {
    assert_eq!(tape.layers.len(), layers.len(), "a pass that kept nothing");
    let mut pace = Pace::default();
    for (layer, KeptLayer { x, activations }) in layers.iter().zip(tape.layers.drain(..)).rev() {
        if pass.is_abandoned(&mut pace)? {
            return Ok(None);
        }
        let x = x.as_view();
        let LayerActivations {
            mixer,
            post_attention_residual,
            mlp,
        } = match activations {
            Some(activations) => activations,
            None => layer.forward_saving(&x, pass)?,
        };
        let residual = post_attention_residual.as_view();
        layer.mlp.backward(&residual, mlp, gradient, pass, sink)?;
        drop(post_attention_residual);
        layer.mixer.backward(&x, mixer, gradient, pass, sink)?;
    }
    Ok(Some(()))
}

impl<E: GpuElement> DecoderLayer<E> {
    /// Takes over the trainable weights after an update.
    pub fn refresh(&mut self, gpu: &Gpu, flat: &DeviceBuffer<f32>) -> Result<(), GpuError> {
        self.mixer.refresh(gpu, flat)?;
        self.mlp.refresh(gpu, flat)
    }

    /// Bytes that a layer keeps for each token with [`Keep::Everything`].
    pub fn kept_bytes(&self) -> usize {
        let residuals = 2 * self.mlp.hidden() * size_of::<f32>();
        residuals + self.mixer.kept_bytes() + self.mlp.kept_bytes()
    }

    fn forward_saving(
        &self,
        x: &CudaView<f32>,
        pass: Pass,
    ) -> Result<LayerActivations<E>, GpuError> {
        let (post_attention_residual, mixer) = self.mixer.forward(x, pass)?;
        Ok(LayerActivations {
            mlp: self
                .mlp
                .forward_saving(&post_attention_residual.as_view(), pass)?,
            post_attention_residual,
            mixer,
        })
    }
}
