//! The first half of a decoder layer, in which tokens see each other, of whichever kind that layer has: attention, or linear
//! attention.

use cudarc::driver::{CudaView, CudaViewMut};

use super::Pass;
use super::attention::{AttentionActivations, AttentionBlock};
use super::gated_delta_net::{DeltaActivations, GatedDeltaNet};
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu};
use crate::engine::cuda::params::GradientSink;

/// The first half of a decoder layer.
pub enum TokenMixer<E> {
    Attention(Box<AttentionBlock<E>>),
    Linear(Box<GatedDeltaNet<E>>),
}

/// What its backward pass needs beside the input.
pub enum MixerActivations<E> {
    Attention(AttentionActivations<E>),
    Linear(DeltaActivations<E>),
}

impl<E: GpuElement> TokenMixer<E> {
    /// Takes over the trainable weights after an update.
    pub fn refresh(&mut self, gpu: &Gpu, flat: &DeviceBuffer<f32>) -> Result<(), GpuError> {
        match self {
            Self::Attention(attention) => attention.refresh(gpu, flat),
            Self::Linear(linear) => linear.refresh(gpu, flat),
        }
    }

    /// Bytes that are kept for each token.
    pub fn kept_bytes(&self) -> usize {
        match self {
            Self::Attention(attention) => attention.kept_bytes(),
            Self::Linear(linear) => linear.kept_bytes(),
        }
    }

    /// Runs forward: `x` is `[tokens][hidden]`, and so is the result.
    pub fn forward(
        &self,
        x: &CudaView<f32>,
        pass: Pass,
    ) -> Result<(DeviceBuffer<f32>, MixerActivations<E>), GpuError> {
        Ok(match self {
            Self::Attention(attention) => {
                let (y, activations) = attention.forward(x, pass)?;
                (y, MixerActivations::Attention(activations))
            }
            Self::Linear(linear) => {
                let (y, activations) = linear.forward(x, pass)?;
                (y, MixerActivations::Linear(activations))
            }
        })
    }

    /// Runs backward: turns `gradient`, that of the result, into that of `x`.
    pub fn backward(
        &self,
        x: &CudaView<f32>,
        activations: MixerActivations<E>,
        gradient: &mut CudaViewMut<f32>,
        pass: Pass,
        sink: &mut dyn GradientSink,
    ) -> Result<(), GpuError> {
        match (self, activations) {
            (Self::Attention(attention), MixerActivations::Attention(activations)) => {
                attention.backward(x, activations, gradient, pass, sink)
            }
            (Self::Linear(linear), MixerActivations::Linear(activations)) => {
                linear.backward(x, activations, gradient, pass, sink)
            }
            _ => unreachable!("activations of another layer"),
        }
    }
}
