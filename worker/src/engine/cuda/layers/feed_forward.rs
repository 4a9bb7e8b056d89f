//! The feed-forward half of a decoder layer, of whichever kind that layer has: dense, or of experts.

use cudarc::driver::{CudaView, CudaViewMut};

use super::Pass;
use super::experts::{ExpertActivations, Experts};
use super::mlp::{Mlp, MlpActivations};
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu};
use crate::engine::cuda::params::GradientSink;
use crate::engine::ops::router_loss::RouterLoss;

/// The feed-forward half of a decoder layer.
pub enum FeedForward<E> {
    Dense(Box<Mlp<E>>),
    Experts(Box<Experts<E>>),
}

/// What its backward pass needs beside the input.
pub enum FeedForwardActivations<E> {
    Dense(MlpActivations<E>),
    Experts(Box<ExpertActivations<E>>),
}

impl<E: GpuElement> FeedForward<E> {
    /// Takes over the trainable weights after an update.
    pub fn refresh(&mut self, gpu: &Gpu, flat: &DeviceBuffer<f32>) -> Result<(), GpuError> {
        match self {
            Self::Dense(mlp) => mlp.refresh(gpu, flat),
            Self::Experts(experts) => experts.refresh(gpu, flat),
        }
    }

    /// Bytes that are kept for each token.
    pub fn kept_bytes(&self) -> usize {
        match self {
            Self::Dense(mlp) => mlp.gate_up.out() * size_of::<E>(),
            Self::Experts(experts) => experts.kept_bytes(),
        }
    }

    /// Width of the layer's result.
    pub fn hidden(&self) -> usize {
        match self {
            Self::Dense(mlp) => mlp.down.out(),
            Self::Experts(experts) => experts.hidden(),
        }
    }

    /// Runs forward up to the last activation that backward reads. `x` is `[tokens][hidden]`.
    pub fn forward_saving(
        &self,
        x: &CudaView<f32>,
        pass: Pass,
    ) -> Result<FeedForwardActivations<E>, GpuError> {
        Ok(match self {
            Self::Dense(mlp) => FeedForwardActivations::Dense(mlp.forward_saving(x, pass)?),
            Self::Experts(experts) => {
                let activations = experts.forward_saving(x, pass)?;
                FeedForwardActivations::Experts(Box::new(activations))
            }
        })
    }

    /// Takes note of the layer for the router's loss, if it has experts.
    pub fn add_to(
        &self,
        loss: &RouterLoss,
        activations: &FeedForwardActivations<E>,
        gpu: &Gpu,
    ) -> Result<(), GpuError> {
        match (self, activations) {
            (Self::Experts(experts), FeedForwardActivations::Experts(activations)) => {
                experts.add_to(loss, activations, gpu)
            }
            _ => Ok(()),
        }
    }

    /// Runs the rest of the forward pass, and returns the result, `[tokens][hidden]`.
    pub fn forward_output(
        &self,
        x: &CudaView<f32>,
        activations: &FeedForwardActivations<E>,
        pass: Pass,
    ) -> Result<DeviceBuffer<f32>, GpuError> {
        match (self, activations) {
            (Self::Dense(mlp), FeedForwardActivations::Dense(activations)) => {
                mlp.forward_output(x, activations, pass)
            }
            (Self::Experts(experts), FeedForwardActivations::Experts(activations)) => {
                experts.forward_output(x, activations, pass)
            }
            _ => unreachable!("activations of another layer"),
        }
    }

    /// Runs backward: turns `gradient`, that of the result, into that of `x`.
    pub fn backward(
        &self,
        x: &CudaView<f32>,
        activations: FeedForwardActivations<E>,
        gradient: &mut CudaViewMut<f32>,
        pass: Pass,
        sink: &mut dyn GradientSink,
    ) -> Result<(), GpuError> {
        match (self, activations) {
            (Self::Dense(mlp), FeedForwardActivations::Dense(activations)) => {
                mlp.backward(x, activations, gradient, pass, sink)
            }
            (Self::Experts(experts), FeedForwardActivations::Experts(activations)) => {
                experts.backward(x, *activations, gradient, pass, sink)
            }
            _ => unreachable!("activations of another layer"),
        }
    }
}
