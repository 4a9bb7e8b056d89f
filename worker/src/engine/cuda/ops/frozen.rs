//! Frozen matrices on the GPU, and the memory that those of 4 bits are widened to right before they are multiplied: one for all of a
//! model's, because everything that is asked of a GPU is done in order.

use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::{CudaView, CudaViewMut};

use super::elementwise::Rows;
use super::four_bits::{FourBits, Window, copy_rows};
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu};
use crate::engine::ops::element::Element;
use crate::engine::params::{Reading, Weight};

/// A matrix that training leaves as it is.
pub enum Frozen<E> {
    /// As products read it.
    Wide(DeviceBuffer<E>),
    FourBits(FourBits),
}

impl<E: GpuElement + Element> Frozen<E> {
    /// Copies a frozen weight to the GPU as it is.
    pub fn upload(gpu: &Gpu, weight: &Weight) -> Result<Self, GpuError> {
        Ok(match weight.read() {
            Reading::Nf4(matrix) => Self::FourBits(FourBits::upload(gpu, matrix)?),
            wide => Self::Wide(gpu.upload::<E>(wide.elements())?),
        })
    }
}

impl<E: GpuElement> Frozen<E> {
    /// Writes the matrix, `[rows][columns]`, to rows `stride` apart.
    pub fn write(
        &self,
        gpu: &Gpu,
        [rows, columns]: [usize; 2],
        (to, stride): (&mut CudaViewMut<E>, usize),
    ) -> Result<(), GpuError> {
        match self {
            Self::Wide(values) => {
                let from = (&values.as_view(), Rows::new(rows, columns));
                copy_rows(gpu, from, (to, stride))
            }
            Self::FourBits(matrix) => {
                matrix.widen(gpu, Window::whole([rows, columns]), (to, stride))
            }
        }
    }
}

/// Memory that matrices of 4 bits are widened to, one at a time.
#[derive(Default)]
pub struct Scratch(Mutex<Room>);

#[derive(Default)]
struct Room {
    /// Bytes of the largest that was announced.
    largest: usize,
    buffer: Option<DeviceBuffer<u8>>,
}

impl Scratch {
    /// Announces a matrix of so many scalars.
    pub fn reserve<E>(&self, scalars: usize) {
        let mut room = self.lock();
        room.largest = room.largest.max(scalars * size_of::<E>());
    }

    /// Takes memory for the largest matrix that was announced, if one was.
    pub fn open(&self, gpu: &Gpu) -> Result<(), GpuError> {
        let mut room = self.lock();
        let largest = room.largest;
        match largest {
            0 => Ok(()),
            bytes => room.open(gpu, bytes).map(drop),
        }
    }

    /// Has `write` fill memory of so many scalars, and `read` ask for what is computed with it. Nobody else gets it between the two.
    pub fn with<E: GpuElement>(
        &self,
        gpu: &Gpu,
        scalars: usize,
        write: impl FnOnce(&mut CudaViewMut<E>) -> Result<(), GpuError>,
        read: impl FnOnce(&CudaView<E>) -> Result<(), GpuError>,
    ) -> Result<(), GpuError> {
        const LARGE_ENOUGH: &str = "memory was taken for as many scalars";
        let mut room = self.lock();
        let buffer = room.open(gpu, scalars * size_of::<E>())?;
        {
            // SAFETY: all bits are some number, and a buffer begins where any type may.
            let to = unsafe { buffer.transmute_mut::<E>(scalars) };
            write(&mut to.expect(LARGE_ENOUGH))?;
        }
        // SAFETY: as above.
        let from = unsafe { buffer.transmute::<E>(scalars) };
        read(&from.expect(LARGE_ENOUGH))
    }

    fn lock(&self) -> MutexGuard<'_, Room> {
        // Whoever panicked left a buffer whose content is of no use to the next one.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Room {
    /// The buffer, of so many bytes at least.
    fn open(&mut self, gpu: &Gpu, bytes: usize) -> Result<&mut DeviceBuffer<u8>, GpuError> {
        let held = self.buffer.take();
        // The smaller one goes before the larger one comes.
        let held = held.filter(|buffer| buffer.len() >= bytes);
        let buffer = match held {
            Some(buffer) => buffer,
            None => gpu.take::<u8>(bytes)?,
        };
        Ok(self.buffer.insert(buffer))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::cuda::testing::gpu;

    #[test]
    fn nobody_writes_between_what_another_wrote_and_its_use() {
        let Some(gpu) = gpu() else { return };
        let scratch = Scratch::default();
        scratch.reserve::<f32>(1000);
        scratch.open(gpu).unwrap();
        std::thread::scope(|scope| {
            for number in 1..=4usize {
                let scratch = &scratch;
                scope.spawn(move || {
                    for round in 0..50 {
                        // The last ones are more than was announced.
                        let values = vec![number as f32; 500 * number + round];
                        let write = |to: &mut CudaViewMut<f32>| gpu.write(&values, to);
                        let read = |from: &CudaView<f32>| {
                            let mut found = vec![0.0; values.len()];
                            gpu.read(from, &mut found)?;
                            assert_eq!(found, values);
                            Ok(())
                        };
                        scratch.with(gpu, values.len(), write, read).unwrap();
                    }
                });
            }
        });
    }
}
