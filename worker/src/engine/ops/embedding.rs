//! Token embeddings: a gather forward, and a sum by token id backward.

use rayon::prelude::*;

use super::lora_embedding::LoraEmbedding;
use super::token_matrix::TokenMatrix;
use super::{ROW_TILE, vector};
use crate::engine::buffer::Pool;
use crate::engine::params::Weight;

/// The embedding, and perhaps an adapter on it.
#[derive(Clone, Debug)]
pub struct Embedding {
    pub matrix: TokenMatrix,
    pub lora: Option<LoraEmbedding>,
}

impl From<TokenMatrix> for Embedding {
    fn from(matrix: TokenMatrix) -> Self {
        Self { matrix, lora: None }
    }
}

impl Embedding {
    /// Whether anything of it is trained.
    pub fn is_trained(&self) -> bool {
        self.matrix.is_trained() || self.lora.is_some()
    }

    /// Looks tokens up, as float32 `[tokens][width]`. Every id is within the vocabulary.
    pub fn forward(&self, ids: &[u32], rows: &mut [f32], pool: &Pool) {
        forward(ids, &self.matrix, rows);
        if let Some(lora) = &self.lora {
            lora.forward(ids, rows, pool);
        }
    }

    /// Hands over the gradients of what is trained.
    pub fn backward(&self, ids: &[u32], gradient: &[f32], pool: &Pool) {
        backward(ids, &self.matrix, gradient, pool);
        if let Some(lora) = &self.lora {
            lora.backward(ids, gradient, pool);
        }
    }
}

/// Gathers rows `ids` of the matrix, as float32 `[tokens][width]`. Every id is within the vocabulary.
fn forward(ids: &[u32], matrix: &TokenMatrix, rows: &mut [f32]) {
    let (_, width) = matrix.weight.matrix_dims();
    let weight = matrix.weight.read();
    rows.par_chunks_mut(ROW_TILE * width)
        .zip(ids.par_chunks(ROW_TILE))
        .for_each(|(rows, ids)| {
            for (row, id) in rows.chunks_exact_mut(width).zip(ids) {
                weight.slice().copy_row(*id as usize, width, row);
            }
        });
    let Some(trained) = &matrix.rows else {
        return;
    };
    let weight = trained.weight.read();
    for (row, id) in rows.chunks_exact_mut(width).zip(ids) {
        if let Some(trained) = trained.row_of(*id) {
            weight.slice().copy_row(trained, width, row);
        }
    }
}

/// Adds each token's gradient row to its id's row, in token order, where that is trained.
fn backward(ids: &[u32], matrix: &TokenMatrix, gradient: &[f32], pool: &Pool) {
    let tokens = ids.iter().enumerate();
    if let Some(trained) = &matrix.rows {
        let placed = tokens
            .filter_map(|(token, id)| Some((trained.row_of(*id)?, token)))
            .collect();
        add_rows(placed, &trained.weight, gradient, pool);
    } else if matrix.weight.is_trainable() {
        let placed = tokens.map(|(token, id)| (*id as usize, token)).collect();
        add_rows(placed, &matrix.weight, gradient, pool);
    }
}

/// Hands over the gradient of rows: `placed` has the row of each token that reads one.
fn add_rows(mut placed: Vec<(usize, usize)>, weight: &Weight, gradient: &[f32], pool: &Pool) {
    let (_, width) = weight.matrix_dims();
    placed.sort_unstable();
    let groups: Vec<&[(usize, usize)]> = placed.chunk_by(|a, b| a.0 == b.0).collect();
    let mut sums = pool.zeroed::<f32>(groups.len() * width);
    sums.par_chunks_mut(width)
        .with_min_len(16)
        .zip(&groups)
        .for_each(|(sum, tokens)| {
            for (_, token) in *tokens {
                let row = &gradient[token * width..(token + 1) * width];
                vector::dispatch(
                    #[inline(always)]
                    || vector::add_scaled(sum, row, 1.0),
                );
            }
        });
    let rows: Vec<usize> = groups.iter().map(|group| group[0].0).collect();
    weight.add_gradient_rows(&rows, &sums);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::accumulator::Accumulator;
    use crate::engine::params::{Collect, Parameters};
    use crate::engine::testing::{assert_close, flat, in_pool, random_tensor, random_values};
    use candle_core::{Device, Tensor, Var};
    use common::files::layout::Layout;

    #[test]
    fn values_and_gradients_equal_the_reference() {
        let (vocabulary, width, tokens) = (23, 6, 200);
        let values = random_values(vocabulary * width, 1);
        let layout = Layout::new([("e".to_owned(), vec![vocabulary, width])]);
        let parameters = Parameters::new(layout, values.clone(), Collect::Slot);
        let weight = TokenMatrix::from(parameters.weight("e").unwrap());
        let ids: Vec<u32> = (0..tokens).map(|i| (i * i % 19) as u32).collect();
        let gradient = random_tensor(tokens, width, 2);

        let table = Var::from_vec(values, (vocabulary, width), &Device::Cpu).unwrap();
        let index = Tensor::new(ids.as_slice(), &Device::Cpu).unwrap();
        let expected = table.index_select(&index, 0).unwrap();
        let graph = (&expected * &gradient).unwrap().sum_all().unwrap();
        let expected_gradient = flat(graph.backward().unwrap().get(&table).unwrap());

        let gradient = flat(&gradient);
        let run = |threads| {
            in_pool(threads, || {
                let pool = Pool::default();
                parameters.gradients().begin(&mut Accumulator::default(), 1);
                backward(&ids, &weight, &gradient, &pool);
                let once = parameters.gradients().flat().unwrap();
                backward(&ids, &weight, &gradient, &pool);
                let twice = parameters.gradients().flat().unwrap();
                let mut rows = vec![0.0; tokens * width];
                forward(&ids, &weight, &mut rows);
                (rows, once, twice)
            })
        };
        let (rows, once, twice) = run(1);
        assert_eq!(rows, flat(&expected));
        assert_close("gradient", &once, &expected_gradient);
        let doubled: Vec<f32> = once.iter().map(|g| 2.0 * g).collect();
        assert_close("added gradient", &twice, &doubled);
        assert_eq!(run(3), (rows, once, twice));
    }
}
