//! Where trainable tensors lie in the flat buffers, and the sink that takes their gradients: what
//! [`crate::engine::params`] is on the processor.

use cudarc::driver::{CudaView, CudaViewMut};

use super::error::GpuError;
use super::gpu::{DeviceBuffer, Gpu};

/// Range of a tensor in the flat buffers of trainable scalars.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlatRange {
    pub offset: usize,
    pub scalars: usize,
}

impl FlatRange {
    /// The tensor's part of a flat buffer.
    pub fn of<'a, T>(&self, flat: &'a DeviceBuffer<T>) -> CudaView<'a, T> {
        flat.slice(self.offset..self.offset + self.scalars)
    }

    /// The range of `scalars` of the tensor's scalars, from the one numbered `first`.
    pub fn part(&self, first: usize, scalars: usize) -> Self {
        assert!(first + scalars <= self.scalars, "a part of a tensor");
        Self {
            offset: self.offset + first,
            scalars,
        }
    }
}

/// A vector of weights in float32.
pub struct Vector {
    values: DeviceBuffer<f32>,
    scalars: usize,
    /// Range of the vector among the trainable scalars, where it is trainable.
    pub range: Option<FlatRange>,
}

impl Vector {
    pub fn new(gpu: &Gpu, values: &[f32], range: Option<FlatRange>) -> Result<Self, GpuError> {
        Ok(Self {
            values: gpu.upload(values)?,
            scalars: values.len(),
            range,
        })
    }

    pub fn scalars(&self) -> usize {
        self.scalars
    }

    /// Takes over the trainable weights after an update.
    pub fn refresh(&mut self, gpu: &Gpu, flat: &DeviceBuffer<f32>) -> Result<(), GpuError> {
        match self.range {
            Some(range) => gpu.copy(&range.of(flat), &mut self.values.slice_mut(..self.scalars)),
            None => Ok(()),
        }
    }

    pub fn view(&self) -> CudaView<'_, f32> {
        self.values.slice(..self.scalars)
    }
}

/// Where gradients of trainable tensors are handed to.
pub trait GradientSink {
    /// Takes the gradient of the tensor at `range`: `write` gets memory for its scalars, which it must fill.
    fn add(
        &mut self,
        gpu: &Gpu,
        range: FlatRange,
        write: &mut dyn FnMut(&mut CudaViewMut<f32>) -> Result<(), GpuError>,
    ) -> Result<(), GpuError>;

    /// Takes the gradients of some rows, all different, of the matrix at `range`.
    fn add_rows(
        &mut self,
        gpu: &Gpu,
        range: FlatRange,
        gradient: &CudaView<f32>,
        rows: &CudaView<u32>,
    ) -> Result<(), GpuError>;

    /// Most scalars that one call of [`add`](Self::add) may take; a larger tensor is handed over in parts.
    fn largest(&self) -> usize;
}
