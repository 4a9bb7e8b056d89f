//! Bytes of the weights on a GPU: as they are multiplied, with the adapters' factors in the same matrices; or in 4 bits, beside
//! memory that one matrix at a time is widened to.

use std::ops::Range;

use crate::job::Quantization;
use crate::memory::{F32, LINEARS, PROJECTIONS, Shape, Trained, Work};
use crate::nf4;

/// LoRA ranks are padded to a multiple of this, so that rows stay aligned for the tensor cores.
pub const RANK_MULTIPLE: usize = 8;
/// Most scalars of the embedding or the output layer that are widened from 4 bits at a time.
pub const WIDENED_TILE: usize = 32 << 20;
/// Tiles of these begin at multiples of so many rows or columns, so that products find them aligned.
const TILE_MULTIPLE: usize = 64;
/// Bytes of what the codes of a matrix of 4 bits stand for, which lies beside them.
const LEVELS_BYTES: u64 = 16 * F32;

/// How many rows of a matrix of tokens in 4 bits are widened at a time where a product goes over its rows, and how many columns
/// where it goes over these.
pub fn widened_tile(vocabulary: usize, width: usize) -> [usize; 2] {
    let of = |length: usize, other: usize| {
        let most = WIDENED_TILE / other.max(1) / TILE_MULTIPLE * TILE_MULTIPLE;
        most.max(TILE_MULTIPLE).min(length)
    };
    [of(vocabulary, width), of(width, vocabulary)]
}

/// Bytes of all weights and of the rotary tables.
pub(super) fn bytes(shape: &Shape, work: &Work, element: u64) -> u64 {
    let none = [0; LINEARS];
    let ranks = |layer: usize| match &work.trained {
        Trained::All | Trained::Some(_) => none,
        Trained::Adapters { ranks, .. } => ranks.get(layer).copied().unwrap_or(none),
    };
    let projections = (0..shape.layers).flat_map(|layer| {
        let ranks = ranks(layer);
        PROJECTIONS.map(|members| Projection::of(shape, (layer, &ranks), members))
    });
    let matrices = match work.quantization {
        None => {
            let factors = projections.map(|projection| projection.beside());
            (shape.matrices() + factors.sum::<u64>()) * element
        }
        Some(how) => {
            let projections: Vec<Projection> = projections.collect();
            let factors: u64 = projections.iter().map(Projection::factors).sum();
            let widest = projections.iter().map(Projection::scalars).max();
            let widened = widest.unwrap_or(0).max(widened_beside(shape, how));
            quantised(shape, how, element) + (factors + widened) * element
        }
    };
    matrices + shape.vectors() * F32 + shape.tables(work)
}

/// Linears of one input, whose weights are multiplied as one matrix with the factors of their adapters.
struct Projection {
    width: u64,
    out: u64,
    rank: u64,
}

impl Projection {
    fn of(
        shape: &Shape,
        (layer, ranks): (usize, &[usize; LINEARS]),
        members: Range<usize>,
    ) -> Self {
        let linears = &shape.linears(layer)[members.clone()];
        let padded = ranks[members].iter();
        let padded = padded.map(|rank| rank.next_multiple_of(RANK_MULTIPLE) as u64);
        Self {
            width: linears[0].0 as u64,
            out: linears.iter().map(|(_, out, _)| *out as u64).sum(),
            rank: padded.sum(),
        }
    }

    /// Scalars of the matrix.
    fn scalars(&self) -> u64 {
        match self.out {
            0 => 0,
            out => (out + self.rank) * (self.width + self.rank),
        }
    }

    /// Those of them that are no weights.
    fn beside(&self) -> u64 {
        self.scalars().saturating_sub(self.out * self.width)
    }

    /// Scalars of the factors by themselves.
    fn factors(&self) -> u64 {
        match self.out {
            0 => 0,
            out => (out + self.width) * self.rank,
        }
    }
}

/// Bytes of the weights where some are in 4 bits.
fn quantised(shape: &Shape, how: Quantization, element: u64) -> u64 {
    let four_bits = |scalars: u64| match scalars {
        0 => 0,
        scalars => nf4::bytes(scalars, how.nested_scales) + LEVELS_BYTES,
    };
    let expert = shape.expert_matrix();
    let of_experts = |layer: usize| {
        let [matrices, _] = shape.expert_matrices(layer);
        let is_fused = shape
            .experts_of(layer)
            .is_some_and(|experts| experts.biased);
        match (how.experts, is_fused) {
            (false, _) => matrices * expert * element,
            (true, false) => matrices * four_bits(expert),
            // Gate and up are one.
            (true, true) => matrices / 3 * (four_bits(2 * expert) + four_bits(expert)),
        }
    };
    let of_layer = |layer: usize| {
        let linears = shape.linears(layer);
        let linears = linears.map(|(width, out, _)| four_bits((width * out) as u64));
        linears.iter().sum::<u64>() + shape.router(layer) * element + of_experts(layer)
    };
    let of_tokens = match how.embeddings {
        true => shape.token_matrices() / shape.token_matrix() * four_bits(shape.token_matrix()),
        false => shape.token_matrices() * element,
    };
    (0..shape.layers).map(of_layer).sum::<u64>() + of_tokens
}

/// Most scalars that are widened at a time of what is no linear: the gate and up projections of an expert, or a tile of the output
/// layer.
fn widened_beside(shape: &Shape, how: Quantization) -> u64 {
    let expert = match how.experts {
        true => 2 * shape.expert_matrix(),
        false => 0,
    };
    let tokens = match how.embeddings {
        true => {
            let (vocabulary, width) = (shape.vocab_size, shape.hidden_size);
            let [rows, columns] = widened_tile(vocabulary, width);
            (rows * width).max(vocabulary * columns) as u64
        }
        false => 0,
    };
    expert.max(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_as_large_as_they_may_be_and_begin_where_products_want_them() {
        assert_eq!(widened_tile(1000, 256), [1000, 256]);
        // Qwen3-0.6B: 311 MB in bfloat16.
        let [rows, columns] = widened_tile(151_936, 1024);
        assert_eq!([rows, columns], [32_768, 192]);
        assert!((rows * 1024).max(151_936 * columns) <= WIDENED_TILE);
        // A tile is never empty, however long the other side is.
        assert_eq!(widened_tile(1 << 20, 4096), [8192, 64]);
    }
}
