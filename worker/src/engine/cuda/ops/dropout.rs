//! Dropout on an adapter's input, by the masks that [`crate::engine::ops::lora_linear`] draws.

use common::rng::CounterRng;
use cudarc::driver::{CudaView, CudaViewMut};

use super::elementwise::Rows;
use super::lora_linear::Lora;
use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu, Grid};
use crate::engine::ops::ROW_TILE;
use crate::engine::ops::lora_linear::MaskKey;
use crate::launch;

const WORDS: usize = 16;
const THREADS: u32 = 256;

/// The dropout mask of one adapter in one slot.
pub struct Mask {
    /// Keys of the generator, by tile of rows.
    keys: DeviceBuffer<u32>,
    threshold: u32,
    keep_scale: f32,
}

impl Mask {
    pub fn new(gpu: &Gpu, adapter: &Lora, key: MaskKey, rows: usize) -> Result<Self, GpuError> {
        let keys: Vec<u32> = (0..rows.div_ceil(ROW_TILE))
            .flat_map(|tile| {
                let key = CounterRng::key(key.seed, &key.words(adapter.module, tile));
                let (words, _) = key.as_chunks::<4>();
                words
                    .iter()
                    .map(|word| u32::from_le_bytes(*word))
                    .collect::<Vec<_>>()
            })
            .collect();
        Ok(Self {
            keys: gpu.upload(&keys)?,
            threshold: (adapter.dropout * 4_294_967_296.0) as u32,
            keep_scale: (1.0 / (1.0 - adapter.dropout)) as f32,
        })
    }

    /// Copies `from` to `to` with some scalars dropped and the others scaled up.
    pub fn apply<E: GpuElement>(
        &self,
        gpu: &Gpu,
        (from, from_rows): (&CudaView<E>, Rows),
        (to, to_rows): (&mut CudaViewMut<E>, Rows),
    ) -> Result<(), GpuError> {
        let Rows { rows, columns, .. } = from_rows;
        assert_eq!((rows, columns), (to_rows.rows, to_rows.columns), "rows");
        assert!(
            from.len() >= from_rows.len() && to.len() >= to_rows.len(),
            "rows to drop from"
        );
        let tile_blocks = (ROW_TILE * columns).div_ceil(WORDS);
        let grid = Grid {
            blocks: (
                tile_blocks.div_ceil(THREADS as usize) as u32,
                rows.div_ceil(ROW_TILE) as u32,
                1,
            ),
            threads: THREADS,
            shared: 0,
        };
        let name = format!("dropout_{}", E::SUFFIX);
        let (count, width, tile) = (rows as i32, columns as i32, ROW_TILE as i32);
        let (from_stride, to_stride) = (from_rows.stride as i32, to_rows.stride as i32);
        // SAFETY: both sides were checked to hold their rows, and there is a key for each tile.
        unsafe {
            launch!(
                gpu,
                &name,
                grid,
                [
                    from,
                    to,
                    &self.keys,
                    &count,
                    &width,
                    &from_stride,
                    &to_stride,
                    &tile,
                    &self.threshold,
                    &self.keep_scale
                ]
            )
        }
    }
}
