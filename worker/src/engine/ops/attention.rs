//! Causal attention within segments (flash attention's recomputation, Dao et al., 2022): grouped queries, softmax in
//! float32, one tile of query rows at a time, so that no tokens-by-tokens matrix outlives its tile. A head may have a sink (Xiao et
//! al., 2023): a logit that takes part in the softmax of every row and has no value, so that the probabilities of what a row sees
//! add up to less than one.
//!
//! Tiles are a function of the segments alone. Forward tasks are (query tile, head); backward tasks are (run of
//! segments, key-value head), so that each sum into a key or value has one owner and one order.

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use super::element::{Element, round_slice, widen};
use super::matrix::{Along, Term, View};
use super::matrix::{MatrixMut, Shared};
use super::product::{multiply_small, multiply_small_turned};
use super::rope::HeadLayout;
use super::segments::Segments;
use super::vector::{self, LANES, dispatch};

/// Causal attention within segments.
pub struct Attention<'a> {
    pub layout: HeadLayout,
    pub segments: &'a Segments,
    /// What scores are multiplied by.
    pub scale: f32,
    /// What they are limited to then.
    pub cap: Option<f32>,
    /// The sink of each head, where they have some.
    pub sinks: Option<&'a [f32]>,
}

/// Where attention reads queries, of the tokens from `first` on, and the keys and values of all tokens.
#[derive(Clone, Copy)]
struct Sources<'a, E> {
    /// `[tokens from first on][(heads + 2 * key_value_heads) * head_dim]`, of which only the queries are read.
    queries: &'a [E],
    /// The token of the first row of `queries`.
    first: usize,
    /// `[tokens][key_width]`, in which keys, then values, begin at `key_column`.
    keys: &'a [E],
    key_width: usize,
    key_column: usize,
}

/// What the backward pass reads.
pub struct Saved<'a, E> {
    /// Queries, keys and values with positions applied, `[tokens][(heads + 2 * key_value_heads) * head_dim]`.
    pub qkv: &'a [E],
    /// Result of the forward pass, `[tokens][heads * head_dim]`.
    pub out: &'a [E],
    /// Gradient of the result, `[tokens][heads * head_dim]`.
    pub d_out: &'a [f32],
    /// `log(sum(exp(scores)))` of each row, that of a sink among them, `[heads][tokens]`.
    pub log_sums: &'a [f32],
}

/// Memory that a thread uses again. Every element that is read is written before.
#[derive(Default)]
struct Scratch {
    /// Scores of a tile, as products leave them.
    scores: Vec<f32>,
    d_scores: Vec<f32>,
    /// Probabilities of a tile, as products read them.
    probabilities: Factor,
    score_gradients: Factor,
    turned: Factor,
    d_out: Factor,
    /// Output rows of a tile.
    rows: Vec<f32>,
    /// For each row of a tile, `sum(exp(score - max))`.
    sums: Vec<f32>,
    /// For each row of a tile, `sum(P dP)`.
    deltas: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// A matrix whose rows end with a word of 32 bits, for the products to read.
#[derive(Default)]
struct Factor {
    words: Vec<u32>,
    columns: usize,
    stride: usize,
}

impl Factor {
    /// Makes room for a matrix of zeros, to be written to in rows of [`Self::stride`].
    fn clear<E: Element>(&mut self, rows: usize, columns: usize) -> &mut [E] {
        let per_word = size_of::<u32>() / size_of::<E>();
        (self.columns, self.stride) = (columns, columns.next_multiple_of(per_word));
        self.words.clear();
        self.words.resize(rows * self.stride / per_word, 0);
        bytemuck::cast_slice_mut(&mut self.words)
    }

    /// The matrix with the columns that fill up the last word.
    fn padded<E: Element>(&self) -> View<'_, E> {
        let elements: &[E] = bytemuck::cast_slice(&self.words);
        View::new(elements, elements.len() / self.stride.max(1), self.stride)
    }

    fn view<E: Element>(&self) -> View<'_, E> {
        self.padded().part(0, self.columns)
    }
}

impl Attention<'_> {
    /// Computes attention of `qkv`, `[tokens][(heads + 2 * key_value_heads) * head_dim]` with positions applied.
    ///
    /// `out` becomes `[tokens][heads * head_dim]`, and `log_sums` `log(sum(exp(scores)))` of each row, `[heads][tokens]`.
    pub fn forward<E: Element>(&self, qkv: &[E], out: &mut [E], log_sums: &mut [f32]) {
        let sources = Sources {
            queries: qkv,
            first: 0,
            keys: qkv,
            key_width: self.layout.width(),
            key_column: self.out_width(),
        };
        self.forward_from(sources, out, log_sums);
    }

    /// [`forward`](Self::forward) of the last tokens of a text. `qkv` is theirs, and so are the results; `keys_values` has the keys and
    /// values of the whole text, `[tokens][2 * key_value_heads * head_dim]`.
    pub fn forward_last<E: Element>(
        &self,
        qkv: &[E],
        keys_values: &[E],
        out: &mut [E],
        log_sums: &mut [f32],
    ) {
        let sources = Sources {
            queries: qkv,
            first: self.segments.looking().start,
            keys: keys_values,
            key_width: self.layout.width() - self.out_width(),
            key_column: 0,
        };
        self.forward_from(sources, out, log_sums);
    }

    fn forward_from<E: Element>(&self, sources: Sources<E>, out: &mut [E], log_sums: &mut [f32]) {
        let HeadLayout {
            heads, head_dim, ..
        } = self.layout;
        let first = sources.first;
        let (tokens, out_width) = (self.segments.looking().len(), self.out_width());
        assert!(
            sources.queries.len() == tokens * self.layout.width()
                && sources.keys.len() == self.segments.tokens() * sources.key_width
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
                let sums =
                    unsafe { shared_sums.slice(head * tokens + rows.start - first, rows.len()) };
                self.forward_tile(sources, &rows, head, scratch, sums);
                let rows = rows.start - first..rows.end - first;
                for (row, values) in rows.zip(scratch.rows.chunks_exact(head_dim)) {
                    // SAFETY: each task has its own rows and columns of the result.
                    let out =
                        unsafe { shared_out.slice(row * out_width + head * head_dim, head_dim) };
                    round_slice(values, 1.0, out);
                }
            });
        });
    }

    /// Computes the gradient of `qkv` from that of the result.
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

    /// Computes the gradient of the sinks, or adds to it: a row's sink has the probability `P` and no value, so it is
    /// `-Σ P (out · d_out)`, summed from the first row to the last.
    pub fn backward_sinks<E: Element>(
        &self,
        saved: &Saved<E>,
        d_sinks: &mut [f32],
        accumulate: bool,
    ) {
        let Some(sinks) = self.sinks else {
            return;
        };
        let (tokens, head_dim) = (self.segments.tokens(), self.layout.head_dim);
        let heads = d_sinks.par_iter_mut().zip(sinks).enumerate();
        heads.for_each(|(head, (d_sink, sink))| {
            let mut wide = vec![0.0; head_dim];
            let mut sum = 0.0f64;
            for row in self.segments.runs().iter().flat_map(Range::clone) {
                let start = row * self.out_width() + head * head_dim;
                widen(&saved.out[start..start + head_dim], &mut wide);
                let d_out = &saved.d_out[start..start + head_dim];
                let delta = dispatch(
                    #[inline(always)]
                    || vector::dot(&wide, d_out),
                );
                let probability = vector::exp(sink - saved.log_sums[head * tokens + row]);
                sum -= f64::from(probability * delta);
            }
            *d_sink = sum as f32 + if accumulate { *d_sink } else { 0.0 };
        });
    }

    /// Zeroes the gradients that tiles add to: those of the keys and values of a run.
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

    /// View of a head's queries, keys or values, which begin at `column`: `[rows][head_dim]`.
    fn part<'a, E>(&self, qkv: &'a [E], rows: &Range<usize>, column: usize) -> View<'a, E> {
        let width = self.layout.width();
        let start = rows.start * width + column;
        View::strided(&qkv[start..], rows.len(), self.layout.head_dim, width)
    }

    /// Computes one tile of one head forward, into the scratch's rows; `log_sums` has an entry for each of its rows.
    fn forward_tile<E: Element>(
        &self,
        sources: Sources<E>,
        rows: &Range<usize>,
        head: usize,
        scratch: &mut Scratch,
        log_sums: &mut [f32],
    ) {
        let keys = self.segments.keys(rows);
        let head_dim = self.layout.head_dim;
        let query_rows = rows.start - sources.first..rows.end - sources.first;
        let queries = self.part(sources.queries, &query_rows, head * head_dim);
        let of_keys = |column: usize| {
            let start = keys.start * sources.key_width + sources.key_column + column;
            let from = &sources.keys[start..];
            View::strided(from, keys.len(), head_dim, sources.key_width)
        };
        let key = head / self.queries_per_key() * head_dim;
        let value = key + self.layout.key_value_heads * head_dim;
        let Scratch {
            scores,
            probabilities,
            rows: result,
            sums,
            ..
        } = scratch;
        score(queries, of_keys(key), scores);
        probabilities.clear::<E>(rows.len(), keys.len());
        dispatch(
            #[inline(always)]
            || {
                let sink = self.sinks.map(|sinks| sinks[head]);
                self.softmax::<E>((rows, &keys), sink, (scores, sums), probabilities, log_sums);
            },
        );
        result.resize(rows.len() * head_dim, 0.0);
        let term = Term {
            a: probabilities.padded::<E>(),
            w: of_keys(value).into(),
            along: Along::Rows,
        };
        let target = MatrixMut::new(result, rows.len(), head_dim);
        multiply_small(target, false, term);
    }

    /// Turns scores into probabilities, which are zeros before; leaves anything in `scores`.
    ///
    /// Each stage runs for all rows before the next: within a row each waits for the one before.
    #[inline(always)]
    fn softmax<E: Element>(
        &self,
        (rows, keys): (&Range<usize>, &Range<usize>),
        sink: Option<f32>,
        (scores, sums): (&mut [f32], &mut Vec<f32>),
        probabilities: &mut Factor,
        log_sums: &mut [f32],
    ) {
        let seen = |row: usize| {
            let visible = self.segments.visible(row, keys);
            let whole = visible.start..end_of_lanes(&visible, keys.len());
            (visible.len(), whole)
        };
        let lines = scores.chunks_exact_mut(keys.len());
        for ((row, scores), max) in rows.clone().zip(lines).zip(&mut *log_sums) {
            let (visible, whole) = seen(row);
            let scores = &mut scores[whole];
            vector::scale(scores, self.scale);
            if let Some(cap) = self.cap {
                vector::limit(scores, cap);
            }
            scores[visible..].fill(f32::NEG_INFINITY);
            *max = vector::max(scores);
            if let Some(sink) = sink {
                *max = max.max(sink);
            }
        }
        sums.clear();
        let lines = scores.chunks_exact_mut(keys.len());
        for ((row, scores), max) in rows.clone().zip(lines).zip(&*log_sums) {
            // What is hidden adds less than the sum's last place: the sum is at least one.
            let sum = vector::exp_shifted_sum(&mut scores[seen(row).1], *max);
            sums.push(match sink {
                None => sum,
                Some(sink) => sum + vector::exp(sink - max),
            });
        }
        let stride = probabilities.stride;
        let factor: &mut [E] = bytemuck::cast_slice_mut(&mut probabilities.words);
        let lines = scores.chunks_exact(keys.len()).zip(&*sums);
        for ((row, (scores, sum)), to) in
            rows.clone().zip(lines).zip(factor.chunks_exact_mut(stride))
        {
            let (visible, whole) = seen(row);
            let (to, inverse) = (&mut to[whole.clone()], 1.0 / sum);
            vector::map1(to, &scores[whole], |e| E::round_from(e * inverse));
            to[visible..].fill(E::zeroed());
        }
        for (log_sum, sum) in log_sums.iter_mut().zip(sums) {
            *log_sum += libm::logf(*sum);
        }
    }

    /// Computes one tile of one head backward: writes the gradient of its queries and adds to those of keys and values.
    fn backward_tile<E: Element>(
        &self,
        saved: &Saved<E>,
        rows: &Range<usize>,
        head: usize,
        scratch: &mut Scratch,
        d_qkv: &Shared<f32>,
    ) {
        let keys = self.segments.keys(rows);
        let [query, key, value] = self.columns(head);
        self.round_gradient(saved, rows, query, scratch);
        self.score_gradients(saved, rows, head, scratch);
        let (width, head_dim) = (self.layout.width(), self.layout.head_dim);
        let product = |range: &Range<usize>, column: usize, add, a, w: View<E>| {
            // SAFETY: this task alone writes to these segments' rows of this key-value head and its queries, and the
            // three parts are used one after another.
            let target =
                unsafe { d_qkv.matrix(range.start * width + column, range.len(), head_dim, width) };
            let (w, along) = (w.into(), Along::Rows);
            multiply_small(target, add, Term::<E> { a, w, along });
        };
        let (probabilities, d_scores) = (&scratch.probabilities, &scratch.score_gradients);
        let d_out = scratch.d_out.view();
        product(&keys, value, true, probabilities.padded(), d_out);
        let queries = self.part(saved.qkv, rows, query);
        product(&keys, key, true, d_scores.padded(), queries);
        let key_rows = self.part(saved.qkv, &keys, key);
        if !is_wide::<E>() {
            return product(rows, query, false, scratch.turned.padded(), key_rows);
        }
        // SAFETY: as above.
        let target =
            unsafe { d_qkv.matrix(rows.start * width + query, rows.len(), head_dim, width) };
        multiply_small_turned(target, false, d_scores.view::<E>().wide(), key_rows.wide());
    }

    /// Writes the gradient of a tile's output as a factor, and computes the deltas of its rows.
    fn round_gradient<E: Element>(
        &self,
        saved: &Saved<E>,
        rows: &Range<usize>,
        column: usize,
        scratch: &mut Scratch,
    ) {
        let head_dim = self.layout.head_dim;
        let Scratch {
            d_out,
            rows: out_row,
            deltas,
            ..
        } = scratch;
        out_row.resize(head_dim, 0.0);
        deltas.clear();
        let d_out = d_out.clear::<E>(rows.len(), head_dim);
        dispatch(
            #[inline(always)]
            || {
                for (row, to) in rows.clone().zip(d_out.chunks_exact_mut(head_dim)) {
                    let start = row * self.out_width() + column;
                    let out = &saved.out[start..start + head_dim];
                    let from = &saved.d_out[start..start + head_dim];
                    for (wide, out) in out_row.iter_mut().zip(out) {
                        *wide = out.wide();
                    }
                    round_each(from, to);
                    deltas.push(vector::dot(out_row, from));
                }
            },
        );
    }

    /// Computes a tile's probabilities again, and the gradient of its scores.
    ///
    /// Both are `[keys][rows]`; the gradient is transposed as well where products cannot read it so.
    fn score_gradients<E: Element>(
        &self,
        saved: &Saved<E>,
        rows: &Range<usize>,
        head: usize,
        scratch: &mut Scratch,
    ) {
        let keys = self.segments.keys(rows);
        let [query, key, value] = self.columns(head);
        let first = head * self.segments.tokens() + rows.start;
        let log_sums = &saved.log_sums[first..first + rows.len()];
        let key_rows = self.part(saved.qkv, &keys, key);
        let queries = self.part(saved.qkv, rows, query);
        score(key_rows, queries, &mut scratch.scores);
        let values = self.part(saved.qkv, &keys, value);
        score(values, scratch.d_out.view::<E>(), &mut scratch.d_scores);
        let Scratch {
            scores,
            d_scores,
            probabilities,
            score_gradients,
            turned,
            deltas,
            ..
        } = scratch;
        let stride = probabilities.clear::<E>(keys.len(), rows.len()).len() / keys.len();
        let p: &mut [E] = bytemuck::cast_slice_mut(&mut probabilities.words);
        let ds = score_gradients.clear::<E>(keys.len(), rows.len());
        let lines = scores
            .chunks_exact(rows.len())
            .zip(d_scores.chunks_exact(rows.len()));
        let factors = p.chunks_exact_mut(stride).zip(ds.chunks_exact_mut(stride));
        for (key, ((scores, d_scores), (p, ds))) in keys.clone().zip(lines.zip(factors)) {
            let visible = self.segments.viewers(key, rows);
            let start = visible.start / LANES * LANES;
            let whole = start..end_of_lanes(&(start..visible.end), rows.len());
            let (p, ds) = (&mut p[whole.clone()], &mut ds[whole.clone()]);
            let (scores, d_scores) = (&scores[whole.clone()], &d_scores[whole.clone()]);
            let (log_sums, deltas) = (&log_sums[whole.clone()], &deltas[whole.clone()]);
            dispatch(
                #[inline(always)]
                || match self.cap {
                    None => {
                        softmax_backward([scores, d_scores, log_sums, deltas], self.scale, p, ds)
                    }
                    Some(cap) => {
                        let limits = (self.scale, cap);
                        capped_backward([scores, d_scores, log_sums, deltas], limits, p, ds);
                    }
                },
            );
            for hidden in [start..visible.start, visible.end..whole.end] {
                let hidden = hidden.start - start..hidden.end - start;
                p[hidden.clone()].fill(E::zeroed());
                ds[hidden].fill(E::zeroed());
            }
        }
        if !is_wide::<E>() {
            let turned = turned.clear::<E>(rows.len(), keys.len());
            turn(&*ds, stride, turned, rows.len());
        }
    }
}

/// `scores = a · wᵀ`
fn score<E: Element>(a: View<E>, w: View<E>, scores: &mut Vec<f32>) {
    scores.resize(a.rows * w.rows, 0.0);
    let target = MatrixMut::new(scores, a.rows, w.rows);
    let along = Along::Columns;
    let w = w.into();
    multiply_small(target, false, Term { a, w, along });
}

/// End of the whole groups of lanes that hold the range, or `end` where that comes first: values one by one take as long as
/// whole groups.
fn end_of_lanes(range: &Range<usize>, end: usize) -> usize {
    (range.start + range.len().next_multiple_of(LANES)).min(end)
}

/// Whether products read a transposed factor too.
fn is_wide<E>() -> bool {
    size_of::<E>() == size_of::<f32>()
}

/// Turns the scores that several rows have for one key, and the gradients `d` of their probabilities, into the probabilities
/// `P = exp(scale · score - log_sum)` and the gradients of the unscaled scores, `dS = P (d - delta) · scale`.
///
/// A row's delta, `sum(P d)`, equals `out · d_out`.
#[inline(always)]
fn softmax_backward<E: Element>(
    [scores, d, log_sums, deltas]: [&[f32]; 4],
    scale: f32,
    probabilities: &mut [E],
    d_scores: &mut [E],
) {
    let of = |score: f32, d: f32, log_sum: f32, delta: f32| {
        let p = vector::exp(score * scale - log_sum);
        (E::round_from(p), E::round_from(p * (d - delta) * scale))
    };
    vector::map4([scores, d, log_sums, deltas], (probabilities, d_scores), of);
}

/// [`softmax_backward`] of scores that were limited to `cap · tanh(scale · score / cap)`.
#[inline(always)]
fn capped_backward<E: Element>(
    [scores, d, log_sums, deltas]: [&[f32]; 4],
    (scale, cap): (f32, f32),
    probabilities: &mut [E],
    d_scores: &mut [E],
) {
    let of = |score: f32, d: f32, log_sum: f32, delta: f32| {
        let t = vector::tanh(score * scale / cap);
        let p = vector::exp(t * cap - log_sum);
        let slope = (1.0 - t * t) * scale;
        (E::round_from(p), E::round_from(p * (d - delta) * slope))
    };
    vector::map4([scores, d, log_sums, deltas], (probabilities, d_scores), of);
}

#[inline(always)]
fn round_each<E: Element>(from: &[f32], to: &mut [E]) {
    vector::map1(to, from, E::round_from);
}

/// Transposes: rows of `from`, `stride` apart, become columns of `to`, which has so many rows.
fn turn<E: Element>(from: &[E], stride: usize, to: &mut [E], rows: usize) {
    const TILE: usize = 16;
    let (columns, to_stride) = (from.len() / stride, to.len() / rows);
    for first_row in (0..rows).step_by(TILE) {
        let tile_rows = TILE.min(rows - first_row);
        for first in (0..columns).step_by(TILE) {
            let count = TILE.min(columns - first);
            for row in first_row..first_row + tile_rows {
                let to = &mut to[row * to_stride + first..][..count];
                for (index, to) in to.iter_mut().enumerate() {
                    *to = from[(first + index) * stride + row];
                }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
