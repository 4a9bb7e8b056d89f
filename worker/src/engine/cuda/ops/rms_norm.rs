//! [`crate::engine::ops::rms_norm`] on the GPU.

use cudarc::driver::{CudaView, CudaViewMut};

use super::elementwise::{COLUMN_TILE, Rows, add_partials, columns_grid};
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu, Grid};
use crate::engine::cuda::params::{GradientSink, Vector};
use crate::launch;

const THREADS: u32 = 256;

/// Root mean square norm of each row, with its weight `[width]`.
pub struct RmsNorm {
    pub weight: Vector,
    pub epsilon: f32,
    /// Whether it multiplies by 1 + weight.
    pub offset: bool,
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
        let (columns, stride, offset) = (width as i32, rows.stride as i32, self.offset());
        let weight = self.weight.view();
        // SAFETY: x and y have a row of the weight's width for each block.
        unsafe {
            launch!(
                gpu,
                &name,
                grid,
                [x, &weight, y, &columns, &stride, &self.epsilon, &offset]
            )
        }
    }

    /// `y = residual + scale · norm(x)`, all of them `[tokens][width]`.
    pub fn forward_onto(
        &self,
        gpu: &Gpu,
        (residual, scale): (&CudaView<f32>, f32),
        x: &CudaView<f32>,
        y: &mut CudaViewMut<f32>,
    ) -> Result<(), GpuError> {
        let rows = self.rows(x);
        assert!(
            residual.len() == x.len() && y.len() == x.len(),
            "rows of a norm"
        );
        let (columns, offset) = (rows.columns as i32, self.offset());
        let (grid, weight) = (Grid::rows(rows.rows, THREADS), self.weight.view());
        // SAFETY: all have a row of the weight's width for each block.
        unsafe {
            launch!(
                gpu,
                "rms_norm_onto",
                grid,
                [
                    x,
                    &weight,
                    residual,
                    y,
                    &columns,
                    &self.epsilon,
                    &offset,
                    &scale
                ]
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
        let rows = self.rows(x);
        assert!(x.len() == dy.len() && x.len() == dx.len(), "rows of a norm");
        if rows.is_empty() {
            return Ok(());
        }
        let mut inverses = gpu.take::<f32>(rows.rows)?;
        let (columns, offset) = (rows.columns as i32, self.offset());
        let (grid, weight) = (Grid::rows(rows.rows, THREADS), self.weight.view());
        // SAFETY: all have a row of the weight's width for each block.
        unsafe {
            launch!(
                gpu,
                "rms_norm_backward",
                grid,
                [
                    x,
                    &weight,
                    dy,
                    dx,
                    &mut inverses,
                    &columns,
                    &self.epsilon,
                    &offset
                ]
            )?;
        }
        self.weight_gradient(gpu, (x, dy), (&inverses, 1.0), sink)
    }

    /// Writes the gradient of `x`, rounded, into rows as wide as its own, from `scale · dy`, and hands over that of the weight where
    /// it is trainable.
    pub fn backward_rounded<E: GpuElement>(
        &self,
        gpu: &Gpu,
        x: &CudaView<f32>,
        (dy, scale): (&CudaView<f32>, f32),
        (dx, to): (&mut CudaViewMut<E>, Rows),
        sink: &mut dyn GradientSink,
    ) -> Result<(), GpuError> {
        let rows = self.rows(x);
        assert!(
            x.len() == dy.len()
                && (to.rows, to.columns) == (rows.rows, rows.columns)
                && dx.len() >= to.len(),
            "rows of a norm"
        );
        if rows.is_empty() {
            return Ok(());
        }
        let mut inverses = gpu.take::<f32>(rows.rows)?;
        let (columns, stride, offset) = (rows.columns as i32, to.stride as i32, self.offset());
        let (grid, weight) = (Grid::rows(rows.rows, THREADS), self.weight.view());
        let name = format!("rms_norm_backward_rounded_{}", E::SUFFIX);
        // SAFETY: all have a row of the weight's width for each block.
        unsafe {
            launch!(
                gpu,
                &name,
                grid,
                [
                    x,
                    &weight,
                    dy,
                    dx,
                    &mut inverses,
                    &columns,
                    &stride,
                    &self.epsilon,
                    &offset,
                    &scale
                ]
            )?;
        }
        self.weight_gradient(gpu, (x, dy), (&inverses, scale), sink)
    }

    /// Hands over the gradient of the weight, from `scale · dy`, where it is trainable.
    fn weight_gradient(
        &self,
        gpu: &Gpu,
        (x, dy): (&CudaView<f32>, &CudaView<f32>),
        (inverses, scale): (&DeviceBuffer<f32>, f32),
        sink: &mut dyn GradientSink,
    ) -> Result<(), GpuError> {
        let Some(range) = self.weight.range else {
            return Ok(());
        };
        let rows = self.rows(x);
        let tiles = rows.rows.div_ceil(COLUMN_TILE);
        let (count, columns) = (rows.rows as i32, rows.columns as i32);
        let mut partials = gpu.take::<f32>(tiles * rows.columns)?;
        let (grid, tile) = (columns_grid(rows, COLUMN_TILE), COLUMN_TILE as i32);
        // SAFETY: both have the rows that were counted, and there is a partial sum for each tile.
        unsafe {
            launch!(
                gpu,
                "rms_norm_weight_gradient",
                grid,
                [
                    x,
                    dy,
                    inverses,
                    &mut partials,
                    &count,
                    &columns,
                    &tile,
                    &scale
                ]
            )?;
        }
        sink.add(gpu, range, &mut |gradient| {
            add_partials(gpu, &partials.as_view(), tiles, gradient)
        })
    }

    fn rows(&self, x: &CudaView<f32>) -> Rows {
        let width = self.weight.scalars();
        assert!(x.len().is_multiple_of(width), "rows of a norm");
        Rows::new(x.len() / width, width)
    }

    /// What is added to the weights.
    fn offset(&self) -> f32 {
        f32::from(u8::from(self.offset))
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
        for (rows, width, offset) in [
            (1, 5, false),
            (300, 64, false),
            (3, 1024, false),
            (130, 48, true),
        ] {
            check(gpu, (rows, width), offset);
        }
    }

    fn check(gpu: &Gpu, (rows, width): (usize, usize), offset: bool) {
        let weights = TestWeights::new(&[("w", &[width])]);
        let range = FlatRange {
            offset: 0,
            scalars: width,
        };
        let weight = Vector::new(gpu, &weights.frozen("w").read_f32(), Some(range)).unwrap();
        let epsilon = 1e-5;
        let norm = RmsNorm {
            weight,
            epsilon,
            offset,
        };
        let expected = plain::RmsNorm {
            weight: weights.trainable("w"),
            epsilon,
            offset,
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
        let apart = |wide: Vec<f32>| -> (Vec<f32>, Vec<f32>) {
            let rows = wide.chunks_exact(shape.stride);
            let (inner, outer): (Vec<_>, Vec<_>) = rows.map(|row| row.split_at(width)).unzip();
            (inner.concat(), outer.concat())
        };
        let mut wide = gpu.zeroed::<f32>(rows * shape.stride).unwrap();
        norm.forward(gpu, &on_gpu.as_view(), (&mut wide.as_view_mut(), shape))
            .unwrap();
        let (inner, outer) = apart(gpu.download(&wide, rows * shape.stride).unwrap());
        assert_near("y", &inner, &y, 1e-5);
        assert!(outer.iter().all(|x| *x == 0.0));
        let mut narrow = gpu.take::<bf16>(x.len()).unwrap();
        let out = (&mut narrow.as_view_mut(), Rows::new(rows, width));
        norm.forward(gpu, &on_gpu.as_view(), out).unwrap();
        let found = gpu.download(&narrow, x.len()).unwrap();
        let found: Vec<f32> = found.into_iter().map(bf16::to_f32).collect();
        assert_near("y in bfloat16", &found, &y, 1e-2);
        let (x_view, dy_view) = (on_gpu.as_view(), dy_on_gpu.as_view());
        let mut onto = gpu.take::<f32>(x.len()).unwrap();
        norm.forward_onto(gpu, (&dy_view, 0.5), &x_view, &mut onto.as_view_mut())
            .unwrap();
        let sums: Vec<f32> = dy.iter().zip(&y).map(|(dy, y)| dy + 0.5 * y).collect();
        assert_near("sum", &gpu.download(&onto, x.len()).unwrap(), &sums, 1e-5);

        weights.reset_gradients();
        let (mut dx, mut alone) = (x.clone(), vec![0.0f32; x.len()]);
        expected.backward(&x, &dy, &mut dx);
        let dw_expected = weights.gradients(&[])[..width].to_vec();
        expected.backward(&x, &dy, &mut alone);
        let mut dx_on_gpu = gpu.upload(&x).unwrap();
        let mut dw = SlotGradient(gpu.zeroed(width).unwrap());
        norm.backward(
            gpu,
            &x_view,
            &dy_view,
            &mut dx_on_gpu.as_view_mut(),
            &mut dw,
        )
        .unwrap();
        let found = gpu.download(&dx_on_gpu, dx.len()).unwrap();
        assert_near("dx", &found, &dx, 1e-5);
        let found = gpu.download(&dw.0, width).unwrap();
        assert_near("dw", &found, &dw_expected, 1e-5);

        let half = |values: Vec<f32>| -> Vec<f32> { values.into_iter().map(|x| 0.5 * x).collect() };
        let mut wide = gpu.zeroed::<f32>(rows * shape.stride).unwrap();
        let (scaled, out) = ((&dy_view, 0.5), (&mut wide.as_view_mut(), shape));
        norm.backward_rounded(gpu, &x_view, scaled, out, &mut dw)
            .unwrap();
        let (inner, outer) = apart(gpu.download(&wide, rows * shape.stride).unwrap());
        assert_near("half of dx", &inner, &half(alone), 1e-5);
        assert!(outer.iter().all(|x| *x == 0.0));
        let found = gpu.download(&dw.0, width).unwrap();
        assert_near("half of dw", &found, &half(dw_expected), 1e-5);
    }
}
