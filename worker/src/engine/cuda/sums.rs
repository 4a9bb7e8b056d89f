//! Slot gradients on the GPU, on their way to the sum over all workers: [`crate::engine::accumulator`]'s arithmetic where
//! the gradients are.

use std::ops::Range;

use common::exact::FixedPoint;
use common::job::Reduction;
use common::memory::gpu::SUMS_TILE;
use cudarc::driver::{CudaView, CudaViewMut};

use super::error::GpuError;
use super::gpu::{DeviceBuffer, Gpu};
use super::ops::update::{
    exact_accumulate, exact_accumulate_rows, exact_means, fast_accumulate, fast_accumulate_rows,
};
use super::params::{FlatRange, GradientSink};
use crate::engine::accumulator::Accumulator;

/// Scalars that are copied to the processor at a time.
const COPY_TILE: usize = 8 << 20;

/// This worker's part of one step's gradient, on its GPU.
pub struct GpuSums {
    sums: Store,
    rule: FixedPoint,
    factor: f32,
}

/// Sums in the memory of a GPU, in layout order.
#[derive(Clone, Copy)]
pub enum DeviceSums<'a> {
    /// Exact sums in fixed point, see [`common::exact`].
    Exact(&'a DeviceBuffer<i64>),
    /// Float32 sums in fast mode, in units of the mean gradient.
    Fast(&'a DeviceBuffer<f32>),
}

enum Store {
    Exact {
        sums: DeviceBuffer<i64>,
        invalid: DeviceBuffer<u64>,
    },
    Fast(DeviceBuffer<f32>),
}

impl GpuSums {
    pub fn new(gpu: &Gpu, reduction: Reduction, scalars: usize) -> Result<Self, GpuError> {
        let sums = match reduction {
            Reduction::Exact => Store::Exact {
                sums: gpu.zeroed(scalars)?,
                invalid: gpu.zeroed(1)?,
            },
            Reduction::Fast => Store::Fast(gpu.zeroed(scalars)?),
        };
        Ok(Self {
            sums,
            rule: FixedPoint::new(1, 1),
            factor: 1.0,
        })
    }

    /// Empties the sums for a step of so many trained tokens and slots, over all workers.
    pub fn open(&mut self, gpu: &Gpu, trained_tokens: u64, slots: usize) -> Result<(), GpuError> {
        self.rule = FixedPoint::new(trained_tokens, slots);
        self.factor = 1.0 / trained_tokens as f32;
        self.clear(gpu)
    }

    /// Forgets every slot of the step.
    pub fn clear(&mut self, gpu: &Gpu) -> Result<(), GpuError> {
        match &mut self.sums {
            Store::Exact { sums, invalid } => {
                gpu.fill_zero(sums)?;
                gpu.fill_zero(invalid)
            }
            Store::Fast(sums) => gpu.fill_zero(sums),
        }
    }

    /// Adds a gradient, in one of up to `parts` parts of a slot.
    pub fn add(
        &mut self,
        gpu: &Gpu,
        offset: usize,
        gradient: &CudaView<f32>,
        parts: u64,
    ) -> Result<(), GpuError> {
        let range = offset..offset + gradient.len();
        match &mut self.sums {
            Store::Exact { sums, invalid } => {
                let (rule, sums) = (self.rule.of_parts(parts), &mut sums.slice_mut(range));
                exact_accumulate(gpu, &rule, sums, gradient, invalid)
            }
            Store::Fast(sums) => {
                fast_accumulate(gpu, &mut sums.slice_mut(range), gradient, self.factor)
            }
        }
    }

    /// Adds gradients to some rows of the matrix at `range`.
    fn add_rows(
        &mut self,
        gpu: &Gpu,
        range: FlatRange,
        gradients: (&CudaView<f32>, &CudaView<u32>),
        parts: u64,
    ) -> Result<(), GpuError> {
        let range = range.offset..range.offset + range.scalars;
        match &mut self.sums {
            Store::Exact { sums, invalid } => {
                let (rule, sums) = (self.rule.of_parts(parts), &mut sums.slice_mut(range));
                exact_accumulate_rows(gpu, &rule, sums, gradients, invalid)
            }
            Store::Fast(sums) => {
                fast_accumulate_rows(gpu, &mut sums.slice_mut(range), gradients, self.factor)
            }
        }
    }

    /// Scalars of the gradients that were not finite or out of range since the step was opened.
    pub fn invalid(&self, gpu: &Gpu) -> Result<u64, GpuError> {
        match &self.sums {
            Store::Exact { invalid, .. } => Ok(gpu.download(invalid, 1)?[0]),
            Store::Fast(_) => Ok(0),
        }
    }

    /// Computes the mean gradient of a range of scalars, where this worker holds every slot.
    pub fn means(&self, gpu: &Gpu, range: Range<usize>) -> Result<DeviceBuffer<f32>, GpuError> {
        let mut means = gpu.take::<f32>(range.len())?;
        let out = &mut means.slice_mut(..range.len());
        match &self.sums {
            Store::Exact { sums, .. } => exact_means(gpu, &sums.slice(range), out)?,
            Store::Fast(sums) => gpu.copy(&sums.slice(range), out)?,
        }
        Ok(means)
    }

    /// The sums on the GPU, for whoever adds those of other workers.
    pub fn on_device(&self) -> DeviceSums<'_> {
        match &self.sums {
            Store::Exact { sums, .. } => DeviceSums::Exact(sums),
            Store::Fast(sums) => DeviceSums::Fast(sums),
        }
    }

    /// Copies the sums into the processor's accumulator, which is open for the same step.
    pub fn copy_to(&self, gpu: &Gpu, accumulator: &mut Accumulator) -> Result<(), GpuError> {
        let scalars = accumulator.scalars();
        for start in (0..scalars).step_by(COPY_TILE) {
            let range = start..scalars.min(start + COPY_TILE);
            match &self.sums {
                Store::Exact { sums, .. } => {
                    let mut tile = vec![0; range.len()];
                    gpu.read(&sums.slice(range), &mut tile)?;
                    accumulator.set_exact(start, &tile);
                }
                Store::Fast(sums) => {
                    let mut tile = vec![0.0; range.len()];
                    gpu.read(&sums.slice(range), &mut tile)?;
                    accumulator.set_fast(start, &tile);
                }
            }
        }
        accumulator.set_invalid(self.invalid(gpu)?);
        Ok(())
    }
}

/// The gradient of one slot in a buffer of its own, added as a whole when the slot is done: a slot that is given up has
/// added nothing. For adapters.
pub struct SlotGradient(pub DeviceBuffer<f32>);

impl GradientSink for SlotGradient {
    fn add(
        &mut self,
        _: &Gpu,
        range: FlatRange,
        write: &mut dyn FnMut(&mut CudaViewMut<f32>) -> Result<(), GpuError>,
    ) -> Result<(), GpuError> {
        write(&mut self.0.slice_mut(range.offset..range.offset + range.scalars))
    }

    fn add_rows(
        &mut self,
        _: &Gpu,
        _: FlatRange,
        _: &CudaView<f32>,
        _: &CudaView<u32>,
    ) -> Result<(), GpuError> {
        unreachable!("adapters leave embeddings alone")
    }

    fn largest(&self) -> usize {
        self.0.len()
    }
}

/// A sink that adds each gradient at once, so that none is ever kept. For all weights of a model.
pub struct SumsSink<'a> {
    sums: &'a mut GpuSums,
    scratch: DeviceBuffer<f32>,
    /// How often a slot adds to any scalar at most.
    parts: u64,
}

impl<'a> SumsSink<'a> {
    pub fn new(
        gpu: &Gpu,
        sums: &'a mut GpuSums,
        scalars: usize,
        parts: u64,
    ) -> Result<Self, GpuError> {
        let scratch = gpu.take::<f32>(scalars.min(SUMS_TILE))?;
        Ok(Self {
            sums,
            scratch,
            parts,
        })
    }
}

impl GradientSink for SumsSink<'_> {
    fn add(
        &mut self,
        gpu: &Gpu,
        range: FlatRange,
        write: &mut dyn FnMut(&mut CudaViewMut<f32>) -> Result<(), GpuError>,
    ) -> Result<(), GpuError> {
        write(&mut self.scratch.slice_mut(..range.scalars))?;
        let gradient = self.scratch.slice(..range.scalars);
        self.sums.add(gpu, range.offset, &gradient, self.parts)
    }

    fn add_rows(
        &mut self,
        gpu: &Gpu,
        range: FlatRange,
        gradient: &CudaView<f32>,
        rows: &CudaView<u32>,
    ) -> Result<(), GpuError> {
        self.sums.add_rows(gpu, range, (gradient, rows), self.parts)
    }

    fn largest(&self) -> usize {
        self.scratch.len()
    }
}
