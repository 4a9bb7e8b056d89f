//! One chunk of one head, backward. With the names of [`super::chunk`], `dU` the gradient of the values that are written and
//! `dR = (1 + B tril(D · k kᵀ, -1))⁻ᵀ dU` that of what the system is solved for, the gradient of its matrix is `-tril(dR Uᵀ, -1)`.
//! What is decayed is so by differences of `G`: each such product adds to the gradient of the one sum, and takes from that of the
//! other.

use std::ops::Range;

use super::chunk::{Chunk, times, times_turned};
use super::{DeltaHeads, Inputs};
use crate::engine::ops::matrix::{Along, View};
use crate::engine::ops::vector::{self, dispatch};

/// The gradients of what a chunk reads, a row for each token.
#[derive(Default)]
pub(super) struct ChunkGradient {
    /// Of queries and keys of length one, and once [`ChunkGradient::through_lengths`] has run of these as they are given.
    pub queries: Vec<f32>,
    pub keys: Vec<f32>,
    pub values: Vec<f32>,
    pub written: Vec<f32>,
    /// Of the logarithms of what is kept; of their sums, on the way there.
    pub kept: Vec<f32>,
    /// Of the values that are written, and then of what the system is solved for.
    solved: Vec<f32>,
    /// Of the scores, then of the products that these are of.
    scores: Vec<f32>,
    /// Of the system, then of the products that it is of.
    system: Vec<f32>,
    query_reads: Vec<f32>,
    key_reads: Vec<f32>,
    decayed_keys: Vec<f32>,
}

impl ChunkGradient {
    /// Computes all gradients but through the lengths of queries and keys. `d_state` is the gradient of the state behind the
    /// chunk, and becomes that of the state before it; nothing reads what is behind the last chunk.
    pub fn compute(
        &mut self,
        chunk: &mut Chunk,
        (given, d_out): (Given, View<f32>),
        state: Option<&[f32]>,
        d_state: &mut [f32],
        is_last: bool,
    ) {
        let (rows, width) = (chunk.rows, chunk.value_dim);
        for values in [
            &mut self.solved,
            &mut self.values,
            &mut self.query_reads,
            &mut self.key_reads,
        ] {
            values.resize(rows * width, 0.0);
        }
        self.scores.resize(rows * rows, 0.0);
        self.system.resize(rows * rows, 0.0);
        for values in [&mut self.written, &mut self.kept] {
            values.resize(rows, 0.0);
        }
        if !is_last {
            chunk.decay_keys();
        }
        let chunk = &*chunk;
        let (scores, values) = (chunk.square(&chunk.scores), chunk.wide(&chunk.values));
        times_turned(&mut self.solved, false, scores, d_out);
        if !is_last {
            let (decayed_keys, d_state) = (chunk.view(&chunk.decayed_keys), chunk.state(d_state));
            times(&mut self.solved, true, decayed_keys, d_state, Along::Rows);
        }
        times(&mut self.scores, false, d_out, values, Along::Columns);
        self.solve(chunk);
        let solved = chunk.wide(&self.solved);
        times(&mut self.system, false, solved, values, Along::Columns);
        self.rows(chunk, given, d_out, state.is_some());
        self.pairs(chunk);
        self.through_state(chunk, state, d_state, is_last);
        self.through_pairs(chunk);
        // What is kept at a token is in the sums of all from there on.
        let mut sum = 0.0;
        for kept in self.kept.iter_mut().rev() {
            sum += *kept;
            *kept = sum;
        }
    }

    /// From the last row to the first.
    fn solve(&mut self, chunk: &Chunk) {
        let (rows, width) = (chunk.rows, chunk.value_dim);
        for row in (0..rows).rev() {
            let (before, own) = self.solved.split_at_mut(row * width);
            let own = &own[..width];
            let overlaps = &chunk.overlaps[row * rows..][..row];
            let share = chunk.written[row];
            dispatch(
                #[inline(always)]
                || {
                    for (before, overlap) in before.chunks_exact_mut(width).zip(overlaps) {
                        vector::add_scaled(before, own, -(share * overlap));
                    }
                },
            );
        }
    }

    /// What a row has by itself: its value, its share, and what it reads of the state.
    fn rows(&mut self, chunk: &Chunk, given: Given, d_out: View<f32>, has_state: bool) {
        let width = chunk.value_dim;
        for row in 0..chunk.rows {
            let own = row * width..(row + 1) * width;
            let (share, left) = (chunk.written[row], chunk.since[row]);
            let (solved, d_out) = (&self.solved[own.clone()], d_out.row(row));
            let given = given.value(row, width);
            let (values, query_reads, key_reads) = (
                &mut self.values[own.clone()],
                &mut self.query_reads[own.clone()],
                &mut self.key_reads[own.clone()],
            );
            let (written, kept) = dispatch(
                #[inline(always)]
                || {
                    vector::map1(values, solved, |x| x * share);
                    let written = vector::dot(solved, given);
                    if !has_state {
                        return (written, 0.0);
                    }
                    vector::map1(query_reads, d_out, |x| x * left);
                    vector::map1(key_reads, solved, |x| -(share * left) * x);
                    let of_key = left * vector::dot(solved, &chunk.key_reads[own.clone()]);
                    let of_query = left * vector::dot(d_out, &chunk.query_reads[own]);
                    (written - of_key, of_query - share * of_key)
                },
            );
            (self.written[row], self.kept[row]) = (written, kept);
        }
    }

    /// What pairs of rows are decayed by, and what they are products of.
    fn pairs(&mut self, chunk: &Chunk) {
        let rows = chunk.rows;
        for row in 0..rows {
            let line = row * rows..(row + 1) * rows;
            let share = chunk.written[row];
            let (overlaps, decays) = (&chunk.overlaps[line.clone()], &chunk.decays[line.clone()]);
            let scores = &chunk.scores[line.clone()];
            let (d_scores, d_system) = (&mut self.scores[line.clone()], &mut self.system[line]);
            let (written, kept) = (&mut self.written[row], &mut self.kept);
            dispatch(
                #[inline(always)]
                || {
                    // The gradient of the system has the other sign.
                    let of_overlaps = vector::dot(&d_system[..row], &overlaps[..row]);
                    *written -= of_overlaps;
                    // A row is by itself as it is: what it would add it would take again, but for its rounding.
                    kept[row] += vector::dot(&d_scores[..row], &scores[..row]);
                    kept[row] -= share * of_overlaps;
                    let before = &mut kept[..row];
                    vector::update2(before, &d_scores[..row], &scores[..row], |kept, d, s| {
                        kept - d * s
                    });
                    let before = &mut kept[..row];
                    vector::update2(before, &d_system[..row], &overlaps[..row], |kept, d, s| {
                        kept + share * d * s
                    });
                    // By the same decays, which are zero at later rows.
                    vector::update1(d_scores, decays, |d, decay| d * decay);
                    vector::update1(&mut d_system[..row], &decays[..row], |d, decay| {
                        -(share * d * decay)
                    });
                    d_system[row..].fill(0.0);
                },
            );
        }
    }

    /// The gradients of queries and keys, begun by what these read of the state and write into it.
    fn through_state(
        &mut self,
        chunk: &Chunk,
        state: Option<&[f32]>,
        d_state: &mut [f32],
        is_last: bool,
    ) {
        let (rows, size) = (chunk.rows, chunk.key_dim);
        for values in [&mut self.queries, &mut self.keys, &mut self.decayed_keys] {
            values.resize(rows * size, 0.0);
        }
        match state {
            None => {
                self.queries.fill(0.0);
                self.keys.fill(0.0);
            }
            Some(state) => {
                let state = chunk.state(state);
                let (of_queries, of_keys) =
                    (chunk.wide(&self.query_reads), chunk.wide(&self.key_reads));
                times(&mut self.queries, false, of_queries, state, Along::Columns);
                times(&mut self.keys, false, of_keys, state, Along::Columns);
            }
        }
        let left = chunk.left();
        if !is_last {
            let (values, behind) = (chunk.wide(&chunk.values), chunk.state(d_state));
            times(
                &mut self.decayed_keys,
                false,
                values,
                behind,
                Along::Columns,
            );
            let mut of_all = match state {
                None => 0.0,
                Some(state) => {
                    left * dispatch(
                        #[inline(always)]
                        || vector::dot(state, d_state),
                    )
                }
            };
            for row in 0..rows {
                let own = row * size..(row + 1) * size;
                let (decayed_keys, until) = (&self.decayed_keys[own.clone()], chunk.until[row]);
                let (keys, key) = (&mut self.keys[own.clone()], &chunk.keys[own]);
                let of_row = dispatch(
                    #[inline(always)]
                    || {
                        vector::add_scaled(keys, decayed_keys, until);
                        until * vector::dot(decayed_keys, key)
                    },
                );
                // The last row is as it is behind the chunk.
                if row + 1 < rows {
                    self.kept[row] -= of_row;
                    of_all += of_row;
                }
            }
            self.kept[rows - 1] += of_all;
        }
        if state.is_some() {
            dispatch(
                #[inline(always)]
                || vector::scale(d_state, left),
            );
            let (queries, keys) = (chunk.view(&chunk.queries), chunk.view(&chunk.keys));
            let (of_queries, of_keys) =
                (chunk.wide(&self.query_reads), chunk.wide(&self.key_reads));
            times_turned(d_state, true, queries, of_queries);
            times_turned(d_state, true, keys, of_keys);
        }
    }

    /// What queries and keys get through their products with each other.
    fn through_pairs(&mut self, chunk: &Chunk) {
        let rows = chunk.rows;
        // Of a key with another both get what the other is multiplied by.
        for row in 0..rows {
            for column in 0..row {
                self.system[column * rows + row] = self.system[row * rows + column];
            }
        }
        let (queries, keys) = (chunk.view(&chunk.queries), chunk.view(&chunk.keys));
        let (scores, system) = (chunk.square(&self.scores), chunk.square(&self.system));
        times(&mut self.queries, true, scores, keys, Along::Rows);
        times_turned(&mut self.keys, true, scores, queries);
        times(&mut self.keys, true, system, keys, Along::Rows);
    }

    /// Takes the gradients of queries and keys back through their lengths: of `y = s x / |x|` it is
    /// `dx = s (dy - x (x · dy) / |x|²) / |x|`.
    pub fn through_lengths(
        &mut self,
        chunk: &Chunk,
        heads: DeltaHeads,
        inputs: Inputs,
        tokens: Range<usize>,
        head: usize,
    ) {
        let size = heads.key_dim;
        let [query, key, _] = heads.columns(head);
        let [of_queries, of_keys] = &chunk.inverses;
        let scale = 1.0 / (size as f32).sqrt();
        for (gradient, column, inverses, scale) in [
            (&mut self.queries, query, of_queries, scale),
            (&mut self.keys, key, of_keys, 1.0),
        ] {
            let lines = gradient.chunks_exact_mut(size).zip(inverses);
            for (token, (d, inverse)) in tokens.clone().zip(lines) {
                let given = &inputs.qkv[token * heads.width() + column..][..size];
                dispatch(
                    #[inline(always)]
                    || {
                        let along = inverse * inverse * vector::dot(given, d);
                        vector::update1(d, given, |d, x| scale * inverse * (d - x * along));
                    },
                );
            }
        }
    }
}

/// The values that a chunk's rows are given.
#[derive(Clone, Copy)]
pub(super) struct Given<'a> {
    pub qkv: &'a [f32],
    /// Where the first row's value begins, and how far the next one's is.
    pub first: usize,
    pub stride: usize,
}

impl<'a> Given<'a> {
    fn value(&self, row: usize, width: usize) -> &'a [f32] {
        &self.qkv[self.first + row * self.stride..][..width]
    }
}
