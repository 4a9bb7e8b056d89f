//! A layer of all experts on the GPU: what [`crate::engine::model::layers::expert::ExpertLinear`] of each is on the processor. A product
//! for each expert, over its rows alone.

use std::sync::Arc;

use cudarc::driver::{CudaView, CudaViewMut};

use super::elementwise::{Rows, column_sums, round_rows};
use super::expert_rows::add_biases;
use super::frozen::{Frozen, Scratch};
use super::routing::{Group, Routes};
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::{GpuElement, Matrix, Target};
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu};
use crate::engine::cuda::params::{FlatRange, GradientSink};

/// How the weight of an expert lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// `[out][in]`.
    OutByIn,
    /// `[in][out]`, as fused experts are.
    InByOut,
}

/// Sizes of a layer of all experts.
#[derive(Clone, Copy, Debug)]
pub struct ExpertSizes {
    pub experts: usize,
    pub input: usize,
    pub out: usize,
    pub stored: Stored,
    /// Matrices of the model that the weight of an expert is made of, one above the other: gate and up are two.
    pub parts: usize,
}

impl ExpertSizes {
    /// Scalars of the weight of an expert.
    fn scalars(&self) -> usize {
        self.input * self.out
    }

    /// Rows and columns of a matrix as it lies in memory.
    fn part(&self) -> [usize; 2] {
        match self.stored {
            Stored::OutByIn => [self.out / self.parts, self.input],
            Stored::InByOut => [self.input / self.parts, self.out],
        }
    }
}

/// Biases of a layer of all experts, `[experts][out]`.
pub struct ExpertBiases {
    pub values: DeviceBuffer<f32>,
    /// Range of all of them among the trainable scalars, where they are trainable.
    pub range: Option<FlatRange>,
}

/// A layer of all experts.
pub struct ExpertLinear<E> {
    sizes: ExpertSizes,
    weights: Weights<E>,
    /// Ranges of the experts' matrices among the trainable scalars, of each expert its parts; None where one is frozen.
    ranges: Vec<Option<FlatRange>>,
    biases: Option<ExpertBiases>,
}

enum Weights<E> {
    /// As products read them, one expert after the other.
    Whole(DeviceBuffer<E>),
    /// Frozen matrices, some of them in 4 bits, of each expert its parts.
    Apart {
        matrices: Vec<Frozen<E>>,
        scratch: Arc<Scratch>,
    },
}

impl<E: GpuElement> ExpertLinear<E> {
    /// Takes memory for the weights; those that are frozen are to be [`set`](Self::set).
    pub fn new(
        gpu: &Gpu,
        sizes: ExpertSizes,
        ranges: Vec<Option<FlatRange>>,
        biases: Option<ExpertBiases>,
    ) -> Result<Self, GpuError> {
        assert_eq!(
            ranges.len(),
            sizes.experts * sizes.parts,
            "experts' matrices"
        );
        Ok(Self {
            weights: Weights::Whole(gpu.take(sizes.experts * sizes.scalars())?),
            sizes,
            ranges,
            biases,
        })
    }

    /// A layer of frozen matrices, some of which are in 4 bits; an expert has `parts` of them.
    pub fn frozen(
        sizes: ExpertSizes,
        matrices: Vec<Frozen<E>>,
        biases: Option<ExpertBiases>,
        scratch: &Arc<Scratch>,
    ) -> Self {
        let count = sizes.experts * sizes.parts;
        assert_eq!(matrices.len(), count, "experts' matrices");
        scratch.reserve::<E>(sizes.scalars());
        Self {
            weights: Weights::Apart {
                matrices,
                scratch: scratch.clone(),
            },
            sizes,
            ranges: vec![None; count],
            biases,
        }
    }

    /// Sets the matrix of this number, of which an expert has `parts`, where they are not given [`frozen`](Self::frozen).
    pub fn set(&mut self, gpu: &Gpu, number: usize, values: &[E]) -> Result<(), GpuError> {
        let [rows, columns] = self.sizes.part();
        let scalars = rows * columns;
        assert_eq!(values.len(), scalars, "a matrix of an expert");
        match &mut self.weights {
            Weights::Whole(weights) => {
                let to = &mut weights.slice_mut(number * scalars..(number + 1) * scalars);
                gpu.write(values, to)
            }
            Weights::Apart { .. } => unreachable!("matrices that were given frozen"),
        }
    }

    pub fn out(&self) -> usize {
        self.sizes.out
    }

    pub fn input(&self) -> usize {
        self.sizes.input
    }

    /// Whether a gradient of the layer itself is wanted.
    pub fn learns(&self) -> bool {
        let biases = self.biases.as_ref();
        self.ranges.iter().any(Option::is_some)
            || biases.is_some_and(|biases| biases.range.is_some())
    }

    /// The biases of all experts, `[experts][out]`, where there are some.
    pub fn biases(&self) -> Option<CudaView<'_, f32>> {
        let scalars = self.sizes.experts * self.sizes.out;
        let biases = self.biases.as_ref();
        biases.map(|biases| biases.values.slice(..scalars))
    }

    /// Takes over the trainable weights after an update.
    pub fn refresh(&mut self, gpu: &Gpu, flat: &DeviceBuffer<f32>) -> Result<(), GpuError> {
        let [rows, columns] = self.sizes.part();
        for (number, range) in self.ranges.iter().enumerate() {
            let (Some(range), Weights::Whole(weights)) = (range, &mut self.weights) else {
                continue;
            };
            let rows = Rows::new(rows, columns);
            let to = &mut weights.slice_mut(number * rows.len()..(number + 1) * rows.len());
            round_rows(gpu, (&range.of(flat), rows), (to, rows), 1.0)?;
        }
        if let Some(ExpertBiases {
            values,
            range: Some(range),
        }) = &mut self.biases
        {
            gpu.copy(&range.of(flat), &mut values.slice_mut(..range.scalars))?;
        }
        Ok(())
    }

    /// Computes the output `[rows][out]` of each expert's rows of `x`, `[rows][in]`.
    pub fn forward<O: GpuElement>(
        &self,
        gpu: &Gpu,
        x: &CudaView<E>,
        y: &mut CudaViewMut<O>,
        routes: &Routes,
    ) -> Result<(), GpuError> {
        let ExpertSizes { input, out, .. } = self.sizes;
        for group in occupied(routes) {
            let x = part_of(x, group, input);
            let y = &mut y.slice_mut(group.first * out..(group.first + group.rows) * out);
            self.read(gpu, group.expert, |weight| {
                let weight = match self.sizes.stored {
                    Stored::OutByIn => Matrix::new(weight, out, input).transposed(),
                    Stored::InByOut => Matrix::new(weight, input, out),
                };
                let x = Matrix::new(&x, group.rows, input);
                gpu.blas().product(Target::new(y, out), x, weight)
            })?;
        }
        match self.biases() {
            Some(biases) => add_biases(gpu, y, &biases, &routes.experts()),
            None => Ok(()),
        }
    }

    /// Computes the gradient of the input, `[rows][in]`.
    pub fn backward_input<O: GpuElement>(
        &self,
        gpu: &Gpu,
        dy: &CudaView<E>,
        dx: &mut CudaViewMut<O>,
        routes: &Routes,
    ) -> Result<(), GpuError> {
        let ExpertSizes { input, out, .. } = self.sizes;
        for group in occupied(routes) {
            let dy = part_of(dy, group, out);
            let dx = &mut dx.slice_mut(group.first * input..(group.first + group.rows) * input);
            self.read(gpu, group.expert, |weight| {
                let weight = match self.sizes.stored {
                    Stored::OutByIn => Matrix::new(weight, out, input),
                    Stored::InByOut => Matrix::new(weight, input, out).transposed(),
                };
                let dy = Matrix::new(&dy, group.rows, out);
                gpu.blas().product(Target::new(dx, input), dy, weight)
            })?;
        }
        Ok(())
    }

    /// Hands over the gradients of what is trainable, zeros of experts that no token goes through. Rows of nobody are zeros in `dy`,
    /// and finite in `x`.
    pub fn backward_weights(
        &self,
        gpu: &Gpu,
        (x, dy): (&CudaView<E>, &CudaView<E>),
        routes: &Routes,
        sink: &mut dyn GradientSink,
    ) -> Result<(), GpuError> {
        let ExpertSizes {
            input, out, parts, ..
        } = self.sizes;
        for group in routes.groups() {
            let (x, dy) = (part_of(x, group, input), part_of(dy, group, out));
            for part in 0..parts {
                if let Some(range) = self.ranges[group.expert * parts + part] {
                    self.backward_part((part, range), (&x, &dy), group, gpu, sink)?;
                }
            }
            let biases = self.biases.as_ref();
            if let Some(range) = biases.and_then(|biases| biases.range) {
                let own = range.part(group.expert * out, out);
                sink.add(gpu, own, &mut |gradient| match group.rows {
                    0 => gpu.fill_zero(gradient),
                    rows => column_sums(gpu, (&dy, Rows::new(rows, out)), gradient),
                })?;
            }
        }
        Ok(())
    }

    /// Hands over the gradient of one of an expert's matrices, in tiles as large as the sink takes.
    fn backward_part(
        &self,
        (part, range): (usize, FlatRange),
        (x, dy): (&CudaView<E>, &CudaView<E>),
        group: Group,
        gpu: &Gpu,
        sink: &mut dyn GradientSink,
    ) -> Result<(), GpuError> {
        let ExpertSizes { input, out, .. } = self.sizes;
        let [part_rows, columns] = self.sizes.part();
        // What the matrix's rows stand for, and its columns.
        let ((left, left_width), (right, right_width)) = match self.sizes.stored {
            Stored::OutByIn => ((dy, out), (x, input)),
            Stored::InByOut => ((x, input), (dy, out)),
        };
        let tile = (sink.largest() / columns).max(1);
        for first in (0..part_rows).step_by(tile) {
            let rows = tile.min(part_rows - first);
            let range = range.part(first * columns, rows * columns);
            sink.add(gpu, range, &mut |gradient| {
                if group.rows == 0 {
                    return gpu.fill_zero(gradient);
                }
                let left = left.slice(part * part_rows + first..);
                let left = Matrix::strided(&left, group.rows, rows, left_width).transposed();
                let right = Matrix::new(right, group.rows, right_width);
                gpu.blas()
                    .product(Target::new(gradient, columns), left, right)
            })?;
        }
        Ok(())
    }

    /// Hands `work` the weight of an expert as products read it.
    fn read(
        &self,
        gpu: &Gpu,
        expert: usize,
        work: impl FnOnce(&CudaView<E>) -> Result<(), GpuError>,
    ) -> Result<(), GpuError> {
        let scalars = self.sizes.scalars();
        match &self.weights {
            Weights::Whole(weights) => {
                work(&weights.slice(expert * scalars..(expert + 1) * scalars))
            }
            Weights::Apart { matrices, scratch } => {
                let ExpertSizes { parts, .. } = self.sizes;
                let own = &matrices[expert * parts..(expert + 1) * parts];
                let [rows, columns] = self.sizes.part();
                let write = |to: &mut CudaViewMut<E>| {
                    own.iter().enumerate().try_for_each(|(part, matrix)| {
                        let to = &mut to.slice_mut(part * rows * columns..);
                        matrix.write(gpu, [rows, columns], (to, columns))
                    })
                };
                scratch.with(gpu, scalars, write, work)
            }
        }
    }
}

/// The experts that some tokens go through.
fn occupied(routes: &Routes) -> impl Iterator<Item = Group> {
    routes.groups().filter(|group| group.rows > 0)
}

/// The rows of a group in rows of all.
fn part_of<'a, E>(rows: &'a CudaView<E>, group: Group, width: usize) -> CudaView<'a, E> {
    rows.slice(group.first * width..(group.first + group.rows) * width)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
