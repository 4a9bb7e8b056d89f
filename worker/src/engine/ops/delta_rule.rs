//! The gated delta rule (Yang, Kautz & Hatamizadeh, "Gated Delta Networks", 2024): each head of values has a state `S`, from which a
//! token's key reads what it stands for, and into which the difference to the token's value is written:
//! `S = kept · S`, `S = S + k (written · (v - kᵀ S))ᵀ`, `o = qᵀ S`. Keys and queries are of length one, queries then divided by the
//! root of their number of dimensions. The state is zero at the beginning of each segment.
//!
//! It runs chunk by chunk (Yang et al., "Parallelizing Linear Transformers with the Delta Rule", 2024): within a chunk what tokens
//! write depends on each other by a triangular system, and all else is products of matrices. Chunks are laid from each segment's own
//! beginning, and a task is a head in a segment, so that no bit depends on what a segment is packed with, nor on threads. The
//! backward pass computes the states at the borders of chunks once more.

mod chunk;
mod gradient;

use std::cell::RefCell;
use std::ops::Range;

use rayon::prelude::*;

use self::chunk::Chunk;
use self::gradient::{ChunkGradient, Given};
use super::delta_gates::Gates;
use super::element::{Element, round_slice};
use super::matrix::{Shared, View};

/// The heads of a layer: queries, keys and values lie side by side, of each all heads.
#[derive(Clone, Copy, Debug)]
pub struct DeltaHeads {
    pub key_heads: usize,
    pub value_heads: usize,
    pub key_dim: usize,
    pub value_dim: usize,
}

impl DeltaHeads {
    /// Columns of queries, keys and values together.
    pub fn width(&self) -> usize {
        2 * self.key_heads * self.key_dim + self.values()
    }

    /// Columns of values.
    pub fn values(&self) -> usize {
        self.value_heads * self.value_dim
    }

    /// Scalars of the state of a head, `[key_dim][value_dim]`.
    pub fn state(&self) -> usize {
        self.key_dim * self.value_dim
    }

    /// Heads of values that share a key.
    fn group(&self) -> usize {
        self.value_heads / self.key_heads
    }

    /// Columns at which a value head's query, key and value begin.
    fn columns(&self, head: usize) -> [usize; 3] {
        let (keys, shared) = (self.key_heads * self.key_dim, head / self.group());
        let key = shared * self.key_dim;
        [key, keys + key, 2 * keys + head * self.value_dim]
    }
}

/// The rule, on these segments of the tokens.
pub struct DeltaRule<'a> {
    pub heads: DeltaHeads,
    pub segments: &'a [Range<usize>],
}

/// What the rule reads.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// Queries, keys and values, `[tokens][width]`.
    pub qkv: &'a [f32],
    /// By token and head, see [`Gates`].
    pub written: &'a [f32],
    pub kept: &'a [f32],
}

/// Memory that a thread uses again. Every element that is read is written before.
#[derive(Default)]
struct Scratch {
    chunk: Chunk,
    gradient: ChunkGradient,
    state: Vec<f32>,
    d_state: Vec<f32>,
    /// The states before each chunk of a segment.
    states: Vec<f32>,
    rows: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Tokens of a chunk.
const CHUNK: usize = common::memory::STATE_TOKENS;

/// The chunks of a segment, which begin with it.
fn chunks(
    segment: &Range<usize>,
) -> impl DoubleEndedIterator<Item = Range<usize>> + ExactSizeIterator + use<> {
    let (start, end) = (segment.start, segment.end);
    (0..(end - start).div_ceil(CHUNK)).map(move |index| {
        let first = start + index * CHUNK;
        first..(first + CHUNK).min(end)
    })
}

impl DeltaRule<'_> {
    /// Computes what each token reads, `[tokens][value_heads * value_dim]`.
    pub fn forward<E: Element>(&self, inputs: Inputs, out: &mut [E]) {
        let out = Shared::new(out);
        self.tasks(self.heads.value_heads)
            .for_each(|(segment, head)| {
                SCRATCH.with_borrow_mut(|scratch| {
                    scratch.state.clear();
                    scratch.state.resize(self.heads.state(), 0.0);
                    self.forward_head(inputs, (segment, head, true), scratch, &out);
                });
            });
    }

    /// [`forward`](Self::forward) of the last tokens of a text, which are the only segment. `states` are those behind the tokens
    /// before, `[value_heads][key_dim][value_dim]`, and become those behind the last.
    pub fn forward_last<E: Element>(&self, inputs: Inputs, states: &mut [f32], out: &mut [E]) {
        let (out, size) = (Shared::new(out), self.heads.state());
        let states = states.par_chunks_exact_mut(size).enumerate();
        states.for_each(|(head, state)| {
            SCRATCH.with_borrow_mut(|scratch| {
                scratch.state.clear();
                scratch.state.extend_from_slice(state);
                for segment in self.segments {
                    self.forward_head(inputs, (segment, head, false), scratch, &out);
                }
                state.copy_from_slice(&scratch.state);
            });
        });
    }

    /// Computes the gradient of `qkv`, and of the gates, from that of the result.
    pub fn backward(
        &self,
        inputs: Inputs,
        d_out: &[f32],
        d_qkv: &mut [f32],
        d_gates: Gates<&mut [f32]>,
    ) {
        let d_inputs = SharedGradients {
            qkv: Shared::new(d_qkv),
            written: Shared::new(d_gates.written),
            kept: Shared::new(d_gates.kept),
        };
        let group = self.heads.group();
        self.tasks(self.heads.key_heads).for_each(|(segment, key)| {
            SCRATCH.with_borrow_mut(|scratch| {
                for head in key * group..(key + 1) * group {
                    self.backward_head(inputs, d_out, (segment, head), scratch, &d_inputs);
                }
            });
        });
    }

    fn tasks(&self, heads: usize) -> impl ParallelIterator<Item = (&Range<usize>, usize)> {
        let segments = self.segments.iter();
        let tasks: Vec<_> = segments
            .flat_map(|segment| (0..heads).map(move |head| (segment, head)))
            .collect();
        tasks.into_par_iter()
    }

    /// Runs a head through a segment, from the scratch's state on. A state that `begins` is zero.
    fn forward_head<E: Element>(
        &self,
        inputs: Inputs,
        (segment, head, begins): (&Range<usize>, usize, bool),
        scratch: &mut Scratch,
        out: &Shared<E>,
    ) {
        let (values, size) = (self.heads.values(), self.heads.value_dim);
        let Scratch {
            chunk, state, rows, ..
        } = scratch;
        for tokens in chunks(segment) {
            let is_first = tokens.start == segment.start;
            let known = (!(begins && is_first)).then_some(&state[..]);
            chunk.compute(self.heads, inputs, tokens.clone(), head, known);
            chunk.result(known, rows);
            for (token, row) in tokens.clone().zip(rows.chunks_exact(size)) {
                // SAFETY: each task has its own rows and columns of the result.
                let out = unsafe { out.slice(token * values + head * size, size) };
                round_slice(row, 1.0, out);
            }
            if !begins || tokens.end < segment.end {
                chunk.advance(state);
            }
        }
    }

    fn backward_head(
        &self,
        inputs: Inputs,
        d_out: &[f32],
        (segment, head): (&Range<usize>, usize),
        scratch: &mut Scratch,
        d_inputs: &SharedGradients,
    ) {
        let (heads, size) = (self.heads, self.heads.state());
        let Scratch {
            chunk,
            gradient,
            state,
            d_state,
            states,
            ..
        } = scratch;
        self.states(inputs, (segment, head), chunk, state, states);
        d_state.clear();
        d_state.resize(size, 0.0);
        let (values, width) = (heads.values(), heads.value_dim);
        for (index, tokens) in chunks(segment).enumerate().rev() {
            let known = (index > 0).then(|| &states[(index - 1) * size..][..size]);
            let is_last = tokens.end == segment.end;
            let start = tokens.start * values + head * width;
            let d_rows = View::strided(&d_out[start..], tokens.len(), width, values);
            chunk.compute(heads, inputs, tokens.clone(), head, known);
            if known.is_some() {
                chunk.read_queries(known);
            }
            let [_, _, value] = heads.columns(head);
            let given = Given {
                qkv: inputs.qkv,
                first: tokens.start * heads.width() + value,
                stride: heads.width(),
            };
            gradient.compute(chunk, (given, d_rows), known, d_state, is_last);
            self.write(gradient, chunk, inputs, (tokens, head), d_inputs);
        }
    }

    /// The states behind each chunk of a segment but the last.
    fn states(
        &self,
        inputs: Inputs,
        (segment, head): (&Range<usize>, usize),
        chunk: &mut Chunk,
        state: &mut Vec<f32>,
        states: &mut Vec<f32>,
    ) {
        state.clear();
        state.resize(self.heads.state(), 0.0);
        states.clear();
        for tokens in chunks(segment) {
            if tokens.end == segment.end {
                return;
            }
            let known = (tokens.start > segment.start).then_some(&state[..]);
            chunk.compute(self.heads, inputs, tokens, head, known);
            chunk.advance(state);
            states.extend_from_slice(state);
        }
    }

    /// Writes the gradients of a chunk to where they go: those of queries and keys of a group's first head, the others add to them.
    fn write(
        &self,
        gradient: &mut ChunkGradient,
        chunk: &Chunk,
        inputs: Inputs,
        (tokens, head): (Range<usize>, usize),
        d_inputs: &SharedGradients,
    ) {
        let heads = self.heads;
        let columns = heads.columns(head);
        let adds = !head.is_multiple_of(heads.group());
        gradient.through_lengths(chunk, heads, inputs, tokens.clone(), head);
        for (index, token) in tokens.enumerate() {
            let start = token * heads.width();
            let parts = [
                (&gradient.queries, heads.key_dim, adds),
                (&gradient.keys, heads.key_dim, adds),
                (&gradient.values, heads.value_dim, false),
            ];
            for ((from, size, adds), column) in parts.into_iter().zip(columns) {
                let from = &from[index * size..][..size];
                // SAFETY: each task has its own rows, and of these the columns of a key head and of its value heads.
                let to = unsafe { d_inputs.qkv.slice(start + column, size) };
                match adds {
                    true => to.iter_mut().zip(from).for_each(|(to, from)| *to += from),
                    false => to.copy_from_slice(from),
                }
            }
            let at = token * heads.value_heads + head;
            // SAFETY: each task has its own rows and heads.
            let to = unsafe { (d_inputs.written.slice(at, 1), d_inputs.kept.slice(at, 1)) };
            (to.0[0], to.1[0]) = (gradient.written[index], gradient.kept[index]);
        }
    }
}

struct SharedGradients<'a> {
    qkv: Shared<'a, f32>,
    written: Shared<'a, f32>,
    kept: Shared<'a, f32>,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
