//! [`crate::engine::ops::rope`] on the GPU.

use cudarc::driver::{CudaView, CudaViewMut};

use super::elementwise::{COLUMN_TILE, Rows, add_partials};
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu, Grid};
use crate::engine::cuda::params::{GradientSink, Vector};
use crate::engine::ops::rope::{HeadLayout, RopeTable};
use crate::launch;

const WARPS: usize = 4;

/// Cosines and sines of every position, `[positions][head_dim / 2]` each.
pub struct GpuRopeTable {
    positions: usize,
    cos: DeviceBuffer<f32>,
    sin: DeviceBuffer<f32>,
}

impl GpuRopeTable {
    pub fn upload(gpu: &Gpu, table: &RopeTable) -> Result<Self, GpuError> {
        let (cos, sin) = table.values();
        Ok(Self {
            positions: table.rows(),
            cos: gpu.upload(cos)?,
            sin: gpu.upload(sin)?,
        })
    }

    pub fn positions(&self) -> usize {
        self.positions
    }
}

/// Norms of each query and key head, with weights `[head_dim]`.
pub struct HeadNorms {
    pub query: Vector,
    pub key: Vector,
    pub epsilon: f32,
}

/// Rotary positions on queries and keys, after the norm of their heads where there is one. The table must reach to the last
/// position.
pub struct Rope<'a> {
    pub layout: HeadLayout,
    pub norms: Option<&'a HeadNorms>,
    /// Position of each token in its segment.
    pub positions: &'a CudaView<'a, u32>,
    pub table: &'a GpuRopeTable,
}

impl Rope<'_> {
    /// Applies norms and positions to `qkv`, `[tokens][layout.width()]`, and so is the result.
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

    /// Computes the gradient of `qkv`, whose rows are `stride` apart, from that of the result, and hands over those of the
    /// norms where they are trainable.
    pub fn backward<E: GpuElement>(
        &self,
        gpu: &Gpu,
        (qkv, dy): (&CudaView<E>, &CudaView<E>),
        (d_qkv, stride): (&mut CudaViewMut<E>, usize),
        sink: &mut dyn GradientSink,
    ) -> Result<(), GpuError> {
        let ranges = self
            .norms
            .and_then(|norms| norms.query.range.zip(norms.key.range));
        let Some((query, key)) = ranges else {
            return self.backward_into(gpu, (qkv, dy), (d_qkv, stride), None);
        };
        let mut gradients = gpu.take::<f32>(query.scalars + key.scalars)?;
        let out = Some(&mut gradients.as_view_mut());
        self.backward_into(gpu, (qkv, dy), (d_qkv, stride), out)?;
        let parts = [(query, 0), (key, query.scalars)];
        parts.into_iter().try_for_each(|(range, first)| {
            let part = gradients.slice(first..first + range.scalars);
            sink.add(gpu, range, &mut |gradient| gpu.copy(&part, gradient))
        })
    }

    /// Writes the gradients of the queries' and the keys' norm one after the other, where they are wanted.
    fn backward_into<E: GpuElement>(
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
        let tiles = tokens.div_ceil(COLUMN_TILE);
        let mut partials = gpu.take::<f32>(tiles * 2 * self.layout.head_dim)?;
        let grid = Grid {
            blocks: (tiles as u32, 2, 1),
            threads: self.layout.head_dim.next_multiple_of(32) as u32,
            shared: 0,
        };
        let name = format!("rope_norm_gradient_{}", E::SUFFIX);
        let (count, tile) = (tokens as i32, COLUMN_TILE as i32);
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

    /// Weights of both norms, epsilon, and whether there are norms. Without norms the kernel reads neither weight.
    fn norms(&self) -> (CudaView<'_, f32>, CudaView<'_, f32>, f32, i32) {
        match self.norms {
            Some(norms) => (norms.query.view(), norms.key.view(), norms.epsilon, 1),
            None => (self.table.cos.as_view(), self.table.cos.as_view(), 0.0, 0),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::cuda::params::FlatRange;
    use crate::engine::cuda::sums::SlotGradient;
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

    struct Case {
        layout: HeadLayout,
        with_norms: bool,
        /// The norms' weights.
        weights: TestWeights,
        positions: Vec<u32>,
        table: RopeTable,
        x: Vec<f32>,
        dy: Vec<f32>,
    }

    /// What comes of a case: `norms` are the gradients of the queries' and the keys' norm.
    struct Results {
        y: Vec<f32>,
        dx: Vec<f32>,
        norms: Vec<f32>,
    }

    impl Case {
        fn new(head_dim: usize, with_norms: bool) -> Self {
            let layout = layout(head_dim);
            let scalars = TOKENS * layout.width();
            let frequencies: Vec<f32> = (0..head_dim / 2).map(|i| 0.9f32.powi(i as i32)).collect();
            Self {
                layout,
                with_norms,
                weights: TestWeights::new(&[("k", &[head_dim]), ("q", &[head_dim])]),
                positions: (0..TOKENS as u32).map(|token| token % 37).collect(),
                table: RopeTable::new(&frequencies, 37, 1.0),
                x: random_values(scalars, 1),
                dy: random_values(scalars, 2),
            }
        }

        fn on_processor(&self) -> Results {
            let norms = plain::HeadNorms {
                query: self.weights.trainable("q"),
                key: self.weights.trainable("k"),
                epsilon: 1e-6,
                offset: false,
            };
            let rope = plain::Rope {
                layout: self.layout,
                norms: self.with_norms.then_some(&norms),
                rows: &self.positions,
                table: Some(&self.table),
            };
            let (mut y, mut dx) = (vec![0.0f32; self.x.len()], vec![0.0f32; self.x.len()]);
            self.weights.reset_gradients();
            rope.forward(&self.x, &mut y);
            rope.backward(&self.x, &self.dy, &mut dx);
            let norms = match self.with_norms {
                true => {
                    let (gradients, width) = (self.weights.gradients(&[]), self.layout.head_dim);
                    [&gradients[width..2 * width], &gradients[..width]].concat()
                }
                false => Vec::new(),
            };
            Results { y, dx, norms }
        }

        fn with_rope<R>(&self, gpu: &Gpu, work: impl FnOnce(&Rope) -> R) -> R {
            let head_dim = self.layout.head_dim;
            let weight = |name, offset| {
                let range = FlatRange {
                    offset,
                    scalars: head_dim,
                };
                let values = self.weights.frozen(name);
                Vector::new(gpu, &values.read_f32(), Some(range)).unwrap()
            };
            let norms = HeadNorms {
                query: weight("q", 0),
                key: weight("k", head_dim),
                epsilon: 1e-6,
            };
            let positions = gpu.upload(&self.positions).unwrap();
            work(&Rope {
                layout: self.layout,
                norms: self.with_norms.then_some(&norms),
                positions: &positions.as_view(),
                table: &GpuRopeTable::upload(gpu, &self.table).unwrap(),
            })
        }

        fn forward<E: GpuElement>(&self, gpu: &Gpu, x: &[E]) -> Vec<E> {
            let (qkv, mut out) = (gpu.upload(x).unwrap(), gpu.take::<E>(x.len()).unwrap());
            self.with_rope(gpu, |rope| {
                rope.forward(gpu, &qkv.as_view(), &mut out.as_view_mut())
                    .unwrap();
            });
            gpu.download(&out, x.len()).unwrap()
        }

        /// Into rows with room behind them.
        fn on_gpu(&self, gpu: &Gpu) -> Results {
            let (width, head_dim) = (self.layout.width(), self.layout.head_dim);
            let stride = width + 8;
            let (qkv, dy) = (gpu.upload(&self.x).unwrap(), gpu.upload(&self.dy).unwrap());
            let mut norms = SlotGradient(gpu.zeroed(2 * head_dim).unwrap());
            let mut d_qkv = gpu.zeroed::<f32>(TOKENS * stride).unwrap();
            self.with_rope(gpu, |rope| {
                let from = (&qkv.as_view(), &dy.as_view());
                let into = (&mut d_qkv.as_view_mut(), stride);
                rope.backward(gpu, from, into, &mut norms).unwrap();
            });
            let rows = gpu.download(&d_qkv, TOKENS * stride).unwrap();
            let rows = rows.chunks_exact(stride);
            Results {
                y: self.forward(gpu, &self.x),
                dx: rows.flat_map(|row| row[..width].to_vec()).collect(),
                norms: match self.with_norms {
                    true => gpu.download(&norms.0, 2 * head_dim).unwrap(),
                    false => Vec::new(),
                },
            }
        }
    }

    #[test]
    fn values_and_gradients_equal_those_of_the_processor() {
        let Some(gpu) = gpu() else { return };
        for (head_dim, with_norms) in [(8, true), (8, false), (128, true)] {
            let case = Case::new(head_dim, with_norms);
            let (expected, found) = (case.on_processor(), case.on_gpu(gpu));
            assert_near("y", &found.y, &expected.y, 1e-5);
            assert_near("dx", &found.dx, &expected.dx, 1e-5);
            assert_eq!(found.norms.len(), if with_norms { 2 * head_dim } else { 0 });
            if with_norms {
                let parts =
                    |norms: &[f32]| [0, head_dim].map(|at| norms[at..at + head_dim].to_vec());
                let [query, key] = parts(&found.norms);
                let [expected_query, expected_key] = parts(&expected.norms);
                assert_near("query norm", &query, &expected_query, 1e-5);
                assert_near("key norm", &key, &expected_key, 1e-5);
            }
            let narrow: Vec<bf16> = case.x.iter().map(|x| bf16::from_f32(*x)).collect();
            let narrow = case.forward(gpu, &narrow);
            let narrow: Vec<f32> = narrow.into_iter().map(bf16::to_f32).collect();
            assert_near("y in bfloat16", &narrow, &expected.y, 1e-2);
        }
    }
}
