//! LoRA on the embedding, as PEFT 0.21 has it: what is looked up for a token `t` is `W[t] + scale · B A[:, t]`, with `A` a column for
//! each token. Nothing is dropped here.
//!
//! With `u = A[:, t]` of each token and `S = scale · B`: `y += u Sᵀ`, `du = dy S`, `dB = scale · dyᵀ u`, and a column of `dA` is the
//! sum of `du` over its token's places, in their order. All of it is float32, whatever the base is.

use rayon::prelude::*;

use super::element::round_slice;
use super::matrix::{Along, MatrixMut, Target, View};
use super::product::{multiply, multiply_turned};
use super::{ROW_TILE, add_in_place, vector};
use crate::engine::buffer::{Buffer, Pool};
use crate::engine::params::Weight;

/// The trainable update of the embedding.
#[derive(Clone, Debug)]
pub struct LoraEmbedding {
    /// `[rank][vocabulary]`
    pub a: Weight,
    /// `[width][rank]`
    pub b: Weight,
    pub scale: f32,
}

impl LoraEmbedding {
    /// Adds what the adapter makes of these tokens to `rows` `[tokens][width]`.
    pub fn forward(&self, ids: &[u32], rows: &mut [f32], pool: &Pool) {
        let (width, rank) = self.b.matrix_dims();
        let (u, s) = (self.columns(ids, pool), self.scaled_b(pool));
        let mut added = pool.take::<f32>(rows.len());
        multiply(
            Target::new(&mut added[..], ids.len(), width),
            View::new(&u[..], ids.len(), rank),
            View::new(&s[..], width, rank),
            Along::Columns,
        );
        add_in_place(rows, &added);
    }

    /// Hands over the gradients of both factors, where `gradient` `[tokens][width]` is that of what was looked up.
    pub fn backward(&self, ids: &[u32], gradient: &[f32], pool: &Pool) {
        let (width, rank) = self.b.matrix_dims();
        let dy = View::new(gradient, ids.len(), width);
        let mut u = self.columns(ids, pool);
        let mut du = pool.take::<f32>(u.len());
        let s = self.scaled_b(pool);
        multiply(
            Target::new(&mut du[..], ids.len(), rank),
            dy,
            View::new(&s[..], width, rank),
            Along::Rows,
        );
        vector::dispatch(
            #[inline(always)]
            || vector::scale(&mut u, self.scale),
        );
        let u = View::new(&u[..], ids.len(), rank);
        self.b.add_gradient(|rows, gradient, accumulate| {
            let target = MatrixMut::new(gradient, rows.len(), rank);
            multiply_turned(target, accumulate, dy.part(rows.start, rows.len()), u);
        });
        self.backward_a(ids, &du, pool);
    }

    /// Hands over the gradient of `A`, that of `u` `[tokens][rank]` at hand.
    fn backward_a(&self, ids: &[u32], du: &[f32], pool: &Pool) {
        let (rank, vocabulary) = self.a.matrix_dims();
        let mut places: Vec<(u32, usize)> = ids.iter().copied().zip(0..).collect();
        places.sort_unstable();
        let tokens: Vec<&[(u32, usize)]> = places.chunk_by(|a, b| a.0 == b.0).collect();
        let mut sums = pool.zeroed::<f32>(tokens.len() * rank);
        sums.par_chunks_mut(rank)
            .with_min_len(ROW_TILE)
            .zip(&tokens)
            .for_each(|(sum, places)| {
                for (_, place) in *places {
                    vector::add_scaled(sum, &du[place * rank..(place + 1) * rank], 1.0);
                }
            });
        self.a.add_gradient(|rows, gradient, accumulate| {
            let rows = gradient.par_chunks_mut(vocabulary).zip(rows);
            rows.for_each(|(gradient, row)| {
                if !accumulate {
                    gradient.fill(0.0);
                }
                for (places, sum) in tokens.iter().zip(sums.chunks_exact(rank)) {
                    gradient[places[0].0 as usize] += sum[row];
                }
            });
        });
    }

    /// The columns of `A` of these tokens, `[tokens][rank]`.
    fn columns(&self, ids: &[u32], pool: &Pool) -> Buffer<f32> {
        let (rank, vocabulary) = self.a.matrix_dims();
        let a = self.a.read_f32();
        let mut columns = pool.take::<f32>(ids.len() * rank);
        columns
            .par_chunks_mut(rank)
            .with_min_len(ROW_TILE)
            .zip(ids)
            .for_each(|(column, id)| {
                for (row, x) in column.iter_mut().enumerate() {
                    *x = a[row * vocabulary + *id as usize];
                }
            });
        columns
    }

    fn scaled_b(&self, pool: &Pool) -> Buffer<f32> {
        let b = self.b.read_f32();
        let mut scaled = pool.take(b.len());
        round_slice(&b, self.scale, &mut scaled);
        scaled
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::ops::embedding::Embedding;
    use crate::engine::ops::token_matrix::TokenMatrix;
    use crate::engine::testing::{TestWeights, assert_close, flat, in_pool, random_tensor};
    use candle_core::{Device, Tensor};

    /// Tokens that come several times, once and never.
    #[test]
    fn values_and_gradients_equal_the_reference() {
        let (vocabulary, width, rank, tokens) = (31, 12, 5, 200);
        let shapes: [(&str, &[usize]); 3] = [
            ("a", &[rank, vocabulary]),
            ("b", &[width, rank]),
            ("w", &[vocabulary, width]),
        ];
        let weights = TestWeights::new(&shapes);
        let ids: Vec<u32> = (0..tokens).map(|i| (i * i % 29) as u32).collect();
        let scale = 0.75;
        let gradient = random_tensor(tokens, width, 2);

        let index = Tensor::new(ids.as_slice(), &Device::Cpu).unwrap();
        let (a, b) = (weights.variable("a"), weights.variable("b"));
        let u = a.t().unwrap().contiguous().unwrap();
        let u = u.index_select(&index, 0).unwrap();
        let added = (u.matmul(&b.t().unwrap()).unwrap() * scale).unwrap();
        let looked_up = weights.variable("w").index_select(&index, 0).unwrap();
        let expected = (looked_up + added).unwrap();
        let graph = (&expected * &gradient).unwrap().sum_all().unwrap();
        let gradients = graph.backward().unwrap();
        let of = |name: &str| flat(gradients.get(&weights.variable(name)).unwrap());

        let embedding = Embedding {
            matrix: TokenMatrix::from(weights.frozen("w")),
            lora: Some(LoraEmbedding {
                a: weights.trainable("a"),
                b: weights.trainable("b"),
                scale: scale as f32,
            }),
        };
        assert!(embedding.is_trained());
        let gradient = flat(&gradient);
        let run = |threads| {
            in_pool(threads, || {
                let pool = Pool::default();
                let mut rows = vec![0.0; tokens * width];
                embedding.forward(&ids, &mut rows, &pool);
                weights.reset_gradients();
                embedding.backward(&ids, &gradient, &pool);
                let once = weights.gradients(&["w"]);
                weights.reset_gradients();
                embedding.backward(&ids, &gradient, &pool);
                embedding.backward(&ids, &gradient, &pool);
                (rows, once, weights.gradients(&["w"]))
            })
        };
        let (rows, once, twice) = run(1);
        assert_close("value", &rows, &flat(&expected));
        let factors = [of("a"), of("b")].concat();
        assert_close("gradient", &once[..factors.len()], &factors);
        let doubled: Vec<f32> = factors.iter().map(|g| 2.0 * g).collect();
        assert_close("added gradient", &twice[..factors.len()], &doubled);
        for threads in [2, 3] {
            assert_eq!(run(threads), (rows.clone(), once.clone(), twice.clone()));
        }
    }
}
