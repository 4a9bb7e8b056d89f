//! What a worker needs on a processor.

use super::layer::{Layer, Place};
use super::{Bytes, F32, KeyValues, Moment, Shape, Trained, Work, pass};
use crate::job::{BaseDtype, Optimizer, Reduction, is_embedding};
use crate::nf4;

/// Scalars of a gradient that are computed at a time in full training, which keeps no whole gradient.
pub const SUMS_TILE: usize = 4 << 20;
/// Most logits in memory at a time.
pub const CHUNK_SCALARS: usize = 24 << 20;
/// Most rows (tokens) of a chunk of the loss, however small the vocabulary.
pub const MAX_CHUNK_ROWS: usize = 512;
/// Least rows of a chunk of the loss, however large the vocabulary.
pub const MIN_CHUNK_ROWS: usize = 16;
/// Memory of the program itself: code, threads and what the allocator holds.
const PROGRAM_BYTES: u64 = 14 << 20;

/// Most rows (tokens) of a chunk of the loss, for this vocabulary.
pub fn chunk_rows(vocabulary: usize) -> usize {
    (CHUNK_SCALARS / vocabulary.max(1)).clamp(MIN_CHUNK_ROWS, MAX_CHUNK_ROWS)
}

/// Memory of a worker on the processor at the peak of a step, as if every token were trained.
pub fn on_processor(shape: &Shape, work: &Work) -> Bytes {
    let scalars = work.scalars(shape);
    // Full training computes in the type of what it trains.
    let element = match (&work.trained, work.dtype) {
        (Trained::Adapters { .. }, BaseDtype::Bfloat16) => 2,
        (Trained::Adapters { .. }, BaseDtype::Float32) => F32,
        (Trained::All | Trained::Some(_), _) => work.weight_bytes(),
    };
    let frozen = match work.trained {
        Trained::All => 0,
        Trained::Some(_) => shape.parameters().saturating_sub(scalars) * element,
        Trained::Adapters { ref tokens, .. } => {
            frozen_matrices(shape, work, element, tokens.whole_matrices()) + shape.vectors() * F32
        }
    };
    let layers = Layer::all(shape, work, element, 1, Place::Processor);
    // What the loss took stays in the engine's pool, because nothing else is as large.
    let loss = loss(shape, work, element);
    let stays = loss + Layer::left_over(&layers) + across_layers(shape, work, element);
    let peak = pass(&layers, work.checkpointing, 0, stays);
    let peak = peak.or_at(Moment::Update, update(shape, work));
    Bytes {
        weights: frozen + shape.tables(work),
        training: training(shape, work, scalars),
        activations: peak.activations,
        operation: peak.operation,
        libraries: PROGRAM_BYTES,
        moment: peak.moment,
    }
}

/// Bytes of what all layers of a pass have together: their own inputs and the gradient of these, and the keys and values that layers
/// have of an earlier one, with their gradient.
fn across_layers(shape: &Shape, work: &Work, element: u64) -> u64 {
    let inputs = shape.layer_inputs.map_or(0, |own| own.width * shape.layers) as u64;
    let mut lenders: Vec<usize> = (0..shape.layers)
        .filter_map(|layer| match shape.sizes_of(layer).key_values {
            KeyValues::Of(lender) => Some(lender),
            KeyValues::Apart | KeyValues::Same => None,
        })
        .collect();
    lenders.sort_unstable();
    lenders.dedup();
    let lent = lenders.into_iter().map(|layer| {
        let sizes = shape.sizes_of(layer);
        2 * (sizes.key_value_heads * sizes.head_dim) as u64
    });
    // Their inputs are computed in two parts, and so is the gradient.
    work.tokens() * (3 * inputs * F32 + lent.sum::<u64>() * (element + F32))
}

/// Bytes of the base model's matrices that are not trained, in the engine's element type or in 4 bits.
fn frozen_matrices(shape: &Shape, work: &Work, element: u64, whole: usize) -> u64 {
    let token_matrices =
        (shape.token_matrices() / shape.token_matrix()).saturating_sub(whole as u64);
    let [of_inputs, projection] = shape.input_matrices();
    let Some(how) = work.quantization else {
        let [layers, _] = shape.layer_matrices();
        return (layers + token_matrices * shape.token_matrix() + of_inputs) * element;
    };
    let four_bits = |scalars| nf4::bytes(scalars, how.nested_scales);
    let expert = match how.experts {
        true => four_bits(shape.expert_matrix()),
        false => shape.expert_matrix() * element,
    };
    let of_layer = |layer: usize| {
        let linears = shape.linears(layer);
        let linears = linears.map(|(width, out, _)| four_bits((width * out) as u64));
        let [experts, _] = shape.expert_matrices(layer);
        linears.iter().sum::<u64>() + shape.router(layer) * element + experts * expert
    };
    let tokens = match how.embeddings {
        true => token_matrices * four_bits(shape.token_matrix()) + four_bits(of_inputs),
        false => (token_matrices * shape.token_matrix() + of_inputs) * element,
    };
    (0..shape.layers).map(of_layer).sum::<u64>() + tokens + four_bits(projection)
}

/// Bytes of the flat weights, their moments, the sums; a slot's gradient, or the tile of it that is computed; and the mean
/// gradient, which is there while nothing is computed.
fn training(shape: &Shape, work: &Work, scalars: u64) -> u64 {
    let sum = match work.reduction {
        Reduction::Exact => 6,
        Reduction::Fast => F32,
    };
    let keeps_gradients = match &work.trained {
        Trained::All | Trained::Some(_) => false,
        Trained::Adapters { tokens, .. } => tokens.whole_matrices() == 0,
    };
    let gradient = match keeps_gradients {
        false => {
            let [of_inputs, _] = shape.input_matrices();
            let largest = shape.token_matrix().max(of_inputs);
            largest.min(SUMS_TILE as u64) * F32
        }
        true => scalars * F32,
    };
    let mean = match work.alone {
        true => 0,
        false => scalars * F32,
    };
    work.state_bytes(shape) + scalars * sum + gradient + mean + factors_apart(shape, work)
}

/// Bytes of the copies of factors B with those of each expert together.
fn factors_apart(shape: &Shape, work: &Work) -> u64 {
    let Trained::Adapters { experts, .. } = &work.trained else {
        return 0;
    };
    let of_layer = |(layer, ranks): (usize, &[usize; 3])| {
        let count = shape.experts_of(layer).map_or(0, |experts| experts.count);
        let factors = shape.expert_factors(layer, *ranks);
        factors.map(|[_, b]| (count * b) as u64).iter().sum::<u64>()
    };
    experts.iter().enumerate().map(of_layer).sum::<u64>() * F32
}

/// Bytes of a chunk of the loss: its rows, normed, their logits, whose gradient takes their place, and the rows' gradient twice; and
/// what an adapter on the output layer takes.
fn loss(shape: &Shape, work: &Work, element: u64) -> u64 {
    let rows = work.tokens().min(chunk_rows(shape.vocab_size) as u64);
    let (hidden, vocabulary) = (shape.hidden_size as u64, shape.vocab_size as u64);
    let chunk = rows * (hidden * (3 * F32 + element) + vocabulary * F32);
    chunk + head_adapter(shape, work, rows, element)
}

/// Bytes that an adapter on the output layer takes with a chunk of so many rows: its factors as they are multiplied, the gradient of
/// the larger one, its low-rank activations and their gradient, each as they are and turned; where inputs are dropped, two copies of
/// them; with magnitudes the logits once more, and their gradient.
fn head_adapter(shape: &Shape, work: &Work, rows: u64, element: u64) -> u64 {
    let (hidden, vocabulary) = (shape.hidden_size as u64, shape.vocab_size as u64);
    let Trained::Adapters {
        tokens,
        dropout,
        magnitudes,
        ..
    } = &work.trained
    else {
        return 0;
    };
    let rank = tokens.ranks[1].next_multiple_of(2) as u64;
    if rank == 0 {
        return 0;
    }
    let factors = rank * (hidden + vocabulary) * element + rank * vocabulary * F32;
    let low_rank = 4 * rows * rank * element;
    let dropped = match dropout {
        true => rows * hidden * (element + F32),
        false => 0,
    };
    let scaled = match magnitudes {
        true => rows * vocabulary * (F32 + element),
        false => 0,
    };
    factors + low_rank + dropped + scaled
}

/// Bytes that an update takes: with Muon the direction of a matrix, its product, and two squares of its shorter side; and the matrix
/// in float32 where it is not kept so.
fn update(shape: &Shape, work: &Work) -> u64 {
    let Optimizer::Muon { .. } = work.optimizer else {
        return 0;
    };
    let of_matrix = |rows: usize, columns: usize| {
        let side = rows.min(columns) as u64;
        let widened = match work.trained_dtype {
            BaseDtype::Float32 => 0,
            BaseDtype::Bfloat16 => 1,
        };
        (2 + widened) * (rows * columns) as u64 + 2 * side * side
    };
    if let Trained::Some(own) = &work.trained {
        let matrices = own.iter().filter(|tensor| !is_embedding(&tensor.name));
        let largest = matrices.filter_map(|tensor| match tensor.shape[..] {
            [rows, columns] => Some(of_matrix(rows, columns)),
            _ => None,
        });
        return largest.max().unwrap_or(0) * F32;
    }
    let linears = (0..shape.layers).flat_map(|layer| shape.linears(layer));
    let largest = linears.map(|(width, out, _)| match work.trained {
        Trained::All | Trained::Some(_) => of_matrix(out, width),
        Trained::Adapters { ref ranks, .. } => {
            let rank = ranks.iter().flatten().max().copied().unwrap_or(0);
            of_matrix(rank, width).max(of_matrix(out, rank))
        }
    });
    let expert = match (&work.trained, &shape.experts) {
        // Fused ones are no matrices.
        (Trained::All, Some(experts)) if !experts.biased && !experts.beside_dense => {
            of_matrix(experts.width, shape.hidden_size)
        }
        (Trained::All, None) => shape.layer_inputs.map_or(0, |own| {
            of_matrix(own.width * shape.layers, shape.hidden_size)
        }),
        // The factors of all experts are.
        (Trained::Adapters { experts: ranks, .. }, Some(experts)) => {
            let of = |(rank, (width, out)): (usize, (usize, usize))| {
                let rows = rank * experts.count;
                of_matrix(rows, width).max(of_matrix(out, rows))
            };
            let sides = experts.parameters(shape.hidden_size);
            let all = ranks
                .iter()
                .flat_map(|ranks| ranks.iter().copied().zip(sides));
            all.map(of).max().unwrap_or(0)
        }
        _ => 0,
    };
    largest.max().unwrap_or(0).max(expert) * F32
}
