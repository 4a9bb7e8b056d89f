//! [`crate::engine::ops::delta_gates`] on the GPU.

use cudarc::driver::{CudaView, CudaViewMut};

use super::delta_rule::RuleBuffers;
use super::elementwise::{COLUMN_TILE, Rows, add_partials, columns_grid};
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu, Grid};
use crate::engine::cuda::params::{GradientSink, Vector};
use crate::launch;

/// The gates of all heads, with weights `[heads]`.
pub struct DeltaGates {
    /// The logarithm of how fast each head forgets.
    pub decay: Vector,
    pub bias: Vector,
}

impl DeltaGates {
    /// Takes over the trainable weights after an update.
    pub fn refresh(&mut self, gpu: &Gpu, flat: &DeviceBuffer<f32>) -> Result<(), GpuError> {
        self.decay.refresh(gpu, flat)?;
        self.bias.refresh(gpu, flat)
    }

    /// Computes the gates that the rule reads from rows of what says how much is written, then how much is kept, of each head.
    pub fn forward<E: GpuElement>(
        &self,
        gpu: &Gpu,
        (projected, rows): (&CudaView<E>, Rows),
        gates: &mut RuleBuffers,
    ) -> Result<(), GpuError> {
        let heads = self.check((projected.len(), rows), gates);
        let name = format!("delta_gates_forward_{}", E::SUFFIX);
        let (tokens, stride) = (rows.rows as i64, rows.stride as i64);
        let (decay, bias) = (self.decay.view(), self.bias.view());
        let grid = Grid::scalars(rows.rows * rows.columns / 2);
        // SAFETY: rows and gates were checked to be of the same tokens and heads.
        unsafe {
            launch!(
                gpu,
                &name,
                grid,
                [
                    projected,
                    &decay,
                    &bias,
                    &mut gates.written,
                    &mut gates.kept,
                    &tokens,
                    &heads,
                    &stride
                ]
            )
        }
    }

    /// Writes the gradient of what was projected, from those of the gates, and hands over those of the weights where they are
    /// trainable.
    pub fn backward<E: GpuElement>(
        &self,
        gpu: &Gpu,
        (projected, rows): (&CudaView<E>, Rows),
        gradients: &RuleBuffers,
        (d_projected, d_rows): (&mut CudaViewMut<E>, Rows),
        sink: &mut dyn GradientSink,
    ) -> Result<(), GpuError> {
        let heads = self.check((projected.len(), rows), gradients);
        self.check((d_projected.len(), d_rows), gradients);
        let tiles = rows.rows.div_ceil(COLUMN_TILE);
        let own = tiles * rows.columns / 2;
        let mut partials = gpu.take::<f32>(2 * own)?;
        let name = format!("delta_gates_backward_{}", E::SUFFIX);
        let (tokens, tile) = (rows.rows as i32, COLUMN_TILE as i32);
        let (stride, d_stride) = (rows.stride as i64, d_rows.stride as i64);
        let (decay, bias) = (self.decay.view(), self.bias.view());
        let grid = columns_grid(Rows::new(rows.rows, rows.columns / 2), COLUMN_TILE);
        // SAFETY: as forward, and there are partial sums for each tile.
        unsafe {
            launch!(
                gpu,
                &name,
                grid,
                [
                    projected,
                    &decay,
                    &bias,
                    &gradients.written,
                    &gradients.kept,
                    d_projected,
                    &mut partials,
                    &tokens,
                    &heads,
                    &stride,
                    &d_stride,
                    &tile
                ]
            )?;
        }
        let partials = [partials.slice(..own), partials.slice(own..2 * own)];
        for (weight, partials) in [&self.decay, &self.bias].into_iter().zip(partials) {
            if let Some(range) = weight.range {
                sink.add(gpu, range, &mut |gradient| {
                    add_partials(gpu, &partials, tiles, gradient)
                })?;
            }
        }
        Ok(())
    }

    /// Number of heads.
    fn check(&self, (scalars, rows): (usize, Rows), gates: &RuleBuffers) -> i32 {
        let heads = self.decay.scalars();
        let count = rows.rows * heads;
        assert!(
            rows.columns == 2 * heads
                && scalars >= rows.len()
                && gates.written.len() >= count
                && gates.kept.len() >= count,
            "gates of each token and head"
        );
        heads as i32
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::cuda::params::FlatRange;
    use crate::engine::cuda::sums::SlotGradient;
    use crate::engine::cuda::testing::{assert_near, gpu};
    use crate::engine::ops::delta_gates as plain;
    use crate::engine::ops::delta_rule::DeltaHeads;
    use crate::engine::ops::matrix::View;
    use crate::engine::testing::{TestWeights, random_values};

    const HEADS: usize = 3;
    const TOKENS: usize = 150;

    #[test]
    fn values_and_gradients_equal_those_of_the_processor() {
        let Some(gpu) = gpu() else { return };
        let weights = TestWeights::new(&[("decay", &[HEADS]), ("bias", &[HEADS])]);
        let vector = |name: &str, offset| {
            let range = FlatRange {
                offset,
                scalars: HEADS,
            };
            Vector::new(gpu, &weights.frozen(name).read_f32(), Some(range)).unwrap()
        };
        let gates = DeltaGates {
            decay: vector("decay", HEADS),
            bias: vector("bias", 0),
        };
        let expected = plain::DeltaGates {
            decay: weights.trainable("decay"),
            bias: weights.trainable("bias"),
        };
        // Behind other columns.
        let rows = Rows::strided(TOKENS, 2 * HEADS, 2 * HEADS + 7);
        let x: Vec<f32> = random_values(TOKENS * rows.stride, 1)
            .into_iter()
            .map(|x| 5.0 * x)
            .collect();
        let view = View::new(&x[..], TOKENS, rows.stride).part(7, 2 * HEADS);
        let (mut written, mut kept) = (vec![0.0; TOKENS * HEADS], vec![0.0; TOKENS * HEADS]);
        let outs = plain::Gates {
            written: &mut written[..],
            kept: &mut kept[..],
        };
        expected.forward(view, outs);
        let heads = DeltaHeads {
            key_heads: 1,
            value_heads: HEADS,
            key_dim: 1,
            value_dim: 1,
        };
        let on_gpu = gpu.upload(&x).unwrap();
        let from = (&on_gpu.slice(7..), rows);
        let mut found = RuleBuffers::take(gpu, heads, TOKENS).unwrap();
        gates.forward(gpu, from, &mut found).unwrap();
        let read = |buffer: &_| gpu.download(buffer, TOKENS * HEADS).unwrap();
        assert_near("written", &read(&found.written), &written, 1e-5);
        assert_near("kept", &read(&found.kept), &kept, 1e-5);

        weights.reset_gradients();
        let [d_written, d_kept] = [2, 3].map(|seed| random_values(TOKENS * HEADS, seed));
        let mut dx = vec![0.0; x.len()];
        let given = plain::Gates {
            written: &d_written[..],
            kept: &d_kept[..],
        };
        expected.backward(view, given, (&mut dx, rows.stride, 7));
        let given = RuleBuffers {
            qkv: gpu.take(1).unwrap(),
            written: gpu.upload(&d_written).unwrap(),
            kept: gpu.upload(&d_kept).unwrap(),
        };
        let mut found = gpu.zeroed::<f32>(x.len()).unwrap();
        let mut dw = SlotGradient(gpu.zeroed(2 * HEADS).unwrap());
        let to = (&mut found.slice_mut(7..), rows);
        gates.backward(gpu, from, &given, to, &mut dw).unwrap();
        assert_near("dx", &gpu.download(&found, x.len()).unwrap(), &dx, 1e-5);
        // In the order of their names.
        let expected = &weights.gradients(&[])[..2 * HEADS];
        let found = gpu.download(&dw.0, 2 * HEADS).unwrap();
        assert_near("dw", &found, expected, 1e-5);
    }
}
