//! The low-rank part of LoRA layers, `scale · drop(x) Aᵀ Bᵀ` (Hu et al., 2021): the factors as [`super::projection`]
//! puts them beside the frozen weights, and the arithmetic that is theirs alone.
//!
//! With `u = drop(x) Aᵀ` and `S = scale · B`: `y += u Sᵀ`, `du = dy S`, `dB = scale · dyᵀ u`, `dA = duᵀ drop(x)`,
//! `dx += drop'(du A)`. Products read the factors as they read activations: beside a bfloat16 base they are rounded,
//! as autocast does, while the trained values stay float32. Adapters of the same input lie side by side: their As one
//! above the other, their us one beside the other, each padded with zeros to an even rank.

use std::ops::Range;

use common::rng::CounterRng;
use rayon::prelude::*;

use super::ROW_TILE;
use super::dora::{Magnitudes, Update};
use super::element::{Element, round_slice};
use super::matrix::{Along, Part, Start, Target, Term, View};
use super::product::{multiply, product};
use crate::engine::buffer::{Buffer, Pool};
use crate::engine::params::Weight;

/// Stream of the counter-based generator from which dropout masks are drawn.
const STREAM_DROPOUT: u64 = 0x6472_6f70;

/// The trainable update of one linear layer, or of several side by side: `A` is `[rank, in]`, `B` is `[out, rank]`.
#[derive(Clone, Debug)]
pub struct Lora {
    pub a: Weight,
    pub b: Weight,
    pub scale: f32,
    /// Number of the first rows of `A` and columns of `B` that are trained; the others stay as they are.
    pub trained: usize,
    /// Probability that an input is dropped.
    pub dropout: f64,
    /// Number of the adapted module, for the dropout mask.
    pub module: u64,
    /// The bias of `B`, which is scaled as `B` is.
    pub bias: Option<Weight>,
    /// The magnitudes of the adapted weight's rows, with DoRA.
    pub magnitudes: Option<Magnitudes>,
}

/// What a dropout mask is a function of, beside the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaskKey {
    pub seed: u64,
    pub step: u64,
    pub slot: u32,
    /// Which of the parts that a module computes one by one, the others keyed as the first but for this.
    pub part: u32,
}

impl MaskKey {
    /// Words that key the generator of a module's mask, for one tile of rows.
    pub(in crate::engine) fn words(&self, module: u64, tile: usize) -> [u64; 5] {
        let (step, slot) = (self.step, u64::from(self.slot));
        let tile = tile as u64 | u64::from(self.part) << 32;
        [STREAM_DROPOUT, step, slot, module, tile]
    }

    /// The key of one of a module's parts.
    pub fn of_part(self, part: usize) -> Self {
        Self {
            part: part as u32,
            ..self
        }
    }
}

/// An adapter, and where its parts lie among those of the same input.
pub(super) struct Placed<'a> {
    pub lora: &'a Lora,
    /// First column of the output of its layers among those of all layers.
    pub column: usize,
    /// First column of this adapter's low-rank activations `u = drop(x) Aᵀ` among those of all adapters.
    pub first: usize,
}

impl Placed<'_> {
    /// Rank of the adapter, rounded up to an even number.
    pub fn rank(&self) -> usize {
        self.lora.a.matrix_dims().0.next_multiple_of(2)
    }

    fn out(&self) -> usize {
        self.lora.b.matrix_dims().0
    }

    /// Whether it adds to these columns.
    fn has(&self, columns: &Range<usize>) -> bool {
        self.column <= columns.start && columns.end <= self.column + self.out()
    }
}

/// All adapters of one input, and their factors as products read them.
pub(super) struct Adapters<'a, E> {
    placed: Vec<Placed<'a>>,
    /// Sum of all adapters' ranks: the columns of `u`.
    rank: usize,
    width: usize,
    mask: Option<MaskKey>,
    /// The factors A one above the other, `[rank][width]`.
    a: Buffer<E>,
    /// `scale · B` of each adapter, `[out][rank]`.
    b: Vec<Buffer<E>>,
    pool: &'a Pool,
}

impl<'a, E: Element> Adapters<'a, E> {
    /// Gathers the adapters of the layers that have one, each with its layer's first output column. None where there are none.
    pub fn new(
        layers: impl Iterator<Item = (&'a Lora, usize)>,
        mask: Option<MaskKey>,
        pool: &'a Pool,
    ) -> Option<Self> {
        let mut rank = 0;
        let placed: Vec<Placed> = layers
            .map(|(lora, column)| {
                let first = rank;
                rank += lora.a.matrix_dims().0.next_multiple_of(2);
                Placed {
                    lora,
                    column,
                    first,
                }
            })
            .collect();
        let width = placed.first()?.lora.a.matrix_dims().1;
        let mut a = pool.take(rank * width);
        for placed in &placed {
            let part = placed.first * width..(placed.first + placed.rank()) * width;
            let values = placed.lora.a.read_f32();
            let (used, padding) = a[part].split_at_mut(values.len());
            round_slice(&values, 1.0, used);
            padding.fill(E::zeroed());
        }
        Some(Self {
            b: placed.iter().map(|placed| scaled_b(placed, pool)).collect(),
            // A mask of its own for each adapter, or none at all.
            mask: mask.filter(|_| placed.iter().any(|placed| placed.lora.dropout > 0.0)),
            placed,
            rank,
            width,
            a,
            pool,
        })
    }

    /// Low-rank activations `u = drop(x) Aᵀ` of all adapters, `[tokens][rank]`.
    pub fn reduce(&self, x: &[E], tokens: usize) -> Buffer<E> {
        let mut u = self.pool.take(tokens * self.rank);
        let target = Target::new(&mut u[..], tokens, self.rank);
        let Some(key) = self.mask else {
            let x = View::new(x, tokens, self.width);
            multiply(target, x, self.stacked_a(), Along::Columns);
            return u;
        };
        let dropped: Vec<Buffer<E>> = self
            .placed
            .iter()
            .map(|placed| self.dropped(placed, x, key))
            .collect();
        let parts: Vec<Part<E>> = self
            .placed
            .iter()
            .zip(&dropped)
            .map(|(placed, x)| Part {
                first: placed.first,
                start: Start::Zero,
                terms: vec![Term {
                    a: View::new(x, tokens, self.width),
                    w: self.a_of(placed).into(),
                    along: Along::Columns,
                }],
            })
            .collect();
        product(target, &parts);
        u
    }

    /// The term that an adapter adds to these columns of the output, those of a layer, or None where they have none.
    pub fn expand<'b>(
        &'b self,
        u: &'b [E],
        tokens: usize,
        columns: Range<usize>,
    ) -> Option<Term<'b, E>> {
        let index = self.placed.iter().position(|p| p.has(&columns))?;
        let placed = &self.placed[index];
        let u = View::new(u, tokens, self.rank);
        let first = (columns.start - placed.column) * placed.rank();
        Some(Term {
            a: u.part(placed.first, placed.rank()),
            w: View::new(&self.b[index][first..], columns.len(), placed.rank()).into(),
            along: Along::Columns,
        })
    }

    /// Gradient of the low-rank activations, `du = dy S`, `[tokens][rank]`.
    pub fn reduce_gradient(&self, dy: View<E>) -> Buffer<E> {
        let mut du = self.pool.take(dy.rows * self.rank);
        let parts: Vec<Part<E>> = (0..self.placed.len())
            .map(|index| Part {
                first: self.placed[index].first,
                start: Start::Zero,
                terms: vec![Term {
                    a: dy.part(self.placed[index].column, self.placed[index].out()),
                    w: self.b_of(index).into(),
                    along: Along::Rows,
                }],
            })
            .collect();
        product(Target::new(&mut du[..], dy.rows, self.rank), &parts);
        du
    }

    /// The magnitudes of the layer at `column` with what its adapter adds to the weight, or None where it has none.
    pub fn magnitudes(&self, column: usize) -> Option<(&Magnitudes, Update<'_, E>)> {
        let index = self.placed.iter().position(|p| p.column == column)?;
        let magnitudes = self.placed[index].lora.magnitudes.as_ref()?;
        let update = Update {
            s: self.b_of(index),
            a: self.a_of(&self.placed[index]),
        };
        Some((magnitudes, update))
    }

    /// What the adapter of the layer at `column` reads, where inputs are dropped.
    pub fn dropped_input(&self, x: &[E], column: usize) -> Option<Buffer<E>> {
        let key = self.mask?;
        let placed = self.placed.iter().find(|p| p.column == column)?;
        Some(self.dropped(placed, x, key))
    }

    /// Whether inputs are dropped.
    pub fn drops(&self) -> bool {
        self.mask.is_some()
    }

    /// The term that the adapters add to the gradient of their input, where nothing was dropped.
    pub fn expand_gradient<'b>(&'b self, du: &'b [E], tokens: usize) -> Option<Term<'b, E>> {
        self.mask.is_none().then(|| Term {
            a: View::new(du, tokens, self.rank),
            w: self.stacked_a().into(),
            along: Along::Rows,
        })
    }

    /// Adds to the gradient of the input what goes through the masks, where something was dropped: that of the adapters, and what
    /// else of the layer at a column went through its mask, as `more` says.
    pub fn add_masked_gradient<'b>(
        &self,
        dx: &mut [f32],
        du: &[E],
        tokens: usize,
        more: impl Fn(usize) -> Option<Term<'b, E>>,
    ) {
        let Some(key) = self.mask else {
            return;
        };
        let mut through = self.pool.take::<f32>(dx.len());
        for placed in &self.placed {
            let of_adapter = Term {
                a: View::new(du, tokens, self.rank).part(placed.first, placed.rank()),
                w: self.a_of(placed).into(),
                along: Along::Rows,
            };
            let part = Part {
                first: 0,
                start: Start::Zero,
                terms: [of_adapter]
                    .into_iter()
                    .chain(more(placed.column))
                    .collect(),
            };
            product(Target::new(&mut through[..], tokens, self.width), &[part]);
            placed.lora.apply_mask(&mut through[..], self.width, key);
            super::add_in_place(dx, &through);
        }
    }

    /// Hands over the gradients of A and B of all adapters. `gains` are the factors on the columns of the output that `du` has in it
    /// and `dy` has not.
    pub fn backward(&self, x: &[E], u: &[E], dy: View<E>, du: &[E], gains: Option<&[f32]>) {
        let tokens = dy.rows;
        self.backward_b(u, dy, gains);
        let du = self.transposed(du, tokens);
        let du = View::new(&du[..], self.rank, tokens);
        let mut gradient = self.pool.take::<f32>(self.rank * self.width);
        match self.mask {
            None => {
                let target = Target::new(&mut gradient[..], self.rank, self.width);
                multiply(target, du, View::new(x, tokens, self.width), Along::Rows);
            }
            Some(key) => {
                for placed in &self.placed {
                    let x = self.dropped(placed, x, key);
                    let rows = placed.first..placed.first + placed.rank();
                    let out = &mut gradient[rows.start * self.width..rows.end * self.width];
                    multiply(
                        Target::new(out, placed.rank(), self.width),
                        View::new(&du.data[rows.start * tokens..], placed.rank(), tokens),
                        View::new(&x[..], tokens, self.width),
                        Along::Rows,
                    );
                }
            }
        }
        for placed in &self.placed {
            let from = &gradient[placed.first * self.width..];
            let trained = placed.lora.trained;
            placed.lora.a.add_gradient(|rows, gradient, accumulate| {
                let from = &from[rows.start * self.width..rows.end * self.width];
                match accumulate {
                    true => super::add_in_place(gradient, from),
                    false => gradient.copy_from_slice(from),
                }
                let ours = trained.saturating_sub(rows.start).min(rows.len());
                gradient[ours * self.width..].fill(0.0);
            });
        }
    }

    /// Hands over `dB = scale · dyᵀ u`, computed as its transpose: ranks are few, outputs many.
    fn backward_b(&self, u: &[E], dy: View<E>, gains: Option<&[f32]>) {
        let tokens = dy.rows;
        let u = self.transposed(u, tokens);
        for placed in &self.placed {
            let (out, rank) = placed.lora.b.matrix_dims();
            let mut transposed = self.pool.take::<f32>(placed.rank() * out);
            multiply(
                Target::new(&mut transposed[..], placed.rank(), out),
                View::new(&u[placed.first * tokens..], placed.rank(), tokens),
                dy.part(placed.column, out),
                Along::Rows,
            );
            placed.lora.b.add_gradient(|rows, gradient, accumulate| {
                for (i, row) in rows.zip(gradient.chunks_exact_mut(rank)) {
                    let gain = gains.map_or(1.0, |gains| gains[placed.column + i]);
                    let scale = placed.lora.scale * gain;
                    for (j, g) in row.iter_mut().enumerate() {
                        let scale = if j < placed.lora.trained { scale } else { 0.0 };
                        let value = scale * transposed[j * out + i];
                        *g = if accumulate { *g + value } else { value };
                    }
                }
            });
        }
    }

    fn stacked_a(&self) -> View<'_, E> {
        View::new(&self.a, self.rank, self.width)
    }

    fn a_of(&self, placed: &Placed) -> View<'_, E> {
        View::new(
            &self.a[placed.first * self.width..],
            placed.rank(),
            self.width,
        )
    }

    fn b_of(&self, index: usize) -> View<'_, E> {
        let placed = &self.placed[index];
        View::new(&self.b[index], placed.out(), placed.rank())
    }

    fn dropped(&self, placed: &Placed, x: &[E], key: MaskKey) -> Buffer<E> {
        let mut copy = self.pool.take(x.len());
        copy.copy_from_slice(x);
        placed.lora.apply_mask(&mut copy[..], self.width, key);
        copy
    }

    /// Transposes `[tokens][rank]` to `[rank][tokens]`.
    fn transposed(&self, u: &[E], tokens: usize) -> Buffer<E> {
        let mut turned = self.pool.take(u.len());
        turned
            .par_chunks_mut(tokens)
            .with_min_len(8)
            .enumerate()
            .for_each(|(column, out)| {
                for (out, row) in out.iter_mut().zip(u.chunks_exact(self.rank)) {
                    *out = row[column];
                }
            });
        turned
    }
}

fn scaled_b<E: Element>(placed: &Placed, pool: &Pool) -> Buffer<E> {
    let (out, rank) = placed.lora.b.matrix_dims();
    let padded = placed.rank();
    let values = placed.lora.b.read_f32();
    let mut b = pool.take(out * padded);
    if rank == padded {
        round_slice(&values, placed.lora.scale, &mut b[..]);
        return b;
    }
    b.fill(E::zeroed());
    for (row, values) in b.chunks_exact_mut(padded).zip(values.chunks_exact(rank)) {
        round_slice(values, placed.lora.scale, &mut row[..rank]);
    }
    b
}

impl Lora {
    /// Hands over gradients of zero, where the layer computed nothing.
    pub fn hand_over_zeros(&self) {
        self.a.add_gradient_rows(&[], &[]);
        self.b.add_gradient_rows(&[], &[]);
    }

    /// Drops inputs and scales the kept ones up. The mask is drawn afresh each time, tile of rows by tile of rows.
    fn apply_mask<E: Element>(&self, x: &mut [E], width: usize, key: MaskKey) {
        let keep_scale = (1.0 / (1.0 - self.dropout)) as f32;
        let threshold = (self.dropout * 4_294_967_296.0) as u32;
        x.par_chunks_mut(ROW_TILE * width)
            .enumerate()
            .for_each(|(tile, x)| {
                let mut rng = CounterRng::new(key.seed, &key.words(self.module, tile));
                for pair in x.chunks_mut(2) {
                    let draw = rng.next_u64();
                    for (x, draw) in pair.iter_mut().zip([draw as u32, (draw >> 32) as u32]) {
                        *x = match draw < threshold {
                            true => E::zeroed(),
                            false => E::round_from(x.wide() * keep_scale),
                        };
                    }
                }
            });
    }
}
