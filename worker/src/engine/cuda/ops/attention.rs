//! [`crate::engine::ops::attention`] on the GPU: on tensor cores in bfloat16, and without them in float32.
//!
//! The order of all sums follows from the shape alone, so the same input gives the same bits each time. No matrix of tokens by
//! tokens is ever in memory.

use cudarc::driver::{CudaView, CudaViewMut, DevicePtr};

use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu, GpuError, Grid};
use crate::engine::ops::rope::HeadLayout;
use crate::launch;

/// The widest head that the kernels have room for.
pub const MAX_HEAD_DIM: usize = 256;

const THREADS: u32 = 128;

/// The operation: head dimensions are multiples of 8, up to [`MAX_HEAD_DIM`].
pub struct Attention<'a> {
    pub layout: HeadLayout,
    /// Of each token, the first token of its segment.
    pub starts: CudaView<'a, u32>,
    /// Of each token, the one after the last of its segment.
    pub ends: CudaView<'a, u32>,
}

/// What the backward pass reads.
pub struct Saved<'a, E> {
    /// Queries, keys and values with positions applied.
    pub qkv: &'a CudaView<'a, E>,
    pub context: &'a CudaView<'a, E>,
    /// Scalars from one row of the context to the next.
    pub stride: usize,
    pub log_sums: &'a CudaView<'a, f32>,
    /// `[tokens, heads * head_dim]`
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
    /// What their names end with.
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
    /// As the kernels are instantiated in `kernels/attention*.cu`.
    fn of<E: GpuElement>(head_dim: usize) -> Self {
        let narrow = |width, [forward, backward_queries, backward_keys]: [Tile; 3], key_layers| {
            let suffix = format!("{}_{width}", E::SUFFIX);
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

    /// Blocks for each head and tile of rows. Shared memory holds `kinds` kinds of rows, twice two kinds of columns, and
    /// twice `sums` numbers for each column.
    fn grid(
        &self,
        attention: &Attention,
        heads: usize,
        tile: Tile,
        [kinds, sums]: [usize; 2],
    ) -> Grid {
        let tiles = attention.starts.len().div_ceil(tile.rows);
        let shared = match self.width {
            Some(width) => {
                let scalars = (kinds * tile.rows + 4 * tile.columns) * width;
                scalars * 2 + 2 * sums * tile.columns * size_of::<f32>()
            }
            // What `Memory` in attention_f32.cu lays out.
            None => {
                let head_dim = attention.layout.head_dim;
                let tiles = 2 * tile.rows * head_dim + 2 * tile.columns * (head_dim + 1);
                (tiles + 2 * tile.rows * tile.columns) * size_of::<f32>()
            }
        };
        Grid {
            blocks: (heads as u32, tiles as u32, 1),
            threads: THREADS,
            shared: shared as u32,
        }
    }
}

impl Attention<'_> {
    /// `qkv` is `[tokens, (heads + 2 * key_value_heads) * head_dim]` with positions applied; `context` becomes
    /// `[tokens, heads * head_dim]`, its rows `stride` apart, and `log_sums` `log(sum(exp(scores)))` of each row,
    /// `[heads, tokens]`.
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
        let kernels = Kernels::of::<E>(self.layout.head_dim);
        let name = format!("attention_forward_{}", kernels.suffix);
        let grid = kernels.grid(self, heads, kernels.forward, [1, 0]);
        let [queries, keys, dimension, tokens] = self.shape();
        let (stride, scale) = (stride as i32, self.scale());
        if tokens == 0 {
            return Ok(());
        }
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
                    &queries,
                    &keys,
                    &dimension,
                    &tokens,
                    &stride,
                    &scale
                ]
            )
        }
    }

    /// From the gradient of the context to that of `qkv`, all of which is written.
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
        let kernels = Kernels::of::<E>(head_dim);
        let mut grid = kernels.grid(self, key_value_heads, kernels.backward_keys, [2, 2]);
        grid.blocks.2 = kernels.key_layers;
        let of_keys = (format!("keys_{}", kernels.suffix), grid, &self.ends);
        let grid = kernels.grid(self, heads, kernels.backward_queries, [2, 0]);
        let of_queries = (format!("queries_{}", kernels.suffix), grid, &self.starts);
        let [queries, keys, dimension, tokens] = self.shape();
        let scale = self.scale();
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
                        &scale
                    ]
                )?;
            }
        }
        Ok(())
    }

    /// `sum(context * d_context)` of each row of each head, `[heads, tokens]`.
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
                && qkv.len() == tokens * self.layout.width()
                && log_sums == heads * tokens
                && stride >= width
                && (tokens == 0 || context >= last_row + width),
            "queries, keys and values of another shape"
        );
        assert_aligned(gpu, qkv);
    }

    /// As the kernels take it: query heads, key heads, their dimension, tokens.
    fn shape(&self) -> [i32; 4] {
        let HeadLayout {
            heads,
            key_value_heads,
            head_dim,
        } = self.layout;
        [heads, key_value_heads, head_dim, self.starts.len()].map(|size| size as i32)
    }

    fn scale(&self) -> f32 {
        1.0 / (self.layout.head_dim as f32).sqrt()
    }
}

/// Kernels copy 16 bytes at a time.
fn assert_aligned<E: GpuElement>(gpu: &Gpu, data: &CudaView<E>) {
    let (at, _guard) = data.device_ptr(gpu.stream());
    assert_eq!(at % 16, 0, "rows that begin between multiples of 16 bytes");
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::cuda::testing::{assert_near, gpu};
    use crate::engine::ops::attention as plain;
    use crate::engine::ops::element::Element;
    use crate::engine::ops::segments::Segments;
    use crate::engine::testing::random_values;
    use half::bf16;

    fn layout(heads: usize, key_value_heads: usize, head_dim: usize) -> HeadLayout {
        HeadLayout {
            heads,
            key_value_heads,
            head_dim,
        }
    }

    struct Case {
        layout: HeadLayout,
        lengths: Vec<usize>,
        /// Scalars between one row of the context and the next.
        gap: usize,
        /// Of all values.
        factor: f32,
    }

    /// All that the operation gives: rows of the context with their gaps, log sums, and the gradient of qkv.
    struct Results<E> {
        context: Vec<E>,
        log_sums: Vec<f32>,
        d_qkv: Vec<E>,
    }

    impl Case {
        fn new(layout: HeadLayout, lengths: &[usize]) -> Self {
            let lengths = lengths.to_vec();
            Self {
                layout,
                lengths,
                gap: 0,
                factor: 1.0,
            }
        }

        fn tokens(&self) -> usize {
            self.lengths.iter().sum()
        }

        fn out_width(&self) -> usize {
            self.layout.heads * self.layout.head_dim
        }

        /// Of each token, the first of its segment and the one after the last.
        fn borders(&self) -> [Vec<u32>; 2] {
            let (mut starts, mut ends) = (Vec::new(), Vec::new());
            for &length in &self.lengths {
                let start = starts.len();
                starts.resize(start + length, start as u32);
                ends.resize(start + length, (start + length) as u32);
            }
            [starts, ends]
        }

        /// Values and the gradient of the context, as both types can hold them.
        fn input<E: Element>(&self) -> [Vec<E>; 2] {
            let lengths = [self.layout.width(), self.out_width()];
            [0, 1].map(|which| {
                let values = random_values(self.tokens() * lengths[which], which as u64 + 1);
                values
                    .into_iter()
                    .map(|x| E::narrow(bf16::from_f32(x * self.factor).to_f32()))
                    .collect()
            })
        }

        fn run<E: GpuElement + Element>(&self, gpu: &Gpu) -> Results<E> {
            let [qkv, d_context] = self.input::<E>().map(|values| gpu.upload(&values).unwrap());
            let [starts, ends] = self.borders().map(|values| gpu.upload(&values).unwrap());
            let attention = Attention {
                layout: self.layout,
                starts: starts.as_view(),
                ends: ends.as_view(),
            };
            let (tokens, stride) = (self.tokens(), self.out_width() + self.gap);
            let (rows, sums) = (tokens * stride, self.layout.heads * tokens);
            let mut context = gpu.upload(&vec![E::narrow(7.0); rows]).unwrap();
            let mut log_sums = gpu.take::<f32>(sums).unwrap();
            attention
                .forward(
                    gpu,
                    &qkv.as_view(),
                    &mut context.as_view_mut(),
                    stride,
                    &mut log_sums.as_view_mut(),
                )
                .unwrap();
            let mut d_qkv = gpu.take::<E>(qkv.len()).unwrap();
            let saved = Saved {
                qkv: &qkv.as_view(),
                context: &context.as_view(),
                stride,
                log_sums: &log_sums.as_view(),
                d_context: &d_context.as_view(),
            };
            attention
                .backward(gpu, &saved, &mut d_qkv.as_view_mut())
                .unwrap();
            Results {
                context: gpu.download(&context, rows).unwrap(),
                log_sums: gpu.download(&log_sums, sums).unwrap(),
                d_qkv: gpu.download(&d_qkv, qkv.len()).unwrap(),
            }
        }

        fn expected(&self) -> Results<f32> {
            let [qkv, d_context] = self.input::<f32>();
            let segments = Segments::new(&self.lengths);
            let attention = plain::Attention {
                layout: self.layout,
                segments: &segments,
            };
            let mut results = Results {
                context: vec![0.0; d_context.len()],
                log_sums: vec![0.0; self.layout.heads * self.tokens()],
                d_qkv: vec![0.0; qkv.len()],
            };
            attention.forward(&qkv, &mut results.context, &mut results.log_sums);
            let saved = plain::Saved {
                qkv: &qkv,
                out: &results.context,
                d_out: &d_context,
                log_sums: &results.log_sums,
            };
            attention.backward(&saved, &mut results.d_qkv);
            results
        }

        fn check<E: GpuElement + Element>(&self, gpu: &Gpu, tolerance: f32) {
            let wide = |values: &[E]| -> Vec<f32> { values.iter().map(|x| x.wide()).collect() };
            let (found, expected) = (self.run::<E>(gpu), self.expected());
            let what = |what: &str| {
                let suffix = E::SUFFIX;
                format!("{what}, {suffix}, {:?}, {:?}", self.layout, self.lengths)
            };
            let context = wide(&found.context);
            let rows = context.chunks_exact(self.out_width() + self.gap);
            let (context, gaps): (Vec<_>, Vec<_>) =
                rows.map(|row| row.split_at(self.out_width())).unzip();
            assert!(gaps.concat().iter().all(|x| *x == 7.0), "{}", what("gaps"));
            assert_near(
                &what("context"),
                &context.concat(),
                &expected.context,
                tolerance,
            );
            assert_near(&what("log sums"), &found.log_sums, &expected.log_sums, 1e-5);
            assert_near(
                &what("d_qkv"),
                &wide(&found.d_qkv),
                &expected.d_qkv,
                tolerance,
            );
        }

        fn check_both(&self, gpu: &Gpu) {
            self.check::<f32>(gpu, 1e-5);
            self.check::<bf16>(gpu, 1e-2);
        }
    }

    #[test]
    fn segments_of_all_lengths_equal_those_of_the_processor() {
        let Some(gpu) = gpu() else { return };
        let short: Vec<usize> = (1..=16).collect();
        let layouts: [&[usize]; 5] = [&[1], &[150], &short, &[64, 64, 2], &[129, 1, 1, 33]];
        for lengths in layouts {
            Case::new(layout(2, 1, 64), lengths).check_both(gpu);
        }
    }

    #[test]
    fn heads_of_all_widths_and_groups_equal_those_of_the_processor() {
        let Some(gpu) = gpu() else { return };
        let shapes = [
            (1, 1, 8),
            (8, 1, 16),
            (2, 2, 80),
            (4, 2, 128),
            (1, 1, 136),
            (2, 1, 256),
        ];
        for (heads, key_value_heads, head_dim) in shapes {
            Case::new(layout(heads, key_value_heads, head_dim), &[70, 1, 20, 5]).check_both(gpu);
        }
    }

    #[test]
    fn rows_of_the_context_lie_within_wider_ones() {
        let Some(gpu) = gpu() else { return };
        for gap in [3, 8] {
            let mut case = Case::new(layout(2, 1, 24), &[40, 31]);
            case.gap = gap;
            case.check_both(gpu);
        }
    }

    #[test]
    fn the_same_input_gives_the_same_bits() {
        let Some(gpu) = gpu() else { return };
        let case = Case::new(layout(4, 2, 64), &[50, 80]);
        let bits = || {
            let Results {
                context,
                log_sums,
                d_qkv,
            } = case.run::<bf16>(gpu);
            let log_sums: Vec<u32> = log_sums.into_iter().map(f32::to_bits).collect();
            let narrow = |values: Vec<bf16>| values.into_iter().map(bf16::to_bits).collect();
            let [context, d_qkv]: [Vec<u16>; 2] = [context, d_qkv].map(narrow);
            (context, log_sums, d_qkv)
        };
        assert_eq!(bits(), bits());
    }

    #[test]
    fn large_scores_stay_finite() {
        let Some(gpu) = gpu() else { return };
        let mut case = Case::new(layout(1, 1, 64), &[66]);
        case.factor = 1e3;
        let found = case.run::<bf16>(gpu);
        assert!(
            found
                .context
                .iter()
                .chain(&found.d_qkv)
                .all(|x| x.is_finite())
        );
    }
}
