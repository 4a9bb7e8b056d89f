//! Updates of what has moments of 8 bits: rounding by rounding what `engine/optim/eight_bits.rs` does.

use common::files::moments::BLOCK_SCALARS;
use cudarc::driver::{CudaView, CudaViewMut};

use crate::engine::cuda::GpuError;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu, Grid};
use crate::engine::cuda::moments::GpuMomentPart;
use crate::engine::optim::{Factors, LionFactors};
use crate::launch;

/// What every update of 8 bits takes.
pub(super) struct In8Bit<'a> {
    pub gpu: &'a Gpu,
    pub gradient: &'a CudaView<'a, f32>,
    pub codebooks: &'a DeviceBuffer<f32>,
}

impl In8Bit<'_> {
    /// Updates a tensor by AdamW, or a part of it that begins with a block.
    pub fn adamw(
        &self,
        factors: &Factors,
        weights: &mut CudaViewMut<f32>,
        moments: [&mut GpuMomentPart; 2],
    ) -> Result<(), GpuError> {
        let [
            GpuMomentPart::EightBits {
                codes: first_codes,
                absmax: first_absmax,
            },
            GpuMomentPart::EightBits {
                codes: second_codes,
                absmax: second_absmax,
            },
        ] = moments
        else {
            unreachable!("both moments of a tensor are kept alike")
        };
        let grid = self.grid(weights, (first_codes, first_absmax));
        self.grid(weights, (second_codes, second_absmax));
        let length = weights.len() as i64;
        let Factors {
            gradient_scale,
            keep,
            one_minus_beta1,
            beta2,
            one_minus_beta2,
            correction2_sqrt,
            epsilon,
            step_size,
        } = factors;
        // SAFETY: all are as long as the kernel goes, with a number for each block, and shared memory for one of each thread.
        unsafe {
            launch!(
                self.gpu,
                "adamw_8bit",
                grid,
                [
                    weights,
                    first_codes,
                    first_absmax,
                    second_codes,
                    second_absmax,
                    self.gradient,
                    self.codebooks,
                    &length,
                    gradient_scale,
                    keep,
                    one_minus_beta1,
                    beta2,
                    one_minus_beta2,
                    correction2_sqrt,
                    epsilon,
                    step_size
                ]
            )
        }
    }

    /// Updates a tensor by Lion, or a part of it that begins with a block.
    pub fn lion(
        &self,
        factors: &LionFactors,
        weights: &mut CudaViewMut<f32>,
        moment: &mut GpuMomentPart,
    ) -> Result<(), GpuError> {
        let GpuMomentPart::EightBits { codes, absmax } = moment else {
            unreachable!("a moment in float32 has a kernel of its own")
        };
        let grid = self.grid(weights, (codes, absmax));
        let length = weights.len() as i64;
        let LionFactors {
            gradient_scale,
            keep,
            beta1,
            one_minus_beta1,
            beta2,
            one_minus_beta2,
            learning_rate,
        } = factors;
        // SAFETY: as for AdamW.
        unsafe {
            launch!(
                self.gpu,
                "lion_8bit",
                grid,
                [
                    weights,
                    codes,
                    absmax,
                    self.gradient,
                    self.codebooks,
                    &length,
                    gradient_scale,
                    keep,
                    beta1,
                    one_minus_beta1,
                    beta2,
                    one_minus_beta2,
                    learning_rate
                ]
            )
        }
    }

    /// A thread for each scalar, a thread block for each block.
    fn grid(
        &self,
        weights: &CudaViewMut<f32>,
        (codes, absmax): (&CudaViewMut<u8>, &CudaViewMut<f32>),
    ) -> Grid {
        let scalars = weights.len();
        let blocks = scalars.div_ceil(BLOCK_SCALARS);
        assert!(
            codes.len() == scalars && absmax.len() == blocks && self.gradient.len() == scalars,
            "weights, moments and gradient differ in length"
        );
        Grid {
            shared: (BLOCK_SCALARS * size_of::<f32>()) as u32,
            ..Grid::rows(blocks, BLOCK_SCALARS as u32)
        }
    }
}
