//! [`crate::engine::ops::attention`] on the GPU: on tensor cores in bfloat16, and without them in float32.
//!
//! The order of all sums follows from the shape alone, so the same input gives the same bits each time. No matrix of tokens by
//! tokens is ever in memory.

use cudarc::driver::{CudaView, CudaViewMut, DevicePtr};

use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu, Grid};
use crate::engine::ops::rope::HeadLayout;
use crate::launch;

/// Largest head dimension that the kernels have room for.
pub const MAX_HEAD_DIM: usize = 256;

const THREADS: u32 = 128;

/// Causal attention within segments, or within windows of them. Head dimensions are multiples of 8, up to [`MAX_HEAD_DIM`].
pub struct Attention<'a> {
    pub layout: HeadLayout,
    /// For each token, the first token that it sees; these never decrease.
    pub starts: CudaView<'a, u32>,
    /// For each token, the one after the last token that sees it; these never decrease.
    pub ends: CudaView<'a, u32>,
    /// What scores are multiplied by, above 0.
    pub scale: f32,
    /// What they are limited to then, above 0.
    pub cap: Option<f32>,
    /// The sink of each head, where they have some.
    pub sinks: Option<CudaView<'a, f32>>,
}

/// What the backward pass reads.
pub struct Saved<'a, E> {
    /// Queries, keys and values with positions applied.
    pub qkv: &'a CudaView<'a, E>,
    /// Result of the forward pass, `[tokens][heads * head_dim]`, its rows `stride` apart.
    pub context: &'a CudaView<'a, E>,
    /// Scalars from one row of the context to the next.
    pub stride: usize,
    /// `log(sum(exp(scores)))` of each row, that of a sink among them, `[heads][tokens]`.
    pub log_sums: &'a CudaView<'a, f32>,
    /// Gradient of the context, `[tokens][heads * head_dim]`.
    pub d_context: &'a CudaView<'a, E>,
}

/// Rows that a block of threads holds, and columns that it takes at a time.
#[derive(Clone, Copy)]
struct Tile {
    rows: usize,
    columns: usize,
}

/// How the kernels for one element type and width of heads are launched.
struct Kernels {
    /// What the kernels' names end with.
    suffix: String,
    forward: Tile,
    backward_queries: Tile,
    backward_keys: Tile,
    /// Layers of blocks that share the gradients of keys and values.
    key_layers: u32,
    /// Scalars in a row of a tile; None for the kernels without tensor cores.
    width: Option<usize>,
}

const fn tile(rows: usize, columns: usize) -> Tile {
    Tile { rows, columns }
}

impl Kernels {
    /// Chooses the kernels for this head dimension, as they are instantiated in `kernels/attention*.cu`: those without tensor cores
    /// look whether scores are limited, the others are compiled for either.
    fn of<E: GpuElement>(head_dim: usize, is_capped: bool) -> Self {
        let narrow = |width, [forward, backward_queries, backward_keys]: [Tile; 3], key_layers| {
            let kind = if is_capped { "capped_" } else { "" };
            let suffix = format!("{kind}{}_{width}", E::SUFFIX);
            Self {
                suffix,
                forward,
                backward_queries,
                backward_keys,
                key_layers,
                width: Some(width),
            }
        };
        match (size_of::<E>(), head_dim) {
            (4, _) => Self {
                suffix: E::SUFFIX.to_owned(),
                forward: tile(16, 32),
                backward_queries: tile(16, 32),
                backward_keys: tile(16, 32),
                key_layers: 1,
                width: None,
            },
            (_, ..=64) => narrow(64, [tile(128, 64), tile(128, 64), tile(128, 32)], 1),
            (_, ..=128) => narrow(128, [tile(128, 64), tile(128, 32), tile(64, 64)], 1),
            _ => narrow(MAX_HEAD_DIM, [tile(64, 32); 3], 2),
        }
    }

    /// Bytes of shared memory for `kinds` kinds of rows, twice two kinds of columns, and twice `sums` numbers for each
    /// column.
    fn shared(&self, head_dim: usize, tile: Tile, [kinds, sums]: [usize; 2]) -> usize {
        match self.width {
            Some(width) => {
                let scalars = (kinds * tile.rows + 4 * tile.columns) * width;
                scalars * 2 + 2 * sums * tile.columns * size_of::<f32>()
            }
            // What `Memory` in attention_f32.cu lays out.
            None => {
                let tiles = 2 * tile.rows * head_dim + 2 * tile.columns * (head_dim + 1);
                (tiles + 2 * tile.rows * tile.columns) * size_of::<f32>()
            }
        }
    }

    /// A grid with a block for each head and tile of rows.
    fn grid(
        &self,
        attention: &Attention,
        heads: usize,
        tile: Tile,
        [kinds, sums]: [usize; 2],
    ) -> Grid {
        let tiles = attention.starts.len().div_ceil(tile.rows);
        let shared = self.shared(attention.layout.head_dim, tile, [kinds, sums]);
        Grid {
            blocks: (heads as u32, tiles as u32, 1),
            threads: THREADS,
            shared: shared as u32,
        }
    }
}

/// Refuses heads that the kernels, or this GPU, cannot work on.
pub fn check_heads<E: GpuElement>(gpu: &Gpu, head_dim: usize) -> Result<(), GpuError> {
    let refuse = |reason| {
        let name = gpu.name().to_owned();
        Err(GpuError::Heads {
            head_dim,
            name,
            reason,
        })
    };
    if !head_dim.is_multiple_of(8) || !(8..=MAX_HEAD_DIM).contains(&head_dim) {
        return refuse("a multiple of 8 up to 256 is needed");
    }
    // Limits of scores take no shared memory.
    let kernels = Kernels::of::<E>(head_dim, false);
    let needed = [
        kernels.shared(head_dim, kernels.forward, [1, 0]),
        kernels.shared(head_dim, kernels.backward_queries, [2, 0]),
        kernels.shared(head_dim, kernels.backward_keys, [2, 2]),
    ];
    match needed.iter().max() > Some(&gpu.shared_memory()?) {
        true => refuse("its blocks have too little shared memory"),
        false => Ok(()),
    }
}

impl Attention<'_> {
    /// Computes attention of `qkv`, `[tokens][(heads + 2 * key_value_heads) * head_dim]` with positions applied.
    ///
    /// `context` becomes `[tokens][heads * head_dim]`, its rows `stride` apart, and `log_sums` `log(sum(exp(scores)))` of each
    /// row, `[heads][tokens]`.
    pub fn forward<E: GpuElement>(
        &self,
        gpu: &Gpu,
        qkv: &CudaView<E>,
        context: &mut CudaViewMut<E>,
        stride: usize,
        log_sums: &mut CudaViewMut<f32>,
    ) -> Result<(), GpuError> {
        self.check(gpu, qkv, context.len(), stride, log_sums.len());
        let HeadLayout { heads, .. } = self.layout;
        let kernels = Kernels::of::<E>(self.layout.head_dim, self.cap.is_some());
        let name = format!("attention_forward_{}", kernels.suffix);
        let grid = kernels.grid(self, heads, kernels.forward, [1, 0]);
        let [queries, keys, dimension, tokens] = self.shape();
        let (stride, cap) = (stride as i32, self.cap.unwrap_or(0.0));
        if tokens == 0 {
            return Ok(());
        }
        let sinks = self.sinks.as_ref().map(|s| s.device_ptr(gpu.stream()));
        // None is a null pointer.
        let sinks_at = sinks.as_ref().map_or(0, |(at, _guard)| *at);
        // SAFETY: all lengths and the alignment of qkv have just been checked.
        unsafe {
            launch!(
                gpu,
                &name,
                grid,
                [
                    qkv,
                    context,
                    log_sums,
                    &self.starts,
                    &sinks_at,
                    &queries,
                    &keys,
                    &dimension,
                    &tokens,
                    &stride,
                    &self.scale,
                    &cap
                ]
            )
        }
    }

    /// Computes the gradient of `qkv`, all of which is written, from that of the context.
    pub fn backward<E: GpuElement>(
        &self,
        gpu: &Gpu,
        saved: &Saved<E>,
        d_qkv: &mut CudaViewMut<E>,
    ) -> Result<(), GpuError> {
        let (context, log_sums) = (saved.context.len(), saved.log_sums.len());
        self.check(gpu, saved.qkv, context, saved.stride, log_sums);
        let HeadLayout {
            heads,
            key_value_heads,
            head_dim,
        } = self.layout;
        assert_eq!(saved.qkv.len(), d_qkv.len(), "scalars with a gradient");
        let out_len = self.starts.len() * heads * head_dim;
        assert_eq!(saved.d_context.len(), out_len, "gradients of the context");
        assert_aligned(gpu, saved.d_context);
        if self.starts.is_empty() {
            return Ok(());
        }
        let deltas = self.deltas(gpu, saved)?;
        let kernels = Kernels::of::<E>(head_dim, self.cap.is_some());
        let mut grid = kernels.grid(self, key_value_heads, kernels.backward_keys, [2, 2]);
        grid.blocks.2 = kernels.key_layers;
        let of_keys = (format!("keys_{}", kernels.suffix), grid, &self.ends);
        let grid = kernels.grid(self, heads, kernels.backward_queries, [2, 0]);
        let of_queries = (format!("queries_{}", kernels.suffix), grid, &self.starts);
        let [queries, keys, dimension, tokens] = self.shape();
        let cap = self.cap.unwrap_or(0.0);
        for (name, grid, borders) in [of_keys, of_queries] {
            // SAFETY: all lengths and alignments have just been checked, and deltas has a number for each log sum.
            unsafe {
                launch!(
                    gpu,
                    &format!("attention_backward_{name}"),
                    grid,
                    [
                        saved.qkv,
                        saved.d_context,
                        saved.log_sums,
                        &deltas,
                        borders,
                        &mut *d_qkv,
                        &queries,
                        &keys,
                        &dimension,
                        &tokens,
                        &self.scale,
                        &cap
                    ]
                )?;
            }
        }
        Ok(())
    }

    /// Computes the gradient of the sinks, where there are some.
    pub fn backward_sinks<E: GpuElement>(
        &self,
        gpu: &Gpu,
        saved: &Saved<E>,
        d_sinks: &mut CudaViewMut<f32>,
    ) -> Result<(), GpuError> {
        let Some(sinks) = &self.sinks else {
            return Ok(());
        };
        let [heads, _, _, tokens] = self.shape();
        assert!(
            sinks.len() == heads as usize && d_sinks.len() == sinks.len(),
            "a sink of each head"
        );
        let (context, log_sums) = (saved.context.len(), saved.log_sums.len());
        self.check(gpu, saved.qkv, context, saved.stride, log_sums);
        if tokens == 0 {
            return gpu.fill_zero(d_sinks);
        }
        let deltas = self.deltas(gpu, saved)?;
        let grid = Grid::rows(sinks.len(), THREADS);
        // SAFETY: there is a log sum and a delta of each token of each head, and a sink of each head.
        unsafe {
            launch!(
                gpu,
                "attention_sinks",
                grid,
                [sinks, saved.log_sums, &deltas, d_sinks, &tokens]
            )
        }
    }

    /// Computes `sum(context * d_context)` of each row of each head, `[heads][tokens]`.
    fn deltas<E: GpuElement>(
        &self,
        gpu: &Gpu,
        saved: &Saved<E>,
    ) -> Result<DeviceBuffer<f32>, GpuError> {
        const LANES: usize = 8;
        let mut deltas = gpu.take::<f32>(saved.log_sums.len())?;
        let blocks = (saved.log_sums.len() * LANES).div_ceil(THREADS as usize);
        let [heads, _, dimension, tokens] = self.shape();
        let stride = saved.stride as i32;
        // SAFETY: both contexts have a row for each token, and deltas a number for each of its heads.
        unsafe {
            launch!(
                gpu,
                &format!("attention_deltas_{}", E::SUFFIX),
                Grid::rows(blocks, THREADS),
                [
                    saved.context,
                    saved.d_context,
                    &mut deltas,
                    &heads,
                    &dimension,
                    &tokens,
                    &stride
                ]
            )?;
        }
        Ok(deltas)
    }

    fn check<E: GpuElement>(
        &self,
        gpu: &Gpu,
        qkv: &CudaView<E>,
        context: usize,
        stride: usize,
        log_sums: usize,
    ) {
        let HeadLayout {
            heads,
            key_value_heads,
            head_dim,
        } = self.layout;
        assert!(
            head_dim % 8 == 0
                && (8..=MAX_HEAD_DIM).contains(&head_dim)
                && heads % key_value_heads == 0,
            "heads that the kernels cannot work on: {:?}",
            self.layout
        );
        let (tokens, width) = (self.starts.len(), heads * head_dim);
        let last_row = tokens.saturating_sub(1) * stride;
        assert!(
            self.ends.len() == tokens
                && self.sinks.as_ref().is_none_or(|sinks| sinks.len() == heads)
                && qkv.len() == tokens * self.layout.width()
                && log_sums == heads * tokens
                && stride >= width
                && (tokens == 0 || context >= last_row + width),
            "queries, keys and values of another shape"
        );
        assert_aligned(gpu, qkv);
    }

    /// The shape as the kernels take it: query heads, key heads, their dimension, tokens.
    fn shape(&self) -> [i32; 4] {
        let HeadLayout {
            heads,
            key_value_heads,
            head_dim,
        } = self.layout;
        [heads, key_value_heads, head_dim, self.starts.len()].map(|size| size as i32)
    }
}

/// Asserts that the data is aligned to the 16 bytes that kernels copy at a time.
fn assert_aligned<E: GpuElement>(gpu: &Gpu, data: &CudaView<E>) {
    let (at, _guard) = data.device_ptr(gpu.stream());
    assert_eq!(at % 16, 0, "rows that begin between multiples of 16 bytes");
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
