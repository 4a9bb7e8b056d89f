//! Causal attention within segments (flash attention's recomputation, Dao et al., 2022): grouped queries, softmax in
//! float32, one tile of query rows at a time, so that no tokens-by-tokens matrix outlives its tile.
//!
//! Tiles are a function of the segments alone. Forward tasks are (query tile, head); backward tasks are (run of
//! segments, key-value head), so that each sum into a key or value has one owner and one order.

use std::cell::RefCell;
use std::ops::Range;

use gemm::Parallelism;
use rayon::prelude::*;

use super::element::{Element, narrow, widen};
use super::gemm::{Matrix, MatrixMut, Shared, multiply};
use super::rope::HeadLayout;
use super::segments::Segments;
use super::vector::{self, dispatch};

/// The operation.
pub struct Attention<'a> {
    pub layout: HeadLayout,
    pub segments: &'a Segments,
}

/// What the backward pass reads.
pub struct Saved<'a, E> {
    /// Queries, keys and values with positions applied.
    pub qkv: &'a [f32],
    pub out: &'a [E],
    pub d_out: &'a [f32],
    pub log_sums: &'a [f32],
}

/// Of each thread. Every element that is read is written before.
#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    d_scores: Vec<f32>,
    /// Output rows of a tile.
    rows: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Attention<'_> {
    /// `qkv` is `[tokens, (heads + 2 * key_value_heads) * head_dim]` with positions applied; `out` becomes
    /// `[tokens, heads * head_dim]`, and `log_sums` `log(sum(exp(scores)))` of each row, `[heads, tokens]`.
    pub fn forward<E: Element>(&self, qkv: &[f32], out: &mut [E], log_sums: &mut [f32]) {
        let HeadLayout {
            heads, head_dim, ..
        } = self.layout;
        let (tokens, out_width) = (self.segments.tokens(), self.out_width());
        assert!(
            qkv.len() == tokens * self.layout.width()
                && out.len() == tokens * out_width
                && log_sums.len() == heads * tokens,
            "queries, keys and values of another shape"
        );
        let tasks: Vec<(Range<usize>, usize)> = self
            .segments
            .runs()
            .iter()
            .flat_map(|run| self.segments.tiles(run))
            .flat_map(|rows| (0..heads).map(move |head| (rows.clone(), head)))
            .collect();
        let (shared_out, shared_sums) = (Shared::new(out), Shared::new(log_sums));
        tasks.into_par_iter().for_each(|(rows, head)| {
            SCRATCH.with_borrow_mut(|scratch| {
                // SAFETY: each task has its own rows of a head.
                let sums = unsafe { shared_sums.slice(head * tokens + rows.start, rows.len()) };
                self.forward_tile(qkv, &rows, head, scratch, sums);
                for (row, values) in rows.zip(scratch.rows.chunks_exact(head_dim)) {
                    // SAFETY: each task has its own rows and columns of the result.
                    let out =
                        unsafe { shared_out.slice(row * out_width + head * head_dim, head_dim) };
                    narrow(values, 1.0, out);
                }
            });
        });
    }

    /// From the gradient of the result to that of `qkv`.
    pub fn backward<E: Element>(&self, saved: &Saved<E>, d_qkv: &mut [f32]) {
        let shared = Shared::new(d_qkv);
        let tasks: Vec<(&Range<usize>, usize)> = self
            .segments
            .runs()
            .iter()
            .flat_map(|run| (0..self.layout.key_value_heads).map(move |head| (run, head)))
            .collect();
        tasks.into_par_iter().for_each(|(run, key_value_head)| {
            SCRATCH.with_borrow_mut(|scratch| {
                let group = self.queries_per_key();
                let heads = key_value_head * group..(key_value_head + 1) * group;
                self.clear_sums(run, heads.start, &shared);
                for rows in self.segments.tiles(run) {
                    for head in heads.clone() {
                        self.backward_tile(saved, &rows, head, scratch, &shared);
                    }
                }
            });
        });
    }

    /// The gradients that tiles add to: of the keys and values of a run.
    fn clear_sums(&self, run: &Range<usize>, head: usize, d_qkv: &Shared<f32>) {
        let [_, key, value] = self.columns(head);
        for row in run.clone() {
            for column in [key, value] {
                let start = row * self.layout.width() + column;
                // SAFETY: the caller's task alone writes to these rows and columns.
                unsafe { d_qkv.slice(start, self.layout.head_dim) }.fill(0.0);
            }
        }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.layout.head_dim as f32).sqrt()
    }

    /// Columns of `qkv` where a head's queries, and its keys and values, begin.
    fn columns(&self, head: usize) -> [usize; 3] {
        let shared = head / self.queries_per_key();
        let (heads, key_value_heads) = (self.layout.heads, self.layout.key_value_heads);
        [head, heads + shared, heads + key_value_heads + shared]
            .map(|head| head * self.layout.head_dim)
    }

    fn out_width(&self) -> usize {
        self.layout.heads * self.layout.head_dim
    }

    fn queries_per_key(&self) -> usize {
        self.layout.heads / self.layout.key_value_heads
    }

    /// `[rows, head_dim]` of `data`, whose rows are `width` long.
    fn part<'a>(
        &self,
        data: &'a [f32],
        width: usize,
        rows: &Range<usize>,
        column: usize,
    ) -> Matrix<'a> {
        let start = rows.start * width + column;
        Matrix::strided(&data[start..], rows.len(), self.layout.head_dim, width)
    }

    /// Scaled scores of a tile: `[rows, keys]`.
    fn scores(
        &self,
        qkv: &[f32],
        rows: &Range<usize>,
        keys: &Range<usize>,
        head: usize,
        scores: &mut Vec<f32>,
    ) {
        let width = self.layout.width();
        let [query, key, _] = self.columns(head);
        scores.resize(rows.len() * keys.len(), 0.0);
        multiply(
            &mut MatrixMut::new(scores, rows.len(), keys.len()),
            false,
            self.scale(),
            self.part(qkv, width, rows, query),
            self.part(qkv, width, keys, key).transposed(),
            Parallelism::None,
        );
    }

    /// One tile of one head forward, into the scratch's rows; `log_sums` has an entry for each of its rows.
    fn forward_tile(
        &self,
        qkv: &[f32],
        rows: &Range<usize>,
        head: usize,
        scratch: &mut Scratch,
        log_sums: &mut [f32],
    ) {
        let keys = self.segments.keys(rows);
        let [_, _, value] = self.columns(head);
        let Scratch {
            scores,
            rows: result,
            ..
        } = scratch;
        self.scores(qkv, rows, &keys, head, scores);
        dispatch(
            #[inline(always)]
            || {
                for ((row, scores), log_sum) in rows
                    .clone()
                    .zip(scores.chunks_exact_mut(keys.len()))
                    .zip(log_sums)
                {
                    let visible = self.segments.visible(row, &keys);
                    scores[..visible.start].fill(0.0);
                    scores[visible.end..].fill(0.0);
                    let scores = &mut scores[visible];
                    let max = vector::max(scores);
                    let sum = vector::exp_shifted_sum(scores, max);
                    vector::scale(scores, 1.0 / sum);
                    *log_sum = max + sum.ln();
                }
            },
        );
        result.resize(rows.len() * self.layout.head_dim, 0.0);
        multiply(
            &mut MatrixMut::new(result, rows.len(), self.layout.head_dim),
            false,
            1.0,
            Matrix::new(scores, rows.len(), keys.len()),
            self.part(qkv, self.layout.width(), &keys, value),
            Parallelism::None,
        );
    }

    /// One tile of one head backward: writes the gradient of its queries and adds to those of keys and values.
    fn backward_tile<E: Element>(
        &self,
        saved: &Saved<E>,
        rows: &Range<usize>,
        head: usize,
        scratch: &mut Scratch,
        d_qkv: &Shared<f32>,
    ) {
        self.score_gradients(saved, rows, head, scratch);
        let (width, head_dim) = (self.layout.width(), self.layout.head_dim);
        let keys = self.segments.keys(rows);
        let [query, key, value] = self.columns(head);
        let gradient = |range: &Range<usize>, column: usize| {
            // SAFETY: this task alone writes to these segments' rows of this key-value head and its queries, and the
            // three parts are used one after another.
            unsafe { d_qkv.matrix(range.start * width + column, range.len(), head_dim, width) }
        };
        let probabilities = Matrix::new(&scratch.scores, rows.len(), keys.len()).transposed();
        let d_scores = Matrix::new(&scratch.d_scores, rows.len(), keys.len());
        let d_out = self.part(saved.d_out, self.out_width(), rows, query);
        let queries = self.part(saved.qkv, width, rows, query);
        let key_rows = self.part(saved.qkv, width, &keys, key);
        let (serial, scale) = (Parallelism::None, self.scale());
        let mut d_value = gradient(&keys, value);
        multiply(&mut d_value, true, 1.0, probabilities, d_out, serial);
        let (mut d_key, transposed) = (gradient(&keys, key), d_scores.transposed());
        multiply(&mut d_key, true, scale, transposed, queries, serial);
        let mut d_query = gradient(rows, query);
        multiply(&mut d_query, false, scale, d_scores, key_rows, serial);
    }

    /// Computes a tile's probabilities again, and the gradient of its scores.
    fn score_gradients<E: Element>(
        &self,
        saved: &Saved<E>,
        rows: &Range<usize>,
        head: usize,
        scratch: &mut Scratch,
    ) {
        let keys = self.segments.keys(rows);
        let [query, _, value] = self.columns(head);
        let Scratch {
            scores,
            d_scores,
            rows: out_row,
        } = scratch;
        self.scores(saved.qkv, rows, &keys, head, scores);
        d_scores.resize(scores.len(), 0.0);
        multiply(
            &mut MatrixMut::new(d_scores, rows.len(), keys.len()),
            false,
            1.0,
            self.part(saved.d_out, self.out_width(), rows, query),
            self.part(saved.qkv, self.layout.width(), &keys, value)
                .transposed(),
            Parallelism::None,
        );
        for ((row, probabilities), d_scores) in rows
            .clone()
            .zip(scores.chunks_exact_mut(keys.len()))
            .zip(d_scores.chunks_exact_mut(keys.len()))
        {
            let visible = self.segments.visible(row, &keys);
            let start = row * self.out_width() + query;
            let out = start..start + self.layout.head_dim;
            let log_sum = saved.log_sums[head * self.segments.tokens() + row];
            out_row.resize(self.layout.head_dim, 0.0);
            widen(&saved.out[out.clone()], out_row);
            dispatch(
                #[inline(always)]
                || {
                    let delta = vector::dot(out_row, &saved.d_out[out]);
                    softmax_backward(probabilities, d_scores, visible, log_sum, delta);
                },
            );
        }
    }
}

/// Turns a row of scores into probabilities and their gradient into that of the scores: `dS = P (dP - sum(P dP))`,
/// where the sum equals `out · d_out`.
#[inline(always)]
fn softmax_backward(
    scores: &mut [f32],
    d_scores: &mut [f32],
    visible: Range<usize>,
    log_sum: f32,
    delta: f32,
) {
    for hidden in [0..visible.start, visible.end..scores.len()] {
        scores[hidden.clone()].fill(0.0);
        d_scores[hidden].fill(0.0);
    }
    for (score, d) in scores[visible.clone()]
        .iter_mut()
        .zip(&mut d_scores[visible])
    {
        *score = vector::exp(*score - log_sum);
        *d = *score * (*d - delta);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::testing::{TestWeights, check_op, flat, random_tensor};
    use candle_core::{D, Device, Result, Tensor};

    fn reference(qkv: &Tensor, layout: HeadLayout, lengths: &[usize]) -> Result<Tensor> {
        let HeadLayout {
            heads,
            key_value_heads,
            head_dim,
        } = layout;
        let tokens = qkv.dim(0)?;
        let segment: Vec<usize> = lengths
            .iter()
            .enumerate()
            .flat_map(|(segment, length)| vec![segment; *length])
            .collect();
        let mask: Vec<f32> = (0..tokens)
            .flat_map(|i| {
                let segment = &segment;
                (0..tokens).map(move |j| match segment[i] == segment[j] && j <= i {
                    true => 0.0,
                    false => -1e9,
                })
            })
            .collect();
        let mask = Tensor::from_vec(mask, (tokens, tokens), &Device::Cpu)?;
        let part = |head: usize| qkv.narrow(1, head * head_dim, head_dim);
        let mut outs = Vec::new();
        for head in 0..heads {
            let shared = head / (heads / key_value_heads);
            let (q, k) = (part(head)?, part(heads + shared)?);
            let v = part(heads + key_value_heads + shared)?;
            let scores = (q.matmul(&k.t()?)? / (head_dim as f64).sqrt())?;
            let scores = (scores + &mask)?;
            let max = scores.max_keepdim(D::Minus1)?.detach();
            let e = scores.broadcast_sub(&max)?.exp()?;
            let p = e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?;
            outs.push(p.matmul(&v.contiguous()?)?);
        }
        Tensor::cat(&outs, 1)
    }

    fn run(x: &[f32], dy: &[f32], layout: HeadLayout, segments: &Segments) -> (Vec<f32>, Vec<f32>) {
        let attention = Attention { layout, segments };
        let mut y = vec![f32::NAN; segments.tokens() * attention.out_width()];
        let mut log_sums = vec![f32::NAN; layout.heads * segments.tokens()];
        let mut dx = vec![f32::NAN; x.len()];
        attention.forward(x, &mut y, &mut log_sums);
        let saved = Saved {
            qkv: x,
            out: &y,
            d_out: dy,
            log_sums: &log_sums,
        };
        attention.backward(&saved, &mut dx);
        (y, dx)
    }

    #[test]
    fn values_and_gradients_equal_the_reference() {
        for lengths in [vec![1], vec![300], vec![70, 1, 1, 130, 64, 3], vec![5; 40]] {
            for (heads, key_value_heads, head_dim) in [(4, 2, 8), (3, 3, 16), (6, 1, 4)] {
                let layout = HeadLayout {
                    heads,
                    key_value_heads,
                    head_dim,
                };
                let segments = Segments::new(&lengths);
                let x = random_tensor(segments.tokens(), layout.width(), 1);
                check_op(
                    &x,
                    &TestWeights::new(&[]),
                    &[],
                    &|x, dy| run(x, dy, layout, &segments),
                    &|x| reference(x, layout, &lengths),
                );
            }
        }
    }

    #[test]
    fn large_scores_stay_finite() {
        let layout = HeadLayout {
            heads: 1,
            key_value_heads: 1,
            head_dim: 4,
        };
        let x = (random_tensor(30, 12, 3) * 1e3).unwrap();
        let segments = Segments::new(&[30]);
        let (y, dx) = run(&flat(&x), &[1.0; 30 * 4], layout, &segments);
        assert!(y.iter().chain(&dx).all(|value| value.is_finite()));
    }
}
