//! Rotary positions (Su et al., 2021) on the queries and keys of a fused projection, with Qwen3's norm of each head
//! before it where the model has one. Values pass through, but for a norm that Gemma 4 has of them, and so does what a head has
//! behind its rotated dimensions.
//!
//! Positions restart with each segment: they come with the batch.

mod values;

use std::ops::Range;

use common::memory::KeyValues;
use common::model::{ModelConfig, RotaryPairs};
use rayon::prelude::*;

use super::element::Element;
use super::vector::{self, LANES, dispatch};
use super::{ROW_TILE, add_partials, rms_norm};
use crate::engine::params::Weight;

/// Cosines and sines of every position: `[positions][pairs]` each, where a head has twice as many dimensions as pairs, or more.
#[derive(Debug)]
pub struct RopeTable {
    half: usize,
    pairs: RotaryPairs,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// Computes the table. `frequencies` are radians per position, one of each pair; `factor` is what cosines and sines are
    /// multiplied by. Rounded as Transformers does: the angle in float32.
    pub fn new(frequencies: &[f32], positions: usize, factor: f32) -> Self {
        let angles = || {
            (0..positions).flat_map(|position| frequencies.iter().map(move |f| position as f32 * f))
        };
        Self {
            half: frequencies.len(),
            pairs: RotaryPairs::Halves,
            cos: angles().map(|angle| libm::cosf(angle) * factor).collect(),
            sin: angles().map(|angle| libm::sinf(angle) * factor).collect(),
        }
    }

    /// The same angles, for other pairs than those of halves.
    pub fn of_pairs(self, pairs: RotaryPairs) -> Self {
        Self { pairs, ..self }
    }

    /// Puts the rows of another table of as many pairs behind those of this one.
    pub fn extend(&mut self, other: &Self) {
        assert_eq!(self.half, other.half, "tables of other heads");
        self.cos.extend(&other.cos);
        self.sin.extend(&other.sin);
    }

    /// Number of rows: of positions, where each has one.
    pub fn rows(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }

    /// Number of pairs that a row turns.
    #[cfg(feature = "cuda")]
    pub fn half(&self) -> usize {
        self.half
    }

    #[cfg(feature = "cuda")]
    pub fn pairs(&self) -> RotaryPairs {
        self.pairs
    }

    /// The table's cosines and its sines.
    #[cfg(feature = "cuda")]
    pub fn values(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }

    #[inline(always)]
    fn row(&self, index: usize) -> (&[f32], &[f32]) {
        let range = index * self.half..(index + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }

    /// Rotates a head by a row's cosines and sines.
    #[inline(always)]
    fn turn_head<E: Element>(
        &self,
        head: &[f32],
        row: (&[f32], &[f32]),
        to: &mut [E],
        pair: impl Fn(f32, f32, f32, f32) -> (f32, f32),
    ) {
        let (rotated, rest) = head.split_at(2 * self.half);
        let (to_rotated, to_rest) = to.split_at_mut(2 * self.half);
        match self.pairs {
            RotaryPairs::Halves => turn(rotated.split_at(self.half), row, to_rotated, pair),
            RotaryPairs::Neighbours => turn_neighbours(rotated, row, to_rotated, pair),
        }
        for (to, x) in to_rest.iter_mut().zip(rest) {
            *to = E::round_from(*x);
        }
    }
}

/// How a fused projection `[tokens, (heads + 2 * key_value_heads) * head_dim]` divides: queries, keys, values.
#[derive(Clone, Copy, Debug)]
pub struct HeadLayout {
    pub heads: usize,
    pub key_value_heads: usize,
    pub head_dim: usize,
}

impl HeadLayout {
    pub fn of(config: &ModelConfig, layer: usize) -> Self {
        let own = config.sizes_of(layer);
        Self {
            heads: config.heads,
            key_value_heads: own.key_value_heads,
            head_dim: own.head_dim,
        }
    }

    /// Columns of the queries.
    pub fn queries(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Columns of the keys, as many as of the values.
    pub fn keys(&self) -> usize {
        self.key_value_heads * self.head_dim
    }

    pub fn width(&self) -> usize {
        (self.heads + 2 * self.key_value_heads) * self.head_dim
    }
}

/// What becomes of the values.
#[derive(Clone, Copy, Debug)]
pub struct Values {
    /// Epsilon of the norm of each head, which has no weights, where there is one.
    pub norm: Option<f32>,
    /// What of queries, keys and values is projected: all; values as the keys that they are; or queries alone, and the columns of the
    /// others are left as they are.
    pub source: KeyValues,
}

impl Values {
    /// Their own columns, as they are.
    pub const PLAIN: Self = Self {
        norm: None,
        source: KeyValues::Apart,
    };
}

/// Norms of queries and keys: of each head, with weights `[head_dim]`, or of all heads together, with weights for all.
#[derive(Clone, Debug)]
pub struct HeadNorms {
    pub query: Weight,
    pub key: Weight,
    pub epsilon: f32,
    /// Whether they multiply by 1 + weight.
    pub offset: bool,
}

impl HeadNorms {
    /// Adds up partial sums, each of which holds the gradient of the query weight, then that of the key weight.
    fn add_gradients(&self, partials: &[Vec<f32>]) {
        let (query, key): (Vec<_>, Vec<_>) = partials
            .iter()
            .map(|dw| dw.split_at(dw.len().min(self.query.scalars())))
            .map(|(query, key)| (query.to_vec(), key.to_vec()))
            .unzip();
        for (weight, partials) in [(&self.query, query), (&self.key, key)] {
            weight.add_gradient(|_, gradient, accumulate| {
                add_partials(gradient, accumulate, &partials);
            });
        }
    }
}

/// Rotary positions on queries and keys, after the norm of their heads where there is one.
pub struct Rope<'a> {
    pub layout: HeadLayout,
    pub norms: Option<&'a HeadNorms>,
    pub values: Values,
    /// The row of the table for each token, which the table must have: as a rule its position.
    pub rows: &'a [u32],
    /// None where nothing is rotated.
    pub table: Option<&'a RopeTable>,
}

/// Memory for one row, whose queries and keys are normed and rotated in stages: within a head each waits for the one before.
#[derive(Default)]
struct Scratch {
    /// Queries and keys in float32.
    wide: Vec<f32>,
    /// Gradients of queries and keys, rotated back.
    turned: Vec<f32>,
    /// Inverse root mean square of each head.
    inverses: Vec<f32>,
    gradients: Vec<rms_norm::RowGradient>,
    values: values::ValueScratch,
}

/// The norm weights of queries and keys, opened for reading.
type NormSlices<'a> = Option<(&'a [f32], &'a [f32])>;

impl Rope<'_> {
    /// Applies norms and positions to what is projected, `[tokens][projected]`. The result is `[tokens][layout.width()]`.
    pub fn forward<E: Element>(&self, qkv: &[E], y: &mut [E]) {
        let (width, projected) = (self.layout.width(), self.projected());
        self.with_norms(|norms| {
            y.par_chunks_mut(ROW_TILE * width)
                .zip(qkv.par_chunks(ROW_TILE * projected))
                .zip(self.rows.par_chunks(ROW_TILE))
                .for_each(|((y, x), rows)| {
                    let mut scratch = Scratch::default();
                    dispatch(
                        #[inline(always)]
                        || {
                            for ((y, x), &row) in y
                                .chunks_exact_mut(width)
                                .zip(x.chunks_exact(projected))
                                .zip(rows)
                            {
                                self.forward_row(x, y, row as usize, norms, &mut scratch);
                            }
                        },
                    );
                });
        });
    }

    /// Computes the gradient of what is projected from that of the result.
    pub fn backward<E: Element>(&self, qkv: &[E], dy: &[f32], d_qkv: &mut [E]) {
        let (width, projected) = (self.layout.width(), self.projected());
        let trainable = self.norms.is_some_and(|norms| norms.query.is_trainable());
        let norm_weights = self
            .norms
            .map_or(0, |norms| norms.query.scalars() + norms.key.scalars());
        let tile = ROW_TILE * projected;
        let partials: Vec<Vec<f32>> = self.with_norms(|norms| {
            d_qkv
                .par_chunks_mut(tile)
                .zip(qkv.par_chunks(tile))
                .zip(dy.par_chunks(ROW_TILE * width))
                .zip(self.rows.par_chunks(ROW_TILE))
                .map(|(((dx, x), g), rows)| {
                    let mut scratch = Scratch::default();
                    let mut dw = vec![0.0; if trainable { norm_weights } else { 0 }];
                    dispatch(
                        #[inline(always)]
                        || {
                            for (((dx, x), g), &row) in dx
                                .chunks_exact_mut(projected)
                                .zip(x.chunks_exact(projected))
                                .zip(g.chunks_exact(width))
                                .zip(rows)
                            {
                                let of_token = (x, g, dx);
                                let row = row as usize;
                                self.backward_row(of_token, row, norms, &mut scratch, &mut dw);
                            }
                        },
                    );
                    dw
                })
                .collect()
        });
        if let Some(norms) = self.norms {
            norms.add_gradients(&partials);
        }
    }

    fn with_norms<R>(&self, read: impl FnOnce(NormSlices) -> R) -> R {
        match self.norms {
            None => read(None),
            Some(norms) => {
                let (query, key) = (norms.query.read_f32(), norms.key.read_f32());
                let factors = |weight| rms_norm::factors(weight, norms.offset);
                read(Some((&factors(&query), &factors(&key))))
            }
        }
    }

    fn epsilon(&self) -> f32 {
        self.norms.map_or(0.0, |norms| norms.epsilon)
    }

    /// The columns that a norm goes over at a time, by the widths of its weights for queries and keys, and whether they are keys.
    #[inline(always)]
    fn normed_parts(&self, query: usize, key: usize) -> impl Iterator<Item = (Range<usize>, bool)> {
        let queries = self.layout.heads * self.layout.head_dim;
        let parts = |columns: Range<usize>, width: usize| {
            columns
                .step_by(width.max(1))
                .map(move |start| start..start + width)
        };
        let of_keys = parts(queries..self.rotated(), key).map(|part| (part, true));
        parts(0..queries, query)
            .map(|part| (part, false))
            .chain(of_keys)
    }

    /// Number of columns that are projected.
    pub fn projected(&self) -> usize {
        let (queries, keys) = (self.layout.queries(), self.layout.keys());
        match self.values.source {
            KeyValues::Apart => queries + 2 * keys,
            KeyValues::Same => queries + keys,
            KeyValues::Of(_) => queries,
        }
    }

    /// Number of columns that are rotated: those of queries and keys, as far as they are projected.
    fn rotated(&self) -> usize {
        match self.values.source {
            KeyValues::Apart | KeyValues::Same => self.layout.queries() + self.layout.keys(),
            KeyValues::Of(_) => self.layout.queries(),
        }
    }

    #[inline(always)]
    fn forward_row<E: Element>(
        &self,
        x: &[E],
        y: &mut [E],
        row: usize,
        norms: NormSlices,
        scratch: &mut Scratch,
    ) {
        self.forward_values(x, y, &mut scratch.values);
        let Scratch { wide, inverses, .. } = scratch;
        let head_dim = self.layout.head_dim;
        let rotated = self.rotated();
        widen(&x[..rotated], wide);
        if let Some((query, key)) = norms {
            inverses.clear();
            for (part, _) in self.normed_parts(query.len(), key.len()) {
                inverses.push(rms_norm::inverse_rms(&wide[part], self.epsilon()));
            }
            let parts = self.normed_parts(query.len(), key.len());
            for ((part, is_key), inverse) in parts.zip(&*inverses) {
                let weight = if is_key { key } else { query };
                rms_norm::normalize_row(&mut wide[part], weight, *inverse);
            }
        }
        let Some(table) = self.table else {
            for (y, x) in y[..rotated].iter_mut().zip(&*wide) {
                *y = E::round_from(*x);
            }
            return;
        };
        let row = table.row(row);
        let to = y[..rotated].chunks_exact_mut(head_dim);
        for (y, wide) in to.zip(wide.chunks_exact(head_dim)) {
            table.turn_head(wide, row, y, |a, b, c, s| (a * c - b * s, b * c + a * s));
        }
    }

    /// Rotates the gradient back, then passes it through the norm. `dw` holds the gradients of both norm weights.
    #[inline(always)]
    fn backward_row<E: Element>(
        &self,
        (x, g, dx): (&[E], &[f32], &mut [E]),
        row: usize,
        norms: NormSlices,
        scratch: &mut Scratch,
        dw: &mut [f32],
    ) {
        let head_dim = self.layout.head_dim;
        let rotated = self.rotated();
        let Scratch {
            wide,
            turned,
            gradients,
            ..
        } = &mut *scratch;
        turned.resize(rotated, 0.0);
        match self.table {
            None => turned.copy_from_slice(&g[..rotated]),
            Some(table) => {
                let row = table.row(row);
                let from = g[..rotated].chunks_exact(head_dim);
                for (g, turned) in from.zip(turned.chunks_exact_mut(head_dim)) {
                    table.turn_head(g, row, turned, |a, b, c, s| (a * c + b * s, b * c - a * s));
                }
            }
        }
        if let Some((query, key)) = norms {
            widen(&x[..rotated], wide);
            gradients.clear();
            let (dw_query, dw_key) = dw.split_at_mut(dw.len().min(query.len()));
            for (part, is_key) in self.normed_parts(query.len(), key.len()) {
                let (weight, dw) = match is_key {
                    false => (query, &mut *dw_query),
                    true => (key, &mut *dw_key),
                };
                let dw = (!dw.is_empty()).then_some(dw);
                let (x, g) = (&wide[part.clone()], &turned[part]);
                gradients.push(rms_norm::RowGradient::new(x, weight, self.epsilon(), g, dw));
            }
            let parts = self.normed_parts(query.len(), key.len());
            for ((part, is_key), row) in parts.zip(&*gradients) {
                let weight = if is_key { key } else { query };
                let (x, g) = (&wide[part.clone()], &turned[part.clone()]);
                vector::map3(&mut dx[part], x, g, weight, |x, g, w| {
                    E::round_from(row.of(x, g, w))
                });
            }
        } else {
            for (dx, d) in dx[..rotated].iter_mut().zip(&*turned) {
                *dx = E::round_from(*d);
            }
        }
        self.backward_values((x, g, dx), &mut scratch.values);
    }
}

#[inline(always)]
fn widen<E: Element>(from: &[E], to: &mut Vec<f32>) {
    to.resize(from.len(), 0.0);
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.wide();
    }
}

/// Rotates the pairs of two halves by their angles' cosines and sines, into two halves. In groups of fixed length, see
/// [`vector::map3`].
#[inline(always)]
fn turn<E: Element>(
    (first, second): (&[f32], &[f32]),
    (cos, sin): (&[f32], &[f32]),
    to: &mut [E],
    pair: impl Fn(f32, f32, f32, f32) -> (f32, f32),
) {
    let (to_first, to_second) = to.split_at_mut(first.len());
    let whole = first.len() / LANES * LANES;
    let (a, b) = (first.as_chunks::<LANES>().0, second.as_chunks::<LANES>().0);
    let (c, s) = (cos.as_chunks::<LANES>().0, sin.as_chunks::<LANES>().0);
    let to_a = to_first.as_chunks_mut::<LANES>().0;
    let to_b = to_second.as_chunks_mut::<LANES>().0;
    for (i, a) in a.iter().enumerate() {
        let (mut left, mut right) = ([E::zeroed(); LANES], [E::zeroed(); LANES]);
        let (b, c, s) = (&b[i], &c[i], &s[i]);
        vector::lanes_only();
        for lane in 0..LANES {
            let (x, y) = pair(a[lane], b[lane], c[lane], s[lane]);
            (left[lane], right[lane]) = (E::round_from(x), E::round_from(y));
        }
        (to_a[i], to_b[i]) = (left, right);
    }
    for i in whole..first.len() {
        let (x, y) = pair(first[i], second[i], cos[i], sin[i]);
        (to_first[i], to_second[i]) = (E::round_from(x), E::round_from(y));
    }
}

/// [`turn`] for pairs that lie side by side.
#[inline(always)]
fn turn_neighbours<E: Element>(
    from: &[f32],
    (cos, sin): (&[f32], &[f32]),
    to: &mut [E],
    pair: impl Fn(f32, f32, f32, f32) -> (f32, f32),
) {
    let to = to.as_chunks_mut::<2>().0.iter_mut();
    let angles = cos.iter().zip(sin);
    for ((to, [a, b]), (c, s)) in to.zip(from.as_chunks::<2>().0).zip(angles) {
        let (x, y) = pair(*a, *b, *c, *s);
        *to = [E::round_from(x), E::round_from(y)];
    }
}

#[cfg(test)]
mod tests;
