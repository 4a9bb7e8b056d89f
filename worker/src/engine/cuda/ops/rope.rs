//! [`crate::engine::ops::rope`] on the GPU.

use cudarc::driver::{CudaView, CudaViewMut};

use super::elementwise::{Rows, TILE, add_partials};
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu, GpuError, Grid};
use crate::engine::ops::rope::{HeadLayout, RopeTable};
use crate::launch;

const WARPS: usize = 4;

/// Cosines and sines of every position, `[positions, head_dim / 2]` each.
pub struct GpuRopeTable {
    positions: usize,
    cos: DeviceBuffer<f32>,
    sin: DeviceBuffer<f32>,
}

impl GpuRopeTable {
    pub fn upload(gpu: &Gpu, table: &RopeTable) -> Result<Self, GpuError> {
        let (cos, sin) = table.values();
        Ok(Self {
            positions: table.positions(),
            cos: gpu.upload(cos)?,
            sin: gpu.upload(sin)?,
        })
    }

    pub fn positions(&self) -> usize {
        self.positions
    }
}

/// The norm of each query and key head, weights `[head_dim]`.
pub struct HeadNorms<'a> {
    pub query: CudaView<'a, f32>,
    pub key: CudaView<'a, f32>,
    pub epsilon: f32,
}

/// The operation. The table must reach to the last position.
pub struct Rope<'a> {
    pub layout: HeadLayout,
    pub norms: Option<HeadNorms<'a>>,
    /// Of each token.
    pub positions: &'a CudaView<'a, u32>,
    pub table: &'a GpuRopeTable,
}

impl Rope<'_> {
    /// `qkv` is `[tokens, layout.width()]`, and so is the result.
    pub fn forward<E: GpuElement>(
        &self,
        gpu: &Gpu,
        qkv: &CudaView<E>,
        y: &mut CudaViewMut<E>,
    ) -> Result<(), GpuError> {
        self.check(qkv.len(), y.len());
        let name = format!("rope_forward_{}", E::SUFFIX);
        let (query, key, epsilon, normed) = self.norms();
        let (query, key) = (&query, &key);
        let (positions, table) = (self.positions, self.table);
        let (queries, keys, dimension) = self.heads();
        // SAFETY: qkv and y have a row of the layout's width for each position.
        unsafe {
            launch!(
                gpu,
                &name,
                self.grid(),
                [
                    qkv, y, query, key, positions, &table.cos, &table.sin, &queries, &keys,
                    &dimension, &epsilon, &normed
                ]
            )
        }
    }

    /// From the gradient of the result to that of `qkv`, whose rows are `stride` apart. Writes the gradients of the
    /// queries' and the keys' norm, one after the other, where they are wanted.
    pub fn backward<E: GpuElement>(
        &self,
        gpu: &Gpu,
        (qkv, dy): (&CudaView<E>, &CudaView<E>),
        (d_qkv, stride): (&mut CudaViewMut<E>, usize),
        norm_gradients: Option<&mut CudaViewMut<f32>>,
    ) -> Result<(), GpuError> {
        self.check(qkv.len(), dy.len());
        let tokens = self.positions.len();
        let rows = Rows::strided(tokens, self.layout.width(), stride);
        assert!(d_qkv.len() >= rows.len(), "the gradient of a projection");
        let name = format!("rope_backward_{}", E::SUFFIX);
        let (query, key, epsilon, normed) = self.norms();
        let (query, key) = (&query, &key);
        let (positions, table) = (self.positions, self.table);
        let (queries, keys, dimension) = self.heads();
        let rotated = self.layout.heads + self.layout.key_value_heads;
        let mut inverses = gpu.take::<f32>(tokens * rotated)?;
        let row_stride = stride as i32;
        // SAFETY: all have a row of the layout's width for each position, and inverses one of its heads.
        unsafe {
            launch!(
                gpu,
                &name,
                self.grid(),
                [
                    qkv,
                    dy,
                    d_qkv,
                    &mut inverses,
                    query,
                    key,
                    positions,
                    &table.cos,
                    &table.sin,
                    &queries,
                    &keys,
                    &dimension,
                    &row_stride,
                    &epsilon,
                    &normed
                ]
            )?;
        }
        let Some(gradients) = norm_gradients.filter(|_| self.norms.is_some()) else {
            return Ok(());
        };
        let tiles = tokens.div_ceil(TILE);
        let mut partials = gpu.take::<f32>(tiles * 2 * self.layout.head_dim)?;
        let grid = Grid {
            blocks: (tiles as u32, 2, 1),
            threads: self.layout.head_dim.next_multiple_of(32) as u32,
            shared: 0,
        };
        let name = format!("rope_norm_gradient_{}", E::SUFFIX);
        let (count, tile) = (tokens as i32, TILE as i32);
        // SAFETY: as above, and there are two rows of partial sums for each tile.
        unsafe {
            launch!(
                gpu,
                &name,
                grid,
                [
                    qkv,
                    dy,
                    &inverses,
                    &mut partials,
                    positions,
                    &table.cos,
                    &table.sin,
                    &queries,
                    &keys,
                    &dimension,
                    &count,
                    &tile
                ]
            )?;
        }
        add_partials(gpu, &partials.as_view(), tiles, gradients)
    }

    fn check(&self, qkv: usize, y: usize) {
        let scalars = self.positions.len() * self.layout.width();
        assert_eq!(
            (qkv, y),
            (scalars, scalars),
            "a projection's queries, keys and values"
        );
    }

    fn grid(&self) -> Grid {
        let heads = self.layout.heads + 2 * self.layout.key_value_heads;
        Grid {
            blocks: (self.positions.len() as u32, heads.div_ceil(WARPS) as u32, 1),
            threads: (WARPS * 32) as u32,
            shared: 0,
        }
    }

    fn heads(&self) -> (i32, i32, i32) {
        let HeadLayout {
            heads,
            key_value_heads,
            head_dim,
        } = self.layout;
        (heads as i32, key_value_heads as i32, head_dim as i32)
    }

    /// Without norms the kernel reads neither weight.
    fn norms(&self) -> (CudaView<'_, f32>, CudaView<'_, f32>, f32, i32) {
        match &self.norms {
            Some(norms) => (norms.query.slice(..), norms.key.slice(..), norms.epsilon, 1),
            None => (self.table.cos.as_view(), self.table.cos.as_view(), 0.0, 0),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::cuda::testing::{assert_near, gpu};
    use crate::engine::ops::rope as plain;
    use crate::engine::testing::{TestWeights, random_values};
    use half::bf16;

    const TOKENS: usize = 150;

    fn layout(head_dim: usize) -> HeadLayout {
        HeadLayout {
            heads: 4,
            key_value_heads: 2,
            head_dim,
        }
    }

    #[test]
    fn values_and_gradients_equal_those_of_the_processor() {
        let Some(gpu) = gpu() else { return };
        for (head_dim, with_norms) in [(8, true), (8, false), (128, true)] {
            let layout = layout(head_dim);
            let width = layout.width();
            let weights = TestWeights::new(&[("k", &[head_dim]), ("q", &[head_dim])]);
            let positions: Vec<u32> = (0..TOKENS as u32).map(|token| token % 37).collect();
            let frequencies: Vec<f32> = (0..head_dim / 2).map(|i| 0.9f32.powi(i as i32)).collect();
            let table = RopeTable::new(&frequencies, 37);
            let norms = plain::HeadNorms {
                query: weights.trainable("q"),
                key: weights.trainable("k"),
                epsilon: 1e-6,
            };
            let expected = plain::Rope {
                layout,
                norms: with_norms.then_some(&norms),
                positions: &positions,
                table: &table,
            };
            let (x, dy) = (
                random_values(TOKENS * width, 1),
                random_values(TOKENS * width, 2),
            );
            let (mut y, mut dx) = (vec![0.0f32; x.len()], vec![0.0f32; x.len()]);
            weights.reset_gradients();
            expected.forward(&x, &mut y);
            expected.backward(&x, &dy, &mut dx);

            let on_gpu = |values: &[f32]| gpu.upload(values).unwrap();
            let (query, key) = (
                on_gpu(&weights.frozen("q").read_f32()),
                on_gpu(&weights.frozen("k").read_f32()),
            );
            let positions = gpu.upload(&positions).unwrap();
            let (positions, table) = (
                positions.as_view(),
                GpuRopeTable::upload(gpu, &table).unwrap(),
            );
            let rope = Rope {
                layout,
                norms: with_norms.then(|| HeadNorms {
                    query: query.as_view(),
                    key: key.as_view(),
                    epsilon: 1e-6,
                }),
                positions: &positions,
                table: &table,
            };
            let (qkv, d_out) = (on_gpu(&x), on_gpu(&dy));
            let mut out = gpu.take::<f32>(x.len()).unwrap();
            rope.forward(gpu, &qkv.as_view(), &mut out.as_view_mut())
                .unwrap();
            assert_near("y", &gpu.download(&out, x.len()).unwrap(), &y, 1e-5);
            let (stride, mut gradients) = (width + 8, gpu.take::<f32>(2 * head_dim).unwrap());
            let mut d_qkv = gpu.zeroed::<f32>(TOKENS * stride).unwrap();
            let into = (&mut d_qkv.as_view_mut(), stride);
            let wanted = &mut gradients.as_view_mut();
            rope.backward(gpu, (&qkv.as_view(), &d_out.as_view()), into, Some(wanted))
                .unwrap();
            let found = gpu.download(&d_qkv, TOKENS * stride).unwrap();
            let found: Vec<f32> = found
                .chunks_exact(stride)
                .flat_map(|row| row[..width].to_vec())
                .collect();
            assert_near("dx", &found, &dx, 1e-5);
            if with_norms {
                let found = gpu.download(&gradients, 2 * head_dim).unwrap();
                let expected = weights.gradients(&[]);
                assert_near("key norm", &found[head_dim..], &expected[..head_dim], 1e-5);
                assert_near(
                    "query norm",
                    &found[..head_dim],
                    &expected[head_dim..2 * head_dim],
                    1e-5,
                );
            }
            let narrow: Vec<bf16> = x.iter().map(|x| bf16::from_f32(*x)).collect();
            let narrow = gpu.upload(&narrow).unwrap();
            let mut out = gpu.take::<bf16>(x.len()).unwrap();
            rope.forward(gpu, &narrow.as_view(), &mut out.as_view_mut())
                .unwrap();
            let found = gpu.download(&out, x.len()).unwrap();
            let found: Vec<f32> = found.into_iter().map(bf16::to_f32).collect();
            assert_near("y in bfloat16", &found, &y, 1e-2);
        }
    }
}
