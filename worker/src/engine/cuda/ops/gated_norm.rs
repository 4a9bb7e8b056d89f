//! [`crate::engine::ops::gated_norm`] on the GPU.

use cudarc::driver::{CudaView, CudaViewMut};

use super::elementwise::{Rows, add_partials};
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{Gpu, Grid};
use crate::engine::cuda::params::{GradientSink, Vector};
use crate::launch;

const THREADS: u32 = 256;
const WARPS: usize = 8;
/// Heads of tokens whose sum is made by one block. Part of the numerics.
const TILE: usize = 128;

/// The norm, with the weight of a head, the same for all.
pub struct GatedNorm {
    pub weight: Vector,
    pub epsilon: f32,
}

impl GatedNorm {
    /// Computes rows of `y` of `x`, `[tokens][heads * width]`, and the gates in rows as wide.
    pub fn forward<E: GpuElement>(
        &self,
        gpu: &Gpu,
        x: &CudaView<E>,
        (gates, gate_rows): (&CudaView<E>, Rows),
        (y, rows): (&mut CudaViewMut<E>, Rows),
    ) -> Result<(), GpuError> {
        self.check(x.len(), (gates.len(), gate_rows));
        self.check(x.len(), (y.len(), rows));
        let name = format!("gated_norm_forward_{}", E::SUFFIX);
        let [heads, width] = self.sizes(rows);
        let vectors = self.vectors(rows);
        let grid = Grid::rows(vectors.div_ceil(WARPS), THREADS);
        let (count, weight) = (vectors as i64, self.weight.view());
        let (gate_stride, stride) = (gate_rows.stride as i64, rows.stride as i64);
        // SAFETY: all were checked to have a row of all heads for each token.
        unsafe {
            launch!(
                gpu,
                &name,
                grid,
                [
                    x,
                    gates,
                    &weight,
                    y,
                    &count,
                    &heads,
                    &width,
                    &gate_stride,
                    &stride,
                    &self.epsilon
                ]
            )
        }
    }

    /// Turns `dy`, the gradient of the result, into that of `x`, writes that of the gates, and hands over that of the weight where it
    /// is trainable.
    pub fn backward<E: GpuElement>(
        &self,
        gpu: &Gpu,
        x: &CudaView<E>,
        (gates, gate_rows): (&CudaView<E>, Rows),
        dy: &mut CudaViewMut<f32>,
        (d_gates, d_rows): (&mut CudaViewMut<E>, Rows),
        sink: &mut dyn GradientSink,
    ) -> Result<(), GpuError> {
        self.check(x.len(), (gates.len(), gate_rows));
        self.check(x.len(), (d_gates.len(), d_rows));
        assert_eq!(dy.len(), x.len(), "a gradient for each result");
        let name = format!("gated_norm_backward_{}", E::SUFFIX);
        let [heads, width] = self.sizes(gate_rows);
        let vectors = self.vectors(gate_rows);
        let tiles = vectors.div_ceil(TILE);
        let scalars = self.weight.scalars();
        let mut partials = gpu.take::<f32>(tiles * scalars)?;
        let grid = Grid {
            shared: (WARPS * scalars * size_of::<f32>()) as u32,
            ..Grid::rows(tiles, THREADS)
        };
        let (count, tile, weight) = (vectors as i64, TILE as i32, self.weight.view());
        let (gate_stride, d_stride) = (gate_rows.stride as i64, d_rows.stride as i64);
        // SAFETY: all were checked to have a row of all heads for each token, and there are partial sums for each tile.
        unsafe {
            launch!(
                gpu,
                &name,
                grid,
                [
                    x,
                    gates,
                    &weight,
                    dy,
                    d_gates,
                    &mut partials,
                    &count,
                    &heads,
                    &width,
                    &gate_stride,
                    &d_stride,
                    &self.epsilon,
                    &tile
                ]
            )?;
        }
        match self.weight.range {
            Some(range) => sink.add(gpu, range, &mut |gradient| {
                add_partials(gpu, &partials.as_view(), tiles, gradient)
            }),
            None => Ok(()),
        }
    }

    fn check(&self, scalars: usize, (len, rows): (usize, Rows)) {
        assert!(
            rows.rows * rows.columns == scalars
                && len >= rows.len()
                && rows.columns.is_multiple_of(self.weight.scalars()),
            "rows of heads"
        );
    }

    /// Heads of a token, and how wide they are.
    fn sizes(&self, rows: Rows) -> [i32; 2] {
        let width = self.weight.scalars();
        [rows.columns / width, width].map(|size| size as i32)
    }

    fn vectors(&self, rows: Rows) -> usize {
        rows.rows * rows.columns / self.weight.scalars()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::cuda::params::FlatRange;
    use crate::engine::cuda::sums::SlotGradient;
    use crate::engine::cuda::testing::{assert_near, gpu};
    use crate::engine::ops::gated_norm as plain;
    use crate::engine::ops::matrix::View;
    use crate::engine::testing::{TestWeights, random_values};

    const TOKENS: usize = 70;
    const HEADS: usize = 3;

    #[test]
    fn values_and_gradients_equal_those_of_the_processor() {
        let Some(gpu) = gpu() else { return };
        for width in [20, 130] {
            check(gpu, width);
        }
    }

    fn check(gpu: &Gpu, width: usize) {
        let weights = TestWeights::new(&[("w", &[width])]);
        let expected = plain::GatedNorm {
            weight: weights.trainable("w"),
            epsilon: 1e-5,
        };
        let range = FlatRange {
            offset: 0,
            scalars: width,
        };
        let norm = GatedNorm {
            weight: Vector::new(gpu, &weights.frozen("w").read_f32(), Some(range)).unwrap(),
            epsilon: 1e-5,
        };
        let columns = HEADS * width;
        // Gates behind other columns, results with room behind them.
        let gate_rows = Rows::strided(TOKENS, columns, columns + 3);
        let rows = Rows::strided(TOKENS, columns, columns + 8);
        let x = random_values(TOKENS * columns, 1);
        let gates = random_values(TOKENS * gate_rows.stride, 2);
        let dy = random_values(TOKENS * columns, 3);
        let view = View::new(&gates[..], TOKENS, gate_rows.stride).part(3, columns);
        let mut y = vec![0.0f32; x.len()];
        expected.forward(&x, view, &mut y);
        let on_gpu = [&x, &gates].map(|values| gpu.upload(values).unwrap());
        let (x_view, gates_on_gpu) = (on_gpu[0].as_view(), on_gpu[1].slice(3..));
        let from = (&gates_on_gpu, gate_rows);
        let mut found = gpu.zeroed::<f32>(TOKENS * rows.stride).unwrap();
        norm.forward(gpu, &x_view, from, (&mut found.as_view_mut(), rows))
            .unwrap();
        let found = gpu.download(&found, TOKENS * rows.stride).unwrap();
        let inner: Vec<f32> = found
            .chunks_exact(rows.stride)
            .flat_map(|row| row[..columns].to_vec())
            .collect();
        assert_near("y", &inner, &y, 1e-5);

        weights.reset_gradients();
        let (mut dx, mut d_gates) = (dy.clone(), vec![0.0f32; gates.len()]);
        expected.backward(&x, view, &mut dx, (&mut d_gates, gate_rows.stride, 3));
        let mut dx_on_gpu = gpu.upload(&dy).unwrap();
        let mut d_found = gpu.zeroed::<f32>(gates.len()).unwrap();
        let mut dw = SlotGradient(gpu.zeroed(width).unwrap());
        norm.backward(
            gpu,
            &x_view,
            from,
            &mut dx_on_gpu.as_view_mut(),
            (&mut d_found.slice_mut(3..), gate_rows),
            &mut dw,
        )
        .unwrap();
        let found = gpu.download(&dx_on_gpu, dx.len()).unwrap();
        assert_near("dx", &found, &dx, 1e-5);
        let found = gpu.download(&d_found, d_gates.len()).unwrap();
        assert_near("d_gates", &found, &d_gates, 1e-5);
        let found = gpu.download(&dw.0, width).unwrap();
        assert_near("dw", &found, &weights.gradients(&[])[..width], 1e-5);
    }
}
