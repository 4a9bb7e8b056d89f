//! What a worker needs on a GPU, in bytes of its buffers. What the driver and NCCL take for themselves comes on top, some
//! hundred MiB; it differs from one version and one machine to another, and no formula of theirs is published.

mod weights;

use super::layer::{Layer, Place, STATE_TOKENS};
use super::{Bytes, F32, Moment, Shape, Trained, Work, pass};
use crate::job::{BaseDtype, Reduction};
pub use weights::{RANK_MULTIPLE, WIDENED_TILE, widened_tile};

/// Scalars of a gradient that are computed at a time in full training, which keeps no whole gradient.
pub const SUMS_TILE: usize = 32 << 20;
/// Most logits in memory at a time.
pub const CHUNK_SCALARS: usize = 96 << 20;
/// Least rows of a chunk of the loss, however large the vocabulary.
pub const MIN_CHUNK_ROWS: usize = 128;
/// Scalars whose mean gradient is in memory at a time where a worker is alone.
pub const MEAN_TILE: usize = 32 << 20;
/// Scalars that are summed over NCCL at a time: 64 MiB of exact sums.
pub const EXCHANGE_BUCKET: usize = 8 << 20;
/// Workspace of the matrix products (cuBLAS), as NVIDIA advises it for Hopper.
pub const WORKSPACE_BYTES: usize = 32 << 20;

/// Most rows (tokens) of a chunk of the loss.
pub fn chunk_rows(vocabulary: usize) -> usize {
    (CHUNK_SCALARS / vocabulary.max(1)).max(MIN_CHUNK_ROWS)
}

/// Memory of a worker on a GPU at the peak of a step, as if every token were trained.
pub fn on_gpu(shape: &Shape, work: &Work) -> Bytes {
    let element = match work.dtype {
        BaseDtype::Float32 => F32,
        BaseDtype::Bfloat16 => 2,
    };
    let layers = Layer::all(shape, work, element, RANK_MULTIPLE, Place::Gpu);
    let scalars = work.scalars(shape);
    let tile = |tile: usize| scalars.min(tile as u64) * F32;
    // Ids, rows of rotary tables, and two borders of what each token sees, through each window that hides something.
    let windows = shape.windows.iter();
    let narrow = windows
        .filter(|window| **window < work.sequence_len)
        .count() as u64;
    let batch = (4 + 2 * narrow) * work.tokens() * 4 + chunks(shape, work);
    let scratch = match work.trained {
        Trained::All | Trained::Some(_) => tile(SUMS_TILE),
        Trained::Adapters { .. } => 0,
    };
    let loss = loss(shape, work, element);
    let peak = pass(&layers, work.checkpointing, loss, batch + scratch);
    let peak = match work.alone {
        true => peak.or_at(Moment::Update, tile(MEAN_TILE)),
        false => peak.or_at(Moment::Exchange, scalars * F32 + exchange(work, scalars)),
    };
    Bytes {
        weights: weights::bytes(shape, work, element),
        training: training(shape, work, scalars),
        activations: peak.activations,
        operation: peak.operation,
        libraries: WORKSPACE_BYTES as u64,
        moment: peak.moment,
    }
}

/// Bytes of what says where the chunks of a slot's blocks lie, where layers have linear attention.
fn chunks(shape: &Shape, work: &Work) -> u64 {
    match shape.linear_attention {
        Some(_) => {
            let chunks = work.batch * work.sequence_len.div_ceil(STATE_TOKENS);
            (4 * chunks + work.batch + 1) as u64 * 4
        }
        None => 0,
    }
}

/// Bytes that an exchange over NCCL takes beside the mean gradient: a member's share of two buckets of sums. It is that of two
/// members; the more there are, the less each takes.
fn exchange(work: &Work, scalars: u64) -> u64 {
    match work.reduction {
        Reduction::Exact => 8 * scalars.min(2 * EXCHANGE_BUCKET as u64) / 2,
        Reduction::Fast => 0,
    }
}

/// Bytes of the flat weights, their moments, the sums, and the gradient of a slot where it is kept.
fn training(shape: &Shape, work: &Work, scalars: u64) -> u64 {
    let sum = match work.reduction {
        Reduction::Exact => 8,
        Reduction::Fast => F32,
    };
    let slot = match work.trained {
        Trained::All | Trained::Some(_) => 0,
        Trained::Adapters { .. } => F32,
    };
    work.state_bytes(shape) + scalars * (sum + slot)
}

/// Bytes of a chunk of the loss: its rows, normed, their logits in float32 and the logits' gradient.
fn loss(shape: &Shape, work: &Work, element: u64) -> u64 {
    let rows = work.tokens().min(chunk_rows(shape.vocab_size) as u64);
    let (hidden, vocabulary) = (shape.hidden_size as u64, shape.vocab_size as u64);
    let chunk = rows * (hidden * (F32 + element) + vocabulary * element);
    chunk + rows * (vocabulary * F32).max(2 * hidden * F32)
}
