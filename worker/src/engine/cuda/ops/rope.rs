//! [`crate::engine::ops::rope`] on the GPU.

use common::model::RotaryPairs;
use cudarc::driver::{CudaView, CudaViewMut};

use super::elementwise::{COLUMN_TILE, Rows, add_partials, columns_grid};
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu, Grid};
use crate::engine::cuda::params::{GradientSink, Vector};
use crate::engine::ops::rope::{HeadLayout, RopeTable};
use crate::launch;

const WARPS: usize = 4;
/// What is kept of each token where all its heads have a norm together: an inverse root mean square of queries and of keys, and
/// a factor of each in the backward pass.
const WIDE_INVERSES: usize = 4;

/// Cosines and sines of every position, `[positions][pairs]` each, where a head has twice as many dimensions as pairs, or more.
pub struct GpuRopeTable {
    half: i32,
    pairs: RotaryPairs,
    cos: DeviceBuffer<f32>,
    sin: DeviceBuffer<f32>,
}

impl GpuRopeTable {
    pub fn upload(gpu: &Gpu, table: &RopeTable) -> Result<Self, GpuError> {
        let (cos, sin) = table.values();
        Ok(Self {
            half: table.half() as i32,
            pairs: table.pairs(),
            cos: gpu.upload(cos)?,
            sin: gpu.upload(sin)?,
        })
    }
}

/// Norms of queries and keys: of each head, with weights `[head_dim]`, or of all heads together, with weights for all.
pub struct HeadNorms {
    pub query: Vector,
    pub key: Vector,
    pub epsilon: f32,
    /// Whether they multiply by 1 + weight.
    pub offset: bool,
    /// Whether all heads have a norm together.
    pub is_wide: bool,
}

/// Rotary positions on queries and keys, after the norm of their heads where there is one. The table must have every row that is
/// named.
pub struct Rope<'a> {
    pub layout: HeadLayout,
    pub norms: Option<&'a HeadNorms>,
    /// The row of the table for each token.
    pub rows: &'a CudaView<'a, u32>,
    /// None where nothing is rotated.
    pub table: Option<&'a GpuRopeTable>,
}

/// The norms as the kernels take them; without norms the kernels read neither weight.
struct KernelNorms<'a> {
    query: CudaView<'a, f32>,
    key: CudaView<'a, f32>,
    epsilon: f32,
    offset: f32,
    kind: i32,
}

/// The rotation as the kernels take it; where nothing is rotated they read no table.
struct KernelRotation<'a> {
    cos: CudaView<'a, f32>,
    sin: CudaView<'a, f32>,
    half: i32,
    neighbours: i32,
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
        let mut inverses = gpu.take::<f32>(self.wide_inverses())?;
        if self.is_wide() {
            self.invert(gpu, (qkv, qkv), &mut inverses, false)?;
        }
        let name = format!("rope_forward_{}", E::SUFFIX);
        let (norms, rotation) = (self.norms(&inverses), self.rotation(&inverses));
        let rows = self.rows;
        let (queries, keys, dimension) = self.heads();
        // SAFETY: qkv and y have a row of the layout's width for each token.
        unsafe {
            launch!(
                gpu,
                &name,
                self.grid(),
                [
                    qkv,
                    y,
                    &inverses,
                    &norms.query,
                    &norms.key,
                    &norms.epsilon,
                    &norms.offset,
                    &norms.kind,
                    rows,
                    &rotation.cos,
                    &rotation.sin,
                    &rotation.half,
                    &rotation.neighbours,
                    &queries,
                    &keys,
                    &dimension
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
        self.check(qkv.len(), dy.len());
        let inverses = self.backward_input(gpu, (qkv, dy), (d_qkv, stride))?;
        let ranges = self
            .norms
            .and_then(|norms| norms.query.range.zip(norms.key.range));
        let Some((query, key)) = ranges else {
            return Ok(());
        };
        let mut gradients = gpu.take::<f32>(query.scalars + key.scalars)?;
        let out = &mut gradients.as_view_mut();
        self.norm_gradients(gpu, (qkv, dy), &inverses, out)?;
        let parts = [(query, 0), (key, query.scalars)];
        parts.into_iter().try_for_each(|(range, first)| {
            let part = gradients.slice(first..first + range.scalars);
            sink.add(gpu, range, &mut |gradient| gpu.copy(&part, gradient))
        })
    }

    /// Writes the gradient of `qkv`, and returns the inverse root mean squares that the norms' own gradients need.
    fn backward_input<E: GpuElement>(
        &self,
        gpu: &Gpu,
        (qkv, dy): (&CudaView<E>, &CudaView<E>),
        (d_qkv, stride): (&mut CudaViewMut<E>, usize),
    ) -> Result<DeviceBuffer<f32>, GpuError> {
        let tokens = self.rows.len();
        let to = Rows::strided(tokens, self.layout.width(), stride);
        assert!(d_qkv.len() >= to.len(), "the gradient of a projection");
        let normed = self.layout.heads + self.layout.key_value_heads;
        let mut inverses = gpu.take::<f32>(self.wide_inverses().max(tokens * normed))?;
        if self.is_wide() {
            self.invert(gpu, (qkv, dy), &mut inverses, true)?;
        }
        // Where there is nothing else for the kernels to be given.
        let none = gpu.take::<f32>(1)?;
        let (norms, rotation, rows) = (self.norms(&none), self.rotation(&none), self.rows);
        let (queries, keys, dimension) = self.heads();
        let row_stride = stride as i32;
        // SAFETY: all have a row of the layout's width for each token, and inverses one of its heads.
        unsafe {
            launch!(
                gpu,
                &format!("rope_backward_{}", E::SUFFIX),
                self.grid(),
                [
                    qkv,
                    dy,
                    d_qkv,
                    &mut inverses,
                    &norms.query,
                    &norms.key,
                    &norms.epsilon,
                    &norms.offset,
                    &norms.kind,
                    rows,
                    &rotation.cos,
                    &rotation.sin,
                    &rotation.half,
                    &rotation.neighbours,
                    &queries,
                    &keys,
                    &dimension,
                    &row_stride
                ]
            )?;
        }
        Ok(inverses)
    }

    /// Writes the gradients of the queries' and the keys' norm one after the other.
    fn norm_gradients<E: GpuElement>(
        &self,
        gpu: &Gpu,
        (qkv, dy): (&CudaView<E>, &CudaView<E>),
        inverses: &DeviceBuffer<f32>,
        gradients: &mut CudaViewMut<f32>,
    ) -> Result<(), GpuError> {
        let tokens = self.rows.len();
        let tiles = tokens.div_ceil(COLUMN_TILE);
        let mut partials = gpu.take::<f32>(tiles * gradients.len())?;
        let (name, grid) = match self.is_wide() {
            true => {
                let columns = Rows::new(tokens, gradients.len());
                (
                    "rope_wide_norm_gradient",
                    columns_grid(columns, COLUMN_TILE),
                )
            }
            false => {
                let grid = Grid {
                    blocks: (tiles as u32, 2, 1),
                    threads: self.layout.head_dim.next_multiple_of(32) as u32,
                    shared: 0,
                };
                ("rope_norm_gradient", grid)
            }
        };
        let (rotation, rows) = (self.rotation(inverses), self.rows);
        let (queries, keys, dimension) = self.heads();
        let (count, tile) = (tokens as i32, COLUMN_TILE as i32);
        // SAFETY: all have a row for each token, and there is a row of partial sums for each tile.
        unsafe {
            launch!(
                gpu,
                &format!("{name}_{}", E::SUFFIX),
                grid,
                [
                    qkv,
                    dy,
                    inverses,
                    &mut partials,
                    rows,
                    &rotation.cos,
                    &rotation.sin,
                    &rotation.half,
                    &rotation.neighbours,
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

    /// Computes what all heads of a token have together, with the factors of the backward pass where `dy` is a gradient.
    fn invert<E: GpuElement>(
        &self,
        gpu: &Gpu,
        (qkv, dy): (&CudaView<E>, &CudaView<E>),
        inverses: &mut DeviceBuffer<f32>,
        has_gradient: bool,
    ) -> Result<(), GpuError> {
        let none = gpu.take::<f32>(1)?;
        let (norms, rotation, rows) = (self.norms(&none), self.rotation(&none), self.rows);
        let (queries, keys, dimension) = self.heads();
        let has_gradient = i32::from(has_gradient);
        let grid = Grid {
            blocks: (rows.len() as u32, 2, 1),
            ..self.grid()
        };
        // SAFETY: all have a row of the layout's width for each token, and inverses what is kept of each.
        unsafe {
            launch!(
                gpu,
                &format!("rope_inverses_{}", E::SUFFIX),
                grid,
                [
                    qkv,
                    dy,
                    inverses,
                    &norms.query,
                    &norms.key,
                    &norms.epsilon,
                    &norms.offset,
                    &norms.kind,
                    rows,
                    &rotation.cos,
                    &rotation.sin,
                    &rotation.half,
                    &rotation.neighbours,
                    &queries,
                    &keys,
                    &dimension,
                    &has_gradient
                ]
            )
        }
    }

    fn check(&self, qkv: usize, y: usize) {
        let scalars = self.rows.len() * self.layout.width();
        assert_eq!(
            (qkv, y),
            (scalars, scalars),
            "a projection's queries, keys and values"
        );
        if let Some(norms) = self.norms {
            let HeadLayout {
                heads,
                key_value_heads,
                head_dim,
            } = self.layout;
            let of = |heads: usize| {
                if norms.is_wide {
                    heads * head_dim
                } else {
                    head_dim
                }
            };
            let weights = (norms.query.scalars(), norms.key.scalars());
            assert_eq!(weights, (of(heads), of(key_value_heads)), "norms of heads");
        }
        let rotated = self.table.map_or(0, |table| 2 * table.half as usize);
        assert!(rotated <= self.layout.head_dim, "dimensions to rotate");
    }

    fn grid(&self) -> Grid {
        let heads = self.layout.heads + 2 * self.layout.key_value_heads;
        Grid {
            blocks: (self.rows.len() as u32, heads.div_ceil(WARPS) as u32, 1),
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

    fn is_wide(&self) -> bool {
        self.norms.is_some_and(|norms| norms.is_wide)
    }

    /// Scalars that are kept of norms of all heads together.
    fn wide_inverses(&self) -> usize {
        match self.is_wide() {
            true => self.rows.len() * WIDE_INVERSES,
            false => 1,
        }
    }

    fn norms<'a>(&'a self, none: &'a DeviceBuffer<f32>) -> KernelNorms<'a> {
        match self.norms {
            Some(norms) => KernelNorms {
                query: norms.query.view(),
                key: norms.key.view(),
                epsilon: norms.epsilon,
                offset: f32::from(u8::from(norms.offset)),
                kind: 1 + i32::from(norms.is_wide),
            },
            None => KernelNorms {
                query: none.as_view(),
                key: none.as_view(),
                epsilon: 0.0,
                offset: 0.0,
                kind: 0,
            },
        }
    }

    fn rotation<'a>(&'a self, none: &'a DeviceBuffer<f32>) -> KernelRotation<'a> {
        match self.table {
            Some(table) => KernelRotation {
                cos: table.cos.as_view(),
                sin: table.sin.as_view(),
                half: table.half,
                neighbours: i32::from(table.pairs == RotaryPairs::Neighbours),
            },
            None => KernelRotation {
                cos: none.as_view(),
                sin: none.as_view(),
                half: 0,
                neighbours: 0,
            },
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
