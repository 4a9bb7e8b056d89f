//! [`crate::engine::ops::causal_conv`] on the GPU.

use cudarc::driver::{CudaView, CudaViewMut};

use super::elementwise::{COLUMN_TILE, Rows, add_partials, columns_grid, round_rows};
use crate::engine::cuda::GpuError;
use crate::engine::cuda::batch::Borders;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu, Grid};
use crate::engine::cuda::params::{FlatRange, GradientSink};
use crate::launch;

/// The convolution, with its weights `[channels][kernel]`.
pub struct CausalConv<E> {
    pub values: DeviceBuffer<E>,
    pub channels: usize,
    pub kernel: usize,
    /// Range of the weights among the trainable scalars, where they are trainable.
    pub range: Option<FlatRange>,
}

impl<E: GpuElement> CausalConv<E> {
    /// Takes over the trainable weights after an update.
    pub fn refresh(&mut self, gpu: &Gpu, flat: &DeviceBuffer<f32>) -> Result<(), GpuError> {
        let rows = Rows::new(self.channels, self.kernel);
        match self.range {
            Some(range) => {
                let to = (&mut self.values.as_view_mut(), rows);
                round_rows(gpu, (&range.of(flat), rows), to, 1.0)
            }
            None => Ok(()),
        }
    }

    /// Computes `y`, `[tokens][channels]`, from the first columns of rows of `x`. The borders are those of segments.
    pub fn forward(
        &self,
        gpu: &Gpu,
        (x, rows): (&CudaView<E>, Rows),
        borders: &Borders,
        y: &mut DeviceBuffer<f32>,
    ) -> Result<(), GpuError> {
        self.check((x.len(), rows), y.len());
        let name = format!("causal_conv_forward_{}", E::SUFFIX);
        let (tokens, stride) = (rows.rows as i64, rows.stride as i64);
        let (channels, kernel) = (self.channels as i32, self.kernel as i32);
        // SAFETY: x was checked to hold its rows, y a row for each; borders are of tokens that there are.
        unsafe {
            launch!(
                gpu,
                &name,
                self.grid(rows),
                [
                    x,
                    &self.values,
                    &borders.starts,
                    y,
                    &tokens,
                    &channels,
                    &stride,
                    &kernel
                ]
            )
        }
    }

    /// Writes the gradient of `x` into the first columns of rows of `dx`, from that of the result, and hands over that of the weights
    /// where they are trainable. Leaves anything in `dy`.
    pub fn backward(
        &self,
        gpu: &Gpu,
        (x, rows): (&CudaView<E>, Rows),
        borders: &Borders,
        dy: &mut DeviceBuffer<f32>,
        (dx, d_rows): (&mut CudaViewMut<E>, Rows),
        sink: &mut dyn GradientSink,
    ) -> Result<(), GpuError> {
        self.check((x.len(), rows), dy.len());
        self.check((dx.len(), d_rows), dy.len());
        let (tokens, stride) = (rows.rows as i64, rows.stride as i64);
        let (channels, kernel) = (self.channels as i32, self.kernel as i32);
        let d_stride = d_rows.stride as i64;
        let (to_read, back) = (
            format!("causal_conv_silu_backward_{}", E::SUFFIX),
            format!("causal_conv_backward_{}", E::SUFFIX),
        );
        // SAFETY: as forward; dx was checked to hold its rows.
        unsafe {
            launch!(
                gpu,
                &to_read,
                self.grid(rows),
                [
                    x,
                    &self.values,
                    &borders.starts,
                    &mut *dy,
                    &tokens,
                    &channels,
                    &stride,
                    &kernel
                ]
            )?;
            launch!(
                gpu,
                &back,
                self.grid(rows),
                [
                    &*dy,
                    &self.values,
                    &borders.ends,
                    dx,
                    &tokens,
                    &channels,
                    &d_stride,
                    &kernel
                ]
            )?;
        }
        self.weight_gradient(gpu, (x, rows), borders, dy, sink)
    }

    /// Hands over the gradient of the weights, from that of what SiLU reads.
    fn weight_gradient(
        &self,
        gpu: &Gpu,
        (x, rows): (&CudaView<E>, Rows),
        borders: &Borders,
        d_read: &DeviceBuffer<f32>,
        sink: &mut dyn GradientSink,
    ) -> Result<(), GpuError> {
        let Some(range) = self.range else {
            return Ok(());
        };
        let tiles = rows.rows.div_ceil(COLUMN_TILE);
        let mut partials = gpu.take::<f32>(tiles * self.channels * self.kernel)?;
        let name = format!("causal_conv_weight_gradient_{}", E::SUFFIX);
        let grid = columns_grid(Rows::new(rows.rows, self.channels), COLUMN_TILE);
        let (tokens, stride, tile) = (rows.rows as i32, rows.stride as i64, COLUMN_TILE as i32);
        let (channels, kernel) = (self.channels as i32, self.kernel as i32);
        // SAFETY: as forward, and there are partial sums for each tile.
        unsafe {
            launch!(
                gpu,
                &name,
                grid,
                [
                    x,
                    d_read,
                    &borders.starts,
                    &mut partials,
                    &tokens,
                    &channels,
                    &stride,
                    &kernel,
                    &tile
                ]
            )?;
        }
        sink.add(gpu, range, &mut |gradient| {
            add_partials(gpu, &partials.as_view(), tiles, gradient)
        })
    }

    fn check(&self, (scalars, rows): (usize, Rows), dense: usize) {
        assert!(
            rows.columns == self.channels
                && scalars >= rows.len()
                && dense >= rows.rows * self.channels
                && self.values.len() >= self.channels * self.kernel,
            "a row for each token"
        );
    }

    fn grid(&self, rows: Rows) -> Grid {
        Grid::scalars(rows.rows * self.channels)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::cuda::sums::SlotGradient;
    use crate::engine::cuda::testing::{assert_near, gpu};
    use crate::engine::ops::causal_conv as plain;
    use crate::engine::ops::matrix::View;
    use crate::engine::testing::{TestWeights, random_values};

    const SEGMENTS: [usize; 6] = [3, 1, 70, 2, 9, 64];
    const CHANNELS: usize = 300;

    /// Columns of other things beside the channels.
    #[test]
    fn values_and_gradients_equal_those_of_the_processor() {
        let Some(gpu) = gpu() else { return };
        for kernel in [1, 4] {
            check(gpu, kernel);
        }
    }

    fn check(gpu: &Gpu, kernel: usize) {
        let tokens: usize = SEGMENTS.iter().sum();
        let positions: Vec<u32> = SEGMENTS.iter().flat_map(|n| 0..*n as u32).collect();
        let borders = Borders::of(gpu, &positions).unwrap();
        let weights = TestWeights::new(&[("w", &[CHANNELS, 1, kernel])]);
        let expected = plain::CausalConv {
            weight: weights.trainable("w"),
        };
        let conv = CausalConv {
            values: gpu.upload(&weights.frozen("w").read_f32()).unwrap(),
            channels: CHANNELS,
            kernel,
            range: Some(FlatRange {
                offset: 0,
                scalars: CHANNELS * kernel,
            }),
        };
        let rows = Rows::strided(tokens, CHANNELS, CHANNELS + 5);
        let (x, dy) = (
            random_values(tokens * rows.stride, 1),
            random_values(tokens * CHANNELS, 2),
        );
        let view = View::new(&x[..], tokens, rows.stride).part(0, CHANNELS);
        let mut y = vec![0.0; dy.len()];
        expected.forward(view, &positions, &mut y);
        let on_gpu = gpu.upload(&x).unwrap();
        let mut found = gpu.take::<f32>(y.len()).unwrap();
        let from = (&on_gpu.as_view(), rows);
        conv.forward(gpu, from, &borders, &mut found).unwrap();
        assert_near("y", &gpu.download(&found, y.len()).unwrap(), &y, 1e-5);

        weights.reset_gradients();
        let (mut d, mut dx) = (dy.clone(), vec![0.0; x.len()]);
        expected.backward(view, &positions, &mut d, (&mut dx, rows.stride));
        let mut d = gpu.upload(&dy).unwrap();
        let mut found = gpu.zeroed::<f32>(x.len()).unwrap();
        let mut dw = SlotGradient(gpu.zeroed(CHANNELS * kernel).unwrap());
        let to = (&mut found.as_view_mut(), rows);
        conv.backward(gpu, from, &borders, &mut d, to, &mut dw)
            .unwrap();
        // What lies beside the channels is left alone.
        assert_near("dx", &gpu.download(&found, x.len()).unwrap(), &dx, 1e-5);
        let expected = &weights.gradients(&[])[..CHANNELS * kernel];
        let found = gpu.download(&dw.0, expected.len()).unwrap();
        assert_near("dw", &found, expected, 1e-5);
    }
}
