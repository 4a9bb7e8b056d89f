//! Linear layers that read the same input, side by side in one output: queries, keys and values; gate and up. Or one
//! layer on top of a residual: `y = residual + x Wᵀ`.
//!
//! A layer is frozen, frozen with a LoRA update, or trainable as a whole; what is frozen gets no gradient. With DoRA the
//! columns of an adapted layer's output are scaled, see `projection/adapted.rs`.

mod adapted;

use adapted::Adapted;
use rayon::prelude::*;

use super::dora::row_norms;
use super::element::Element;
use super::lora_linear::{Adapters, Lora, MaskKey};
use super::matrix::MatrixMut;
use super::matrix::{Along, Part, Start, Target, Term, View};
use super::product::{multiply_turned, product};
use super::{ROW_TILE, column_sums, vector};
use crate::engine::buffer::{Buffer, Pool};
use crate::engine::params::{Reading, Weight};

/// A linear layer, `y = x Wᵀ + bias (+ scale · x Aᵀ Bᵀ)`, with its weight `[out][in]`.
///
/// `B` starts at zero, so an untrained adapter leaves the base model unchanged.
#[derive(Clone, Debug)]
pub struct Linear {
    pub weight: Weight,
    pub bias: Option<Weight>,
    /// An adapter of this layer; or, without magnitudes, of it and of those behind it, as many as it has outputs for.
    pub lora: Option<Lora>,
}

impl Linear {
    fn out(&self) -> usize {
        self.weight.matrix_dims().0
    }

    /// Starts the magnitudes, where the layer has some, with the norms of the rows that they are of: nothing is changed by them.
    pub fn start_magnitudes<E: Element>(&self, pool: &Pool) {
        let alone = Projection(vec![self.clone()]);
        let context = Context {
            tokens: 0,
            mask: None,
            pool,
        };
        let Some(adapters) = alone.adapters::<E>(context) else {
            return;
        };
        if let Some((magnitudes, update)) = adapters.magnitudes(0) {
            let (out, width) = self.weight.matrix_dims();
            let norms = row_norms(self.weight.read().matrix(out, width), Some(update), pool);
            magnitudes.weight.set(&norms);
        }
    }

    /// What is added to each row of the output: the bias, and that of the adapter.
    fn whole_bias(&self) -> Option<Vec<f32>> {
        let own = self.bias.as_ref().map(|bias| bias.read_f32().to_vec());
        let Some((lora, added)) = self.lora.as_ref().and_then(|l| Some((l, l.bias.as_ref()?)))
        else {
            return own;
        };
        let mut sum = own.unwrap_or_else(|| vec![0.0; self.out()]);
        vector::add_scaled(&mut sum, &added.read_f32(), lora.scale);
        Some(sum)
    }

    fn learns(&self) -> bool {
        let bias = self.bias.as_ref().is_some_and(Weight::is_trainable);
        self.weight.is_trainable() || bias || self.lora.is_some()
    }
}

/// Linear layers of one input width. Their outputs lie side by side in `[tokens][sum of outs]`.
#[derive(Clone, Debug)]
pub struct Projection(pub Vec<Linear>);

/// What a forward or backward run needs beside its input.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    pub tokens: usize,
    /// Key of the dropout masks; None where nothing is dropped.
    pub mask: Option<MaskKey>,
    pub pool: &'a Pool,
}

/// Low-rank activations `drop(x) Aᵀ` of the layers that have an adapter, or their gradient.
pub type LowRank<E> = Option<Buffer<E>>;

impl Projection {
    /// Width of all outputs together.
    pub fn out(&self) -> usize {
        self.0.iter().map(Linear::out).sum()
    }

    /// Whether a gradient of the layers themselves is wanted.
    pub fn learns(&self) -> bool {
        self.0.iter().any(Linear::learns)
    }

    /// Computes all outputs of `x`, `[tokens][in]`. Returns what the backward pass needs of the adapters.
    pub fn forward<E: Element>(&self, x: &[E], y: &mut [E], context: Context) -> LowRank<E> {
        self.run(x, Target::new(y, context.tokens, self.out()), None, context)
    }

    /// [`forward`](Self::forward) without rounding what comes out.
    pub fn forward_wide<E: Element>(&self, x: &[E], y: &mut [f32], context: Context) -> LowRank<E> {
        self.run(x, Target::new(y, context.tokens, self.out()), None, context)
    }

    /// `y = residual + layer(x)` with a single layer.
    pub fn forward_onto<E: Element>(
        &self,
        residual: &[f32],
        x: &[E],
        y: &mut [f32],
        context: Context,
    ) -> LowRank<E> {
        let target = Target::new(y, context.tokens, self.out());
        let low_rank = self.run(x, target, Some(residual), context);
        if let Some(bias) = self.0.first().and_then(Linear::whole_bias) {
            add_to_rows(y, &bias);
        }
        low_rank
    }

    fn run<E: Element>(
        &self,
        x: &[E],
        mut y: Target,
        residual: Option<&[f32]>,
        context: Context,
    ) -> LowRank<E> {
        let adapters = self.adapters::<E>(context);
        let low_rank = adapters.as_ref().map(|a| a.reduce(x, context.tokens));
        let weights = self.weights();
        let adapted = self.adapted(adapters.as_ref(), &weights, context);
        let biases: Vec<Option<Vec<f32>>> = match residual {
            Some(_) => vec![None; self.0.len()],
            None => self.0.iter().map(Linear::whole_bias).collect(),
        };
        // What is scaled starts from zero, and is added to the rest then.
        let starts_later = adapted.as_ref().is_some_and(|adapted| !adapted.drops());
        let layers = self.columns().zip(&weights).zip(&biases);
        let parts: Vec<Part<E>> = layers
            .map(|(((column, linear), weight), bias)| {
                let (out, width) = linear.weight.matrix_dims();
                let frozen = Term {
                    a: View::new(x, context.tokens, width),
                    w: weight.matrix(out, width),
                    along: Along::Columns,
                };
                let update = adapters.as_ref().zip(low_rank.as_ref());
                let update =
                    update.and_then(|(a, u)| a.expand(u, context.tokens, column..column + out));
                Part {
                    first: column,
                    start: match (residual, bias) {
                        _ if starts_later => Start::Zero,
                        (Some(residual), _) => Start::Rows(residual),
                        (None, Some(bias)) => Start::Row(bias),
                        (None, None) => Start::Zero,
                    },
                    terms: [frozen].into_iter().chain(update).collect(),
                }
            })
            .collect();
        product(y.reborrow(), &parts);
        if let (Some(adapted), Some(u)) = (adapted, &low_rank) {
            match starts_later {
                true => adapted.scale(y, residual, &biases),
                false => adapted.add_gained(y, x, u),
            }
        }
        low_rank
    }

    /// Computes `drop(x) Aᵀ` once more, where the forward pass did not keep it.
    pub fn low_rank<E: Element>(&self, x: &[E], context: Context) -> LowRank<E> {
        let adapters = self.adapters::<E>(context)?;
        Some(adapters.reduce(x, context.tokens))
    }

    /// Computes the gradient of the low-rank part for [`Self::backward_weights`], where that of the input is of no use.
    pub fn backward_low_rank<E: Element>(&self, dy: &[E], context: Context) -> LowRank<E> {
        let dy = View::new(dy, context.tokens, self.out());
        let adapters = self.adapters::<E>(context)?;
        let weights = self.weights();
        let adapted = self.adapted(Some(&adapters), &weights, context);
        let gained = adapted.map(|adapted| adapted.gained(dy));
        let dy = gained.as_ref().map_or(dy, |gained| dy.of(gained));
        Some(adapters.reduce_gradient(dy))
    }

    /// Writes the gradient of the input, and returns that of the low-rank part for [`Self::backward_weights`].
    pub fn backward_input<E: Element>(
        &self,
        dy: &[E],
        dx: &mut [f32],
        context: Context,
    ) -> LowRank<E> {
        let dy = View::new(dy, context.tokens, self.out());
        self.backward_input_of(dy, dx, context)
    }

    /// [`backward_input`](Self::backward_input) of rows that may lie apart.
    pub fn backward_input_of<E: Element>(
        &self,
        dy: View<E>,
        dx: &mut [f32],
        context: Context,
    ) -> LowRank<E> {
        let adapters = self.adapters::<E>(context);
        let weights = self.weights();
        let adapted = self.adapted(adapters.as_ref(), &weights, context);
        let gained = adapted.as_ref().map(|adapted| adapted.gained(dy));
        let of_adapters = gained.as_ref().map_or(dy, |gained| dy.of(gained));
        let du = adapters.as_ref().map(|a| a.reduce_gradient(of_adapters));
        // Where inputs are dropped, the weight reads them whole, and what the gains add goes through the masks.
        let drops = adapters.as_ref().is_some_and(Adapters::drops);
        let of_weights = if drops { dy } else { of_adapters };
        let frozen = self
            .columns()
            .zip(&weights)
            .map(|((column, linear), weight)| {
                let (out, width) = linear.weight.matrix_dims();
                Term {
                    a: of_weights.part(column, out),
                    w: weight.matrix(out, width),
                    along: Along::Rows,
                }
            });
        let update = adapters.as_ref().zip(du.as_ref());
        let update = update.and_then(|(a, du)| a.expand_gradient(du, context.tokens));
        let part = Part {
            first: 0,
            start: Start::Zero,
            terms: frozen.chain(update).collect(),
        };
        let width = dx.len() / context.tokens.max(1);
        product(Target::new(dx, context.tokens, width), &[part]);
        drop(gained);
        if let (Some(adapters), Some(du), true) = (&adapters, &du, drops) {
            let added = adapted.as_ref().map(|adapted| adapted.added_by_gains(dy));
            adapters.add_masked_gradient(dx, du, context.tokens, |column| {
                adapted
                    .as_ref()?
                    .through_mask(dy.of(added.as_ref()?), column)
            });
        }
        du
    }

    /// Hands over the gradients of what is trainable.
    pub fn backward_weights<E: Element>(
        &self,
        x: &[E],
        low_rank: &LowRank<E>,
        dy: &[E],
        d_low_rank: &LowRank<E>,
        context: Context,
    ) {
        let dy = View::new(dy, context.tokens, self.out());
        self.backward_weights_of(x, low_rank, dy, d_low_rank, context);
    }

    /// [`backward_weights`](Self::backward_weights) of a gradient whose rows may lie apart.
    pub fn backward_weights_of<E: Element>(
        &self,
        x: &[E],
        low_rank: &LowRank<E>,
        dy: View<E>,
        d_low_rank: &LowRank<E>,
        context: Context,
    ) {
        for (column, linear) in self.columns() {
            let (out, width) = linear.weight.matrix_dims();
            let dy = dy.part(column, out);
            linear.weight.add_gradient(|rows, gradient, accumulate| {
                let target = MatrixMut::new(gradient, rows.len(), width);
                let dy = dy.part(rows.start, rows.len());
                let x = View::new(x, context.tokens, width);
                multiply_turned(target, accumulate, dy, x);
            });
            if let Some(bias) = &linear.bias {
                bias.add_gradient(|_, gradient, accumulate| {
                    column_sums(gradient, accumulate, dy.data, dy.stride, context.tokens);
                });
            }
            if let Some(lora) = &linear.lora
                && let Some(bias) = &lora.bias
            {
                let mut sums = vec![0.0; out];
                column_sums(&mut sums, false, dy.data, dy.stride, context.tokens);
                bias.add_gradient(|rows, gradient, accumulate| {
                    if !accumulate {
                        gradient.fill(0.0);
                    }
                    super::add_scaled_in_place(gradient, &sums[rows], lora.scale);
                });
            }
        }
        let adapters = self.adapters::<E>(context);
        if let (Some(adapters), Some(u), Some(du)) = (adapters, low_rank, d_low_rank) {
            let weights = self.weights();
            let adapted = self.adapted(Some(&adapters), &weights, context);
            adapters.backward(x, u, dy, du, adapted.as_ref().map(Adapted::gains));
            if let Some(adapted) = adapted {
                adapted.backward(x, u, dy);
            }
        }
    }

    /// Opens the weights of all layers.
    fn weights(&self) -> Vec<Reading<'_>> {
        self.0.iter().map(|linear| linear.weight.read()).collect()
    }

    /// The adapters with magnitudes; None where no layer has any.
    fn adapted<'a, E: Element>(
        &'a self,
        adapters: Option<&'a Adapters<'a, E>>,
        weights: &'a [Reading<'a>],
        context: Context<'a>,
    ) -> Option<Adapted<'a, E>> {
        let layers = self.columns().zip(weights);
        let layers = layers.map(|((column, linear), weight)| {
            let (out, width) = linear.weight.matrix_dims();
            (column, weight.matrix(out, width))
        });
        Adapted::new(adapters?, layers.collect(), context)
    }

    fn adapters<'a, E: Element>(&'a self, context: Context<'a>) -> Option<Adapters<'a, E>> {
        let layers = self.columns();
        let adapted = layers.filter_map(|(column, linear)| Some((linear.lora.as_ref()?, column)));
        Adapters::new(adapted, context.mask, context.pool)
    }

    /// Each layer with the first column of its output.
    fn columns(&self) -> impl Iterator<Item = (usize, &Linear)> {
        self.0.iter().scan(0, |next, linear| {
            let first = *next;
            *next += linear.out();
            Some((first, linear))
        })
    }
}

/// Adds `row` to every row of `y`.
fn add_to_rows(y: &mut [f32], row: &[f32]) {
    y.par_chunks_mut(ROW_TILE * row.len()).for_each(|tile| {
        for y in tile.chunks_exact_mut(row.len()) {
            vector::dispatch(
                #[inline(always)]
                || vector::add_scaled(y, row, 1.0),
            );
        }
    });
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
