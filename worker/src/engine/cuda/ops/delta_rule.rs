//! [`crate::engine::ops::delta_rule`] on the GPU: all of it in float32, chunk by chunk.
//!
//! What the rows of a chunk have to do with each other is computed for all chunks at once, in the forward and in the backward pass.
//! Only the states, and their gradients, go from chunk to chunk: a block for each segment, head and tile of the value's columns,
//! which are independent of each other. Every sum has its order from the shape alone.

use common::memory::STATE_TOKENS;
use cudarc::driver::{CudaView, CudaViewMut};

use crate::engine::cuda::GpuError;
use crate::engine::cuda::blas::GpuElement;
use crate::engine::cuda::chunks::Chunks;
use crate::engine::cuda::gpu::{DeviceBuffer, Gpu, Grid};
use crate::engine::ops::delta_rule::DeltaHeads;
use crate::launch;

/// As `kernels/delta_rule.cuh` has them.
const THREADS: u32 = 128;
const WARPS: u32 = THREADS / 32;
const COLUMNS: usize = 32;
const ROW_STRIDE: usize = 33;
const TILE_STRIDE: usize = COLUMNS + 4;

/// The rule, on the segments of a batch.
#[derive(Clone, Copy)]
pub struct DeltaRule<'a> {
    pub heads: DeltaHeads,
    pub chunks: &'a Chunks,
    pub tokens: usize,
}

/// What the rule reads, or the gradients of that.
pub struct RuleBuffers {
    /// Queries, keys and values, `[tokens][width]`.
    pub qkv: DeviceBuffer<f32>,
    /// The share that is written, `[tokens][value_heads]`.
    pub written: DeviceBuffer<f32>,
    /// The logarithm of what is kept, `[tokens][value_heads]`.
    pub kept: DeviceBuffer<f32>,
}

/// What the rule reads, as its kernels go on with it.
pub struct Prepared {
    /// Queries and keys are divided by their lengths.
    qkv: DeviceBuffer<f32>,
    written: DeviceBuffer<f32>,
    /// The logarithms of what is kept, summed from the beginning of each chunk: each sum, and what float32 leaves out of it.
    sums: DeviceBuffer<f32>,
    /// One over the length of each query and key, `[tokens][2 * key_heads]`.
    inverses: DeviceBuffer<f32>,
    /// The inverses of the chunks' systems, `[tokens][value_heads][chunk]`.
    solutions: DeviceBuffer<f32>,
    /// Decayed products of queries with keys up to their own, `[tokens][value_heads][chunk]`.
    scores: DeviceBuffer<f32>,
}

/// Refuses heads whose states this GPU has no room for.
pub fn check_heads(gpu: &Gpu, heads: DeltaHeads) -> Result<(), GpuError> {
    if shared(heads, 2) as usize <= gpu.shared_memory()? {
        return Ok(());
    }
    Err(GpuError::Heads {
        head_dim: heads.key_dim,
        name: gpu.name().to_owned(),
        reason: "linear attention's state of them is larger than a block's shared memory",
    })
}

/// Bytes of shared memory for a tile of a state, so many tiles of rows, and a slab of a factor.
fn shared(heads: DeltaHeads, tiles: usize) -> u32 {
    let rows = heads.key_dim + tiles * STATE_TOKENS;
    ((rows * TILE_STRIDE + STATE_TOKENS * ROW_STRIDE) * size_of::<f32>()) as u32
}

impl RuleBuffers {
    pub fn take(gpu: &Gpu, heads: DeltaHeads, tokens: usize) -> Result<Self, GpuError> {
        Ok(Self {
            qkv: gpu.take(tokens * heads.width())?,
            written: gpu.take(tokens * heads.value_heads)?,
            kept: gpu.take(tokens * heads.value_heads)?,
        })
    }
}

impl DeltaRule<'_> {
    /// Computes of each chunk what its rows have to do with each other.
    pub fn prepare(&self, gpu: &Gpu, mut inputs: RuleBuffers) -> Result<Prepared, GpuError> {
        let vectors = self.tokens * 2 * self.heads.key_heads;
        let pairs = self.tokens * self.heads.value_heads * STATE_TOKENS;
        let mut inverses = gpu.take::<f32>(vectors)?;
        let mut sums = gpu.take::<f32>(2 * self.tokens * self.heads.value_heads)?;
        let mut solutions = gpu.take::<f32>(pairs)?;
        let mut scores = gpu.take::<f32>(pairs)?;
        let [key_heads, value_heads, key_dim, value_dim] = self.sizes();
        let (count, width) = (vectors as i64, self.heads.width() as i32);
        self.check(&inputs);
        // SAFETY: there are as many queries and keys in rows of this width as there are warps to work, and the table names chunks of
        // the batch.
        unsafe {
            launch!(
                gpu,
                "delta_normalise",
                self.vectors_grid(),
                [
                    &mut inputs.qkv,
                    &mut inverses,
                    &count,
                    &key_heads,
                    &key_dim,
                    &width
                ]
            )?;
            launch!(
                gpu,
                "delta_prepare",
                self.chunks_grid(self.heads.value_heads),
                [
                    &inputs.qkv,
                    &inputs.written,
                    &inputs.kept,
                    &mut sums,
                    &mut solutions,
                    &mut scores,
                    &self.chunks.table,
                    &key_heads,
                    &value_heads,
                    &key_dim,
                    &value_dim
                ]
            )?;
        }
        Ok(Prepared {
            qkv: inputs.qkv,
            written: inputs.written,
            sums,
            inverses,
            solutions,
            scores,
        })
    }

    /// Computes what each token reads, `[tokens][value_heads * value_dim]`.
    pub fn forward<E: GpuElement>(
        &self,
        gpu: &Gpu,
        prepared: &Prepared,
        out: &mut CudaViewMut<E>,
    ) -> Result<(), GpuError> {
        assert_eq!(
            out.len(),
            self.tokens * self.heads.values(),
            "a row for each token"
        );
        let [key_heads, value_heads, key_dim, value_dim] = self.sizes();
        let name = format!("delta_forward_{}", E::SUFFIX);
        let Prepared {
            qkv,
            written,
            sums,
            solutions,
            scores,
            ..
        } = prepared;
        // SAFETY: what was prepared is of this batch and these heads, and `out` has a row for each token.
        unsafe {
            launch!(
                gpu,
                &name,
                self.scan_grid(1),
                [
                    qkv,
                    written,
                    sums,
                    solutions,
                    scores,
                    &self.chunks.table,
                    &self.chunks.segments,
                    out,
                    &key_heads,
                    &value_heads,
                    &key_dim,
                    &value_dim
                ]
            )
        }
    }

    /// Computes the gradients of what the rule reads, from that of the result.
    pub fn backward(
        &self,
        gpu: &Gpu,
        prepared: Prepared,
        d_out: &CudaView<f32>,
    ) -> Result<RuleBuffers, GpuError> {
        let rows = self.tokens * self.heads.values();
        assert_eq!(d_out.len(), rows, "a row for each token");
        let states = self.chunks.states * self.heads.value_heads * self.heads.state();
        let mut saved = Saved {
            values: gpu.take(rows)?,
            states: gpu.take(states)?,
            d_states: gpu.take(states)?,
            prepared,
        };
        let mut gradients = RuleBuffers::take(gpu, self.heads, self.tokens)?;
        self.states(gpu, &mut saved, d_out, &mut gradients)?;
        self.pairs(gpu, &mut saved, d_out, &mut gradients)?;
        self.inputs(gpu, &saved, d_out, &mut gradients)?;
        self.through_lengths(gpu, &saved.prepared, &mut gradients)?;
        Ok(gradients)
    }

    /// The states at the borders of chunks and the values that are written; and from the last chunk back the gradients of these
    /// states, and of what the chunks' systems are solved for.
    fn states(
        &self,
        gpu: &Gpu,
        saved: &mut Saved,
        d_out: &CudaView<f32>,
        gradients: &mut RuleBuffers,
    ) -> Result<(), GpuError> {
        let [key_heads, value_heads, key_dim, value_dim] = self.sizes();
        let Prepared {
            qkv,
            written,
            sums,
            solutions,
            scores,
            ..
        } = &saved.prepared;
        // SAFETY: all are of this batch and these heads; there is a state for each number that the table has.
        unsafe {
            launch!(
                gpu,
                "delta_states",
                self.scan_grid(1),
                [
                    qkv,
                    written,
                    sums,
                    solutions,
                    &self.chunks.table,
                    &self.chunks.segments,
                    &mut saved.states,
                    &mut saved.values,
                    &key_heads,
                    &value_heads,
                    &key_dim,
                    &value_dim
                ]
            )?;
            launch!(
                gpu,
                "delta_states_backward",
                self.scan_grid(2),
                [
                    qkv,
                    written,
                    sums,
                    solutions,
                    scores,
                    d_out,
                    &self.chunks.table,
                    &self.chunks.segments,
                    &mut saved.d_states,
                    &mut gradients.qkv,
                    &key_heads,
                    &value_heads,
                    &key_dim,
                    &value_dim
                ]
            )
        }
    }

    /// The gradients of what pairs of a chunk's rows are products of, in place of these.
    fn pairs(
        &self,
        gpu: &Gpu,
        saved: &mut Saved,
        d_out: &CudaView<f32>,
        gradients: &mut RuleBuffers,
    ) -> Result<(), GpuError> {
        let [key_heads, value_heads, key_dim, value_dim] = self.sizes();
        let Prepared {
            qkv,
            written,
            sums,
            solutions,
            scores,
            ..
        } = &mut saved.prepared;
        // SAFETY: all are of this batch and these heads.
        unsafe {
            launch!(
                gpu,
                "delta_pairs_backward",
                self.chunks_grid(self.heads.value_heads),
                [
                    &*qkv,
                    &*written,
                    &*sums,
                    &saved.values,
                    d_out,
                    &gradients.qkv,
                    solutions,
                    scores,
                    &mut gradients.written,
                    &mut gradients.kept,
                    &self.chunks.table,
                    &key_heads,
                    &value_heads,
                    &key_dim,
                    &value_dim
                ]
            )
        }
    }

    /// The gradients of queries and keys of length one, of values, and of the gates.
    fn inputs(
        &self,
        gpu: &Gpu,
        saved: &Saved,
        d_out: &CudaView<f32>,
        gradients: &mut RuleBuffers,
    ) -> Result<(), GpuError> {
        let [key_heads, value_heads, key_dim, value_dim] = self.sizes();
        let Prepared {
            qkv,
            written,
            sums,
            solutions,
            scores,
            ..
        } = &saved.prepared;
        // SAFETY: all are of this batch and these heads.
        unsafe {
            launch!(
                gpu,
                "delta_inputs_backward",
                self.chunks_grid(self.heads.key_heads),
                [
                    qkv,
                    written,
                    sums,
                    &saved.values,
                    d_out,
                    &saved.states,
                    &saved.d_states,
                    solutions,
                    scores,
                    &mut gradients.qkv,
                    &mut gradients.written,
                    &mut gradients.kept,
                    &self.chunks.table,
                    &key_heads,
                    &value_heads,
                    &key_dim,
                    &value_dim
                ]
            )?;
            let grid = Grid::rows(self.chunks.count, 32);
            launch!(
                gpu,
                "delta_kept_backward",
                grid,
                [&mut gradients.kept, &self.chunks.table, &value_heads]
            )
        }
    }

    fn through_lengths(
        &self,
        gpu: &Gpu,
        prepared: &Prepared,
        gradients: &mut RuleBuffers,
    ) -> Result<(), GpuError> {
        let [key_heads, _, key_dim, _] = self.sizes();
        let count = (self.tokens * 2 * self.heads.key_heads) as i64;
        let width = self.heads.width() as i32;
        // SAFETY: as where they were divided by their lengths.
        unsafe {
            launch!(
                gpu,
                "delta_normalise_backward",
                self.vectors_grid(),
                [
                    &prepared.qkv,
                    &prepared.inverses,
                    &mut gradients.qkv,
                    &count,
                    &key_heads,
                    &key_dim,
                    &width
                ]
            )
        }
    }

    fn check(&self, inputs: &RuleBuffers) {
        let gates = self.tokens * self.heads.value_heads;
        assert!(
            inputs.qkv.len() >= self.tokens * self.heads.width()
                && inputs.written.len() >= gates
                && inputs.kept.len() >= gates,
            "a row for each token"
        );
    }

    /// Heads of keys and of values, and their dimensions, as kernels take them.
    fn sizes(&self) -> [i32; 4] {
        let DeltaHeads {
            key_heads,
            value_heads,
            key_dim,
            value_dim,
        } = self.heads;
        [key_heads, value_heads, key_dim, value_dim].map(|size| size as i32)
    }

    /// A warp for each query and key.
    fn vectors_grid(&self) -> Grid {
        let vectors = self.tokens * 2 * self.heads.key_heads;
        Grid::rows(vectors.div_ceil(WARPS as usize), THREADS)
    }

    /// A block for each chunk and head.
    fn chunks_grid(&self, heads: usize) -> Grid {
        Grid {
            blocks: (self.chunks.count as u32, heads as u32, 1),
            threads: THREADS,
            shared: 0,
        }
    }

    /// A block for each segment, head and tile of a value's columns, with so many tiles of rows beside that of the state.
    fn scan_grid(&self, tiles: usize) -> Grid {
        let columns = self.heads.value_dim.div_ceil(COLUMNS) as u32;
        Grid {
            blocks: (
                self.chunks.segment_count as u32,
                self.heads.value_heads as u32,
                columns,
            ),
            threads: THREADS,
            shared: shared(self.heads, tiles),
        }
    }
}

/// What the backward pass computes on its way.
struct Saved {
    prepared: Prepared,
    /// The values that are written, `[tokens][value_heads * value_dim]`.
    values: DeviceBuffer<f32>,
    /// The states between chunks, `[borders][value_heads][key_dim][value_dim]`, and their gradients.
    states: DeviceBuffer<f32>,
    d_states: DeviceBuffer<f32>,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
