//! [`crate::engine::ops::rms_norm`] on the GPU.

use cudarc::driver::{CudaView, CudaViewMut};

use super::elementwise::{COLUMN_TILE, Rows, add_partials, columns_grid};
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{Gpu, Grid};
use crate::engine::cuda::params::{GradientSink, Vector};
use crate::launch;

const THREADS: u32 = 256;

/// Root mean square norm of each row, with its weight `[width]`.
pub struct RmsNorm {
    pub weight: Vector,
    pub epsilon: f32,
}

impl RmsNorm {
    /// Norms each row of `x`, `[tokens][width]`; the rows of `y` are as wide.
    pub fn forward<E: GpuElement>(
        &self,
        gpu: &Gpu,
        x: &CudaView<f32>,
        (y, rows): (&mut CudaViewMut<E>, Rows),
    ) -> Result<(), GpuError> {
        let width = self.weight.scalars();
        assert!(
            rows.columns == width && x.len() == rows.rows * width && y.len() >= rows.len(),
            "rows of a norm"
        );
        let name = format!("rms_norm_forward_{}", E::SUFFIX);
        let grid = Grid::rows(rows.rows, THREADS);
        let (columns, stride) = (width as i32, rows.stride as i32);
        let weight = self.weight.view();
        // SAFETY: x and y have a row of the weight's width for each block.
        unsafe {
            launch!(
                gpu,
                &name,
                grid,
                [x, &weight, y, &columns, &stride, &self.epsilon]
            )
        }
    }

    /// Adds the gradient of `x` to `dx`, and hands over that of the weight where it is trainable.
    pub fn backward(
        &self,
        gpu: &Gpu,
        x: &CudaView<f32>,
        dy: &CudaView<f32>,
        dx: &mut CudaViewMut<f32>,
        sink: &mut dyn GradientSink,
    ) -> Result<(), GpuError> {
        match self.weight.range {
            None => self.backward_into(gpu, (x, dy), dx, None),
            Some(range) => sink.add(gpu, range, &mut |gradient| {
                self.backward_into(gpu, (x, dy), dx, Some(gradient))
            }),
        }
    }

    fn backward_into(
        &self,
        gpu: &Gpu,
        (x, dy): (&CudaView<f32>, &CudaView<f32>),
        dx: &mut CudaViewMut<f32>,
        weight_gradient: Option<&mut CudaViewMut<f32>>,
    ) -> Result<(), GpuError> {
        let width = self.weight.scalars();
        assert!(
            x.len() == dy.len() && x.len() == dx.len() && x.len() % width == 0,
            "rows of a norm"
        );
        let rows = Rows::new(x.len() / width, width);
        if rows.is_empty() {
            return Ok(());
        }
        let mut inverses = gpu.take::<f32>(rows.rows)?;
        let (count, columns) = (rows.rows as i32, width as i32);
        let grid = Grid::rows(rows.rows, THREADS);
        let weight = self.weight.view();
        // SAFETY: all have a row of the weight's width for each block.
        unsafe {
            launch!(
                gpu,
                "rms_norm_backward",
                grid,
                [x, &weight, dy, dx, &mut inverses, &columns, &self.epsilon]
            )?;
        }
        let Some(gradient) = weight_gradient else {
            return Ok(());
        };
        let tiles = rows.rows.div_ceil(COLUMN_TILE);
        let mut partials = gpu.take::<f32>(tiles * width)?;
        let (grid, tile) = (columns_grid(rows, COLUMN_TILE), COLUMN_TILE as i32);
        // SAFETY: as above, and there is a partial sum for each tile.
        unsafe {
            launch!(
                gpu,
                "rms_norm_weight_gradient",
                grid,
                [x, dy, &inverses, &mut partials, &count, &columns, &tile]
            )?;
        }
        add_partials(gpu, &partials.as_view(), tiles, gradient)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::cuda::params::FlatRange;
    use crate::engine::cuda::sums::SlotGradient;
    use crate::engine::cuda::testing::{assert_near, gpu};
    use crate::engine::ops::rms_norm as plain;
    use crate::engine::testing::{TestWeights, random_values};
    use half::bf16;

    #[test]
    fn values_and_gradients_equal_those_of_the_processor() {
        let Some(gpu) = gpu() else { return };
        for (rows, width) in [(1, 5), (300, 64), (3, 1024)] {
            let weights = TestWeights::new(&[("w", &[width])]);
            let range = FlatRange {
                offset: 0,
                scalars: width,
            };
            let weight = Vector::new(gpu, &weights.frozen("w").read_f32(), Some(range)).unwrap();
            let epsilon = 1e-5;
            let norm = RmsNorm { weight, epsilon };
            let expected = plain::RmsNorm {
                weight: weights.trainable("w"),
                epsilon,
                offset: false,
            };
            let (x, dy) = (
                random_values(rows * width, 3),
                random_values(rows * width, 4),
            );
            let (on_gpu, dy_on_gpu) = (gpu.upload(&x).unwrap(), gpu.upload(&dy).unwrap());
            let mut y = vec![0.0f32; x.len()];
            expected.forward(&x, &mut y);
            // Rows that are wider than what is written into them.
            let shape = Rows::strided(rows, width, width + 3);
            let mut wide = gpu.zeroed::<f32>(rows * shape.stride).unwrap();
            norm.forward(gpu, &on_gpu.as_view(), (&mut wide.as_view_mut(), shape))
                .unwrap();
            let found = gpu.download(&wide, rows * shape.stride).unwrap();
            let (inner, outer): (Vec<&[f32]>, Vec<&[f32]>) = found
                .chunks_exact(shape.stride)
                .map(|row| row.split_at(width))
                .unzip();
            assert_near("y", &inner.concat(), &y, 1e-5);
            assert!(outer.concat().iter().all(|x| *x == 0.0));
            let mut narrow = gpu.take::<bf16>(x.len()).unwrap();
            let shape = Rows::new(rows, width);
            norm.forward(gpu, &on_gpu.as_view(), (&mut narrow.as_view_mut(), shape))
                .unwrap();
            let found = gpu.download(&narrow, x.len()).unwrap();
            let found: Vec<f32> = found.into_iter().map(bf16::to_f32).collect();
            assert_near("y in bfloat16", &found, &y, 1e-2);

            weights.reset_gradients();
            let mut dx = x.clone();
            expected.backward(&x, &dy, &mut dx);
            let mut dx_on_gpu = gpu.upload(&x).unwrap();
            let mut dw = SlotGradient(gpu.zeroed(width).unwrap());
            let (x, dy) = (on_gpu.as_view(), dy_on_gpu.as_view());
            norm.backward(gpu, &x, &dy, &mut dx_on_gpu.as_view_mut(), &mut dw)
                .unwrap();
            assert_near(
                "dx",
                &gpu.download(&dx_on_gpu, dx.len()).unwrap(),
                &dx,
                1e-5,
            );
            let found = gpu.download(&dw.0, width).unwrap();
            assert_near("dw", &found, &weights.gradients(&[])[..width], 1e-5);
        }
    }
}
