//! What a moment of 8 bits takes: a code of each scalar and the largest magnitude of each block, but float32 in the tensors that
//! keep it ([`TensorLayout::has_8bit_moments`](crate::files::TensorLayout::has_8bit_moments)).

use super::{F32, LINEARS, Shape, Trained, Work};
use crate::files::moments::{BLOCK_SCALARS, MIN_8BIT_SCALARS};

/// Bytes of one moment of 8 bits of all trainable scalars.
pub(super) fn bytes_of_8bit(shape: &Shape, work: &Work) -> u64 {
    match &work.trained {
        Trained::All => of_model(shape),
        Trained::Adapters { ranks, tokens, .. } => {
            let layers = ranks.iter().enumerate();
            let factors = layers.map(|(layer, ranks)| of_factors(shape, layer, ranks));
            // Rows of the embedding are a tensor, and so are those of the output layer; here they are counted as one. Of two whole
            // matrices the first is the embedding.
            let rows = of_tensor((tokens.rows * shape.hidden_size) as u64);
            let whole = match tokens.whole {
                0 => 0,
                1 => shape.token_matrix() * F32,
                _ => shape.token_matrix() * F32 + of_tensor(shape.token_matrix()),
            };
            factors.sum::<u64>() + rows + whole
        }
    }
}

fn of_model(shape: &Shape) -> u64 {
    let of_layer = |layer: usize| {
        let linears = shape.linears(layer);
        let linears = linears.map(|(width, out, _)| of_tensor((width * out) as u64));
        let [experts, _] = shape.expert_matrices(layer);
        linears.iter().sum::<u64>()
            + of_tensor(shape.router(layer))
            + experts * of_tensor(shape.expert_matrix())
    };
    let head = match shape.tied {
        true => 0,
        false => of_tensor(shape.token_matrix()),
    };
    // Norms and biases are as good as always small.
    let kept = (shape.token_matrix() + shape.vectors()) * F32;
    (0..shape.layers).map(of_layer).sum::<u64>() + head + kept
}

fn of_factors(shape: &Shape, layer: usize, ranks: &[usize; LINEARS]) -> u64 {
    let linears = shape.linears(layer).into_iter().zip(ranks);
    let linears = linears.filter(|((_, out, _), _)| *out > 0);
    linears
        .map(|((width, out, _), rank)| {
            of_tensor((rank * width) as u64) + of_tensor((rank * out) as u64)
        })
        .sum()
}

fn of_tensor(scalars: u64) -> u64 {
    match scalars >= MIN_8BIT_SCALARS as u64 {
        true => scalars + scalars.div_ceil(BLOCK_SCALARS as u64) * F32,
        false => scalars * F32,
    }
}
