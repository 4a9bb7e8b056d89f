//! Moments on a GPU, in the buffers that they have in memory ([`common::files::moments`]).

use std::ops::Range;

use common::files::Moment;
use common::files::layout::Layout;
use common::files::moments::{BLOCK_SCALARS, EightBits, MomentPlace};
use common::job::MomentDtype;
use cudarc::driver::CudaViewMut;

use super::error::GpuError;
use super::gpu::{DeviceBuffer, Gpu};
use crate::engine::optim::Codebook;

/// One moment of all trainable scalars, on a GPU.
pub enum GpuMoment {
    Float32(DeviceBuffer<f32>),
    EightBits {
        codes: DeviceBuffer<u8>,
        absmax: DeviceBuffer<f32>,
        float32: DeviceBuffer<f32>,
    },
}

/// A moment of a part of a tensor, which begins with a block.
pub enum GpuMomentPart<'a> {
    Float32(CudaViewMut<'a, f32>),
    EightBits {
        codes: CudaViewMut<'a, u8>,
        absmax: CudaViewMut<'a, f32>,
    },
}

/// What the codes of 8 bits stand for, as the kernels read it: values and limits of what has either sign, and of what is never
/// negative.
pub fn upload_codebooks(gpu: &Gpu) -> Result<DeviceBuffer<f32>, GpuError> {
    let books = [Codebook::signed(), Codebook::unsigned()];
    let books = books.map(|book| [&book.map[..], &book.limits].concat());
    gpu.upload(&books.concat())
}

impl GpuMoment {
    /// A moment as it is before the first update.
    pub fn zeros(gpu: &Gpu, layout: &Layout) -> Result<Self, GpuError> {
        let lengths = layout.eight_bit_lengths();
        Ok(match layout.moments.dtype {
            MomentDtype::Float32 => Self::Float32(gpu.zeroed(layout.scalars)?),
            MomentDtype::EightBits => Self::EightBits {
                codes: gpu.zeroed(lengths.codes)?,
                absmax: gpu.zeroed(lengths.blocks)?,
                float32: gpu.zeroed(lengths.float32)?,
            },
        })
    }

    /// Copies the moment from the GPU.
    pub fn download(&self, gpu: &Gpu, layout: &Layout) -> Result<Moment, GpuError> {
        let lengths = layout.eight_bit_lengths();
        Ok(match self {
            Self::Float32(flat) => Moment::Float32(gpu.download(flat, layout.scalars)?.into()),
            Self::EightBits {
                codes,
                absmax,
                float32,
            } => Moment::EightBits(EightBits {
                codes: gpu.download(codes, lengths.codes)?.into(),
                absmax: gpu.download(absmax, lengths.blocks)?.into(),
                float32: gpu.download(float32, lengths.float32)?.into(),
            }),
        })
    }

    /// Takes over a moment of the same layout.
    pub fn write(&mut self, gpu: &Gpu, moment: &Moment) -> Result<(), GpuError> {
        match (self, moment) {
            (Self::Float32(flat), Moment::Float32(moment)) => gpu.write(moment, flat),
            (
                Self::EightBits {
                    codes,
                    absmax,
                    float32,
                },
                Moment::EightBits(moment),
            ) => {
                if !moment.codes.is_empty() {
                    gpu.write(&moment.codes, codes)?;
                    gpu.write(&moment.absmax, absmax)?;
                }
                match moment.float32.is_empty() {
                    true => Ok(()),
                    false => gpu.write(&moment.float32, float32),
                }
            }
            _ => unreachable!("a state of the same layout"),
        }
    }

    /// The moment of some scalars of the tensor at this place; the first of them begins a block.
    pub fn part(&mut self, place: MomentPlace, scalars: Range<usize>) -> GpuMomentPart<'_> {
        let at = |start: usize| start + scalars.start..start + scalars.end;
        match (self, place) {
            (Self::Float32(flat), MomentPlace::Float32 { scalar })
            | (Self::EightBits { float32: flat, .. }, MomentPlace::Float32 { scalar }) => {
                GpuMomentPart::Float32(flat.slice_mut(at(scalar)))
            }
            (Self::EightBits { codes, absmax, .. }, MomentPlace::EightBits { code, block }) => {
                let first = block + scalars.start / BLOCK_SCALARS;
                let last = block + scalars.end.div_ceil(BLOCK_SCALARS);
                GpuMomentPart::EightBits {
                    codes: codes.slice_mut(at(code)),
                    absmax: absmax.slice_mut(first..last),
                }
            }
            (Self::Float32(_), MomentPlace::EightBits { .. }) => {
                unreachable!("a place of the same layout")
            }
        }
    }
}
