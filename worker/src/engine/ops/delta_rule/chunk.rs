//! One chunk of one head, forward. With the rows' `k`, `q` and `v`, the sums `G` of the logarithms of what is kept up to each row,
//! `D[i][j] = exp(G[i] - G[j])` for what of row j is left at row i, and the state `S` before the chunk:
//! the values that are written are `U = (1 + B tril(D · k kᵀ, -1))⁻¹ B (v - exp(G) · k S)`, `B` being the shares that are written;
//! what is read is `exp(G) · q S + tril(D · q kᵀ) U`; and the state behind is `exp(G[last]) S + (exp(G[last] - G) · k)ᵀ U`.

use std::ops::Range;

use super::{DeltaHeads, Inputs};
use crate::engine::ops::matrix::{Along, MatrixMut, Term, View};
use crate::engine::ops::product::{multiply_small, multiply_small_turned};
use crate::engine::ops::vector::{self, dispatch};

/// What is added to the square of a length.
const EPSILON: f32 = 1e-6;
/// The logarithm below which nothing is left. What would be is far below the last place of anything that is read, and products
/// with it would come to numbers that are too small to be normal ones, with which processors take a hundred times as long.
const LEAST_LOG: f32 = -50.0;

/// What is computed of a chunk, on its way through.
#[derive(Default)]
pub(super) struct Chunk {
    pub rows: usize,
    pub key_dim: usize,
    pub value_dim: usize,
    /// Of length one, and divided by the root of `key_dim`.
    pub queries: Vec<f32>,
    /// Of length one.
    pub keys: Vec<f32>,
    /// One over the length of each query, and of each key.
    pub inverses: [Vec<f32>; 2],
    pub written: Vec<f32>,
    /// What is left of the state before the chunk at each row.
    pub since: Vec<f32>,
    /// What is left of each row behind the chunk.
    pub until: Vec<f32>,
    /// What is left of each row at each later one, and zero at those before.
    pub decays: Vec<f32>,
    /// Decayed products of keys with those before, not themselves.
    pub overlaps: Vec<f32>,
    /// Decayed products of queries with keys up to their own.
    pub scores: Vec<f32>,
    /// What keys, and queries, read of the state before the chunk.
    pub key_reads: Vec<f32>,
    pub query_reads: Vec<f32>,
    /// The values that are written.
    pub values: Vec<f32>,
    /// Keys, as what is left of them behind the chunk.
    pub decayed_keys: Vec<f32>,
    /// The sums of logarithms, and what float32 leaves out of them: between two that are large lie small differences.
    sums: Vec<f32>,
    rests: Vec<f32>,
}

/// `c = a wᵀ` or `a w`, or with `add` `c += ...`.
pub(super) fn times(c: &mut [f32], add: bool, a: View<f32>, w: View<f32>, along: Along) {
    let columns = match along {
        Along::Columns => w.rows,
        Along::Rows => w.columns,
    };
    let term = Term {
        a,
        w: w.into(),
        along,
    };
    multiply_small(MatrixMut::new(c, a.rows, columns), add, term);
}

/// `c = aᵀ w`, or with `add` `c += aᵀ w`.
pub(super) fn times_turned(c: &mut [f32], add: bool, a: View<f32>, w: View<f32>) {
    multiply_small_turned(MatrixMut::new(c, a.columns, w.columns), add, a, w);
}

impl Chunk {
    /// Computes the values that these tokens write, and all that they follow from. No state is one of zeros.
    pub fn compute(
        &mut self,
        heads: DeltaHeads,
        inputs: Inputs,
        tokens: Range<usize>,
        head: usize,
        state: Option<&[f32]>,
    ) {
        self.rows = tokens.len();
        (self.key_dim, self.value_dim) = (heads.key_dim, heads.value_dim);
        let [query, key, value] = heads.columns(head);
        let rows = |column: usize| {
            let rows = tokens.clone();
            rows.map(move |token| &inputs.qkv[token * heads.width() + column..])
        };
        let scale = 1.0 / (heads.key_dim as f32).sqrt();
        let [of_queries, of_keys] = &mut self.inverses;
        let size = heads.key_dim;
        normalise(rows(query), size, scale, (&mut self.queries, of_queries));
        normalise(rows(key), size, 1.0, (&mut self.keys, of_keys));
        self.decay(inputs, heads.value_heads, tokens.clone(), head);
        self.compare();
        let square = self.rows * self.value_dim;
        self.key_reads.resize(square, 0.0);
        match state {
            None => self.key_reads.fill(0.0),
            Some(state) => {
                let (keys, state) = (self.view(&self.keys), self.state(state));
                // Split so that the borrow checker sees apart what is read and what is written.
                let mut reads = std::mem::take(&mut self.key_reads);
                times(&mut reads, false, keys, state, Along::Rows);
                self.key_reads = reads;
            }
        }
        self.solve(rows(value));
    }

    /// A matrix of a row for each token, as wide as a key.
    pub fn view<'a>(&self, keys: &'a [f32]) -> View<'a, f32> {
        View::new(keys, self.rows, self.key_dim)
    }

    /// A matrix of a row for each token, as wide as a value.
    pub fn wide<'a>(&self, values: &'a [f32]) -> View<'a, f32> {
        View::new(values, self.rows, self.value_dim)
    }

    pub fn square<'a>(&self, pairs: &'a [f32]) -> View<'a, f32> {
        View::new(pairs, self.rows, self.rows)
    }

    pub fn state<'a>(&self, state: &'a [f32]) -> View<'a, f32> {
        View::new(state, self.key_dim, self.value_dim)
    }

    fn decay(&mut self, inputs: Inputs, stride: usize, tokens: Range<usize>, head: usize) {
        let rows = self.rows;
        let all = [
            &mut self.written,
            &mut self.sums,
            &mut self.rests,
            &mut self.since,
            &mut self.until,
        ];
        for values in all {
            values.resize(rows, 0.0);
        }
        let mut sum = 0.0;
        for (index, token) in tokens.enumerate() {
            sum += f64::from(inputs.kept[token * stride + head]);
            let near = sum as f32;
            self.sums[index] = near;
            self.rests[index] = (sum - f64::from(near)) as f32;
            self.written[index] = inputs.written[token * stride + head];
        }
        self.decays.clear();
        self.decays.resize(rows * rows, 0.0);
        let (sums, rests, decays) = (&self.sums, &self.rests, &mut self.decays);
        let last = rows - 1;
        let (since, until) = (&mut self.since, &mut self.until);
        dispatch(
            #[inline(always)]
            || {
                vector::map1(since, sums, decay_of);
                vector::map1(until, sums, |own| sums[last] - own);
                vector::update1(until, rests, |apart, own| {
                    decay_of(apart + (rests[last] - own))
                });
                for (row, decays) in decays.chunks_exact_mut(rows).enumerate() {
                    let (own, rest) = (sums[row], rests[row]);
                    let decays = &mut decays[..=row];
                    vector::map1(decays, &sums[..=row], |before| own - before);
                    vector::update1(decays, &rests[..=row], |apart, before| {
                        decay_of(apart + (rest - before))
                    });
                }
            },
        );
    }

    fn compare(&mut self) {
        let rows = self.rows;
        let (mut overlaps, mut scores) = (
            std::mem::take(&mut self.overlaps),
            std::mem::take(&mut self.scores),
        );
        overlaps.resize(rows * rows, 0.0);
        scores.resize(rows * rows, 0.0);
        let (queries, keys) = (self.view(&self.queries), self.view(&self.keys));
        times(&mut overlaps, false, keys, keys, Along::Columns);
        times(&mut scores, false, queries, keys, Along::Columns);
        dispatch(
            #[inline(always)]
            || {
                let lines = overlaps
                    .chunks_exact_mut(rows)
                    .zip(scores.chunks_exact_mut(rows));
                let lines = lines.zip(self.decays.chunks_exact(rows)).enumerate();
                for (row, ((overlaps, scores), decays)) in lines {
                    vector::update1(&mut overlaps[..row], &decays[..row], |x, decay| x * decay);
                    overlaps[row..].fill(0.0);
                    vector::update1(&mut scores[..=row], &decays[..=row], |x, decay| x * decay);
                    scores[row + 1..].fill(0.0);
                }
            },
        );
        (self.overlaps, self.scores) = (overlaps, scores);
    }

    /// Solves for the values that are written, from the first row to the last.
    fn solve<'a>(&mut self, given: impl Iterator<Item = &'a [f32]>) {
        let (rows, width) = (self.rows, self.value_dim);
        self.values.resize(rows * width, 0.0);
        let Self {
            values,
            key_reads,
            overlaps,
            written,
            since,
            ..
        } = self;
        for (row, given) in given.enumerate() {
            let (before, own) = values.split_at_mut(row * width);
            let (own, share, left) = (&mut own[..width], written[row], since[row]);
            let reads = &key_reads[row * width..][..width];
            let overlaps = &overlaps[row * rows..][..row];
            dispatch(
                #[inline(always)]
                || {
                    for ((own, given), read) in own.iter_mut().zip(given).zip(reads) {
                        *own = share * (given - left * read);
                    }
                    for (before, overlap) in before.chunks_exact(width).zip(overlaps) {
                        vector::add_scaled(own, before, -(share * overlap));
                    }
                },
            );
        }
    }

    /// Computes what the queries read of the state before the chunk.
    pub fn read_queries(&mut self, state: Option<&[f32]>) {
        let mut reads = std::mem::take(&mut self.query_reads);
        reads.resize(self.rows * self.value_dim, 0.0);
        if let Some(state) = state {
            let (queries, state) = (self.view(&self.queries), self.state(state));
            times(&mut reads, false, queries, state, Along::Rows);
        }
        self.query_reads = reads;
    }

    /// Computes what is read, a row for each token.
    pub fn result(&mut self, state: Option<&[f32]>, out: &mut Vec<f32>) {
        self.read_queries(state);
        out.resize(self.rows * self.value_dim, 0.0);
        let (scores, values) = (self.square(&self.scores), self.wide(&self.values));
        times(out, false, scores, values, Along::Rows);
        if state.is_none() {
            return;
        }
        let lines = out.chunks_exact_mut(self.value_dim);
        let reads = self.query_reads.chunks_exact(self.value_dim);
        for ((out, reads), left) in lines.zip(reads).zip(&self.since) {
            dispatch(
                #[inline(always)]
                || vector::add_scaled(out, reads, *left),
            );
        }
    }

    /// What is left of the state before the chunk behind it.
    pub fn left(&self) -> f32 {
        self.since.last().copied().unwrap_or(1.0)
    }

    /// Turns the state before the chunk into that behind it.
    pub fn advance(&mut self, state: &mut [f32]) {
        self.decay_keys();
        let left = self.left();
        dispatch(
            #[inline(always)]
            || vector::scale(state, left),
        );
        let (decayed_keys, values) = (self.view(&self.decayed_keys), self.wide(&self.values));
        times_turned(state, true, decayed_keys, values);
    }

    /// Computes the keys as what is left of them behind the chunk.
    pub fn decay_keys(&mut self) {
        let Self {
            decayed_keys,
            keys,
            until,
            key_dim,
            ..
        } = self;
        decayed_keys.resize(keys.len(), 0.0);
        let lines = decayed_keys
            .chunks_exact_mut(*key_dim)
            .zip(keys.chunks_exact(*key_dim));
        for ((decayed_keys, key), left) in lines.zip(until) {
            dispatch(
                #[inline(always)]
                || vector::map1(decayed_keys, key, |key| key * *left),
            );
        }
    }
}

/// What is left, of its logarithm.
#[inline(always)]
fn decay_of(log: f32) -> f32 {
    let left = vector::exp(log);
    if log < LEAST_LOG { 0.0 } else { left }
}

/// Divides rows by their lengths and multiplies them by `scale`.
fn normalise<'a>(
    rows: impl Iterator<Item = &'a [f32]>,
    size: usize,
    scale: f32,
    (out, inverses): (&mut Vec<f32>, &mut Vec<f32>),
) {
    out.clear();
    inverses.clear();
    for row in rows {
        let row = &row[..size];
        let start = out.len();
        out.resize(start + size, 0.0);
        let out = &mut out[start..];
        let inverse = dispatch(
            #[inline(always)]
            || {
                let inverse = 1.0 / (vector::sum_squares(row) + EPSILON).sqrt();
                vector::map1(out, row, |x| x * inverse * scale);
                inverse
            },
        );
        inverses.push(inverse);
    }
}
