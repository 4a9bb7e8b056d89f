//! DoRA's part of a projection: what the magnitudes of its layers make of the output, and their gradients.

use super::super::dora::{self, Scales};
use super::super::element::Element;
use super::super::lora_linear::Adapters;
use super::super::matrix::{Along, Part, Start, Target, Term, View, Weights};
use super::super::product::product;
use super::Context;
use crate::engine::buffer::Buffer;

use std::ops::Range;

use common::memory::AGAIN_ROWS;

/// The adapters of a projection of which some have magnitudes.
pub(super) struct Adapted<'a, E> {
    adapters: &'a Adapters<'a, E>,
    /// Each layer's first column and weight.
    layers: Vec<(usize, Weights<'a, E>)>,
    /// Those of all columns, one where a layer has no magnitudes.
    scales: Scales,
    context: Context<'a>,
}

impl<'a, E: Element> Adapted<'a, E> {
    /// None where no layer has magnitudes.
    pub fn new(
        adapters: &'a Adapters<'a, E>,
        layers: Vec<(usize, Weights<'a, E>)>,
        context: Context<'a>,
    ) -> Option<Self> {
        let total = layers.iter().map(|(_, weight)| weight.rows()).sum();
        let mut scales = None;
        for (column, weight) in &layers {
            let Some((magnitudes, update)) = adapters.magnitudes(*column) else {
                continue;
            };
            let own = magnitudes.scales(*weight, update, context.pool);
            let all = scales.get_or_insert_with(|| Scales::ones(total));
            let columns = *column..column + weight.rows();
            all.gains[columns.clone()].copy_from_slice(&own.gains);
            all.inverse_norms[columns].copy_from_slice(&own.inverse_norms);
        }
        Some(Self {
            adapters,
            layers,
            scales: scales?,
            context,
        })
    }

    /// Factors on the columns of the output.
    pub fn gains(&self) -> &[f32] {
        &self.scales.gains
    }

    /// Whether adapters read other inputs than weights do.
    pub fn drops(&self) -> bool {
        self.adapters.drops()
    }

    /// Makes the output of `y = x Vᵀ`: scales it, and adds it to the residual or the biases.
    pub fn scale(&self, mut y: Target, residual: Option<&[f32]>, biases: &[Option<Vec<f32>>]) {
        let bias = self.joined(biases);
        let start = match (residual, &bias) {
            (Some(residual), _) => Start::Rows(residual),
            (None, Some(bias)) => Start::Row(bias),
            (None, None) => Start::Zero,
        };
        dora::scale_columns(&mut y, self.gains(), start);
    }

    /// All biases one behind the other, zero where a layer has none; None where none has one.
    fn joined(&self, biases: &[Option<Vec<f32>>]) -> Option<Vec<f32>> {
        biases.iter().any(Option::is_some).then(|| {
            let mut joined = vec![0.0; self.gains().len()];
            for ((column, _), bias) in self.layers.iter().zip(biases) {
                if let Some(bias) = bias {
                    joined[*column..column + bias.len()].copy_from_slice(bias);
                }
            }
            joined
        })
    }

    /// Makes the output of LoRA's, where inputs are dropped: adds what the gains make of `drop(x) Vᵀ`.
    pub fn add_gained(&self, mut y: Target, x: &[E], u: &[E]) {
        self.each_output(x, u, |rows, columns, z| {
            let place = (rows.start, columns.start);
            dora::add_gained(&mut y, place, z, &self.gains()[columns]);
        });
    }

    /// The gradient of what is scaled: `g · dy`.
    pub fn gained(&self, dy: View<E>) -> Buffer<E> {
        dora::scaled(dy, self.gains(), self.context.pool)
    }

    /// The gradient of what the gains add, where inputs are dropped: `(g - 1) · dy`.
    pub fn added_by_gains(&self, dy: View<E>) -> Buffer<E> {
        let factors: Vec<f32> = self.gains().iter().map(|gain| gain - 1.0).collect();
        dora::scaled(dy, &factors, self.context.pool)
    }

    /// The term that the gradient [`added_by_gains`](Self::added_by_gains) adds to that of what the adapter of the layer at
    /// `column` reads.
    pub fn through_mask<'b>(&'b self, added: View<'b, E>, column: usize) -> Option<Term<'b, E>> {
        let (_, weight) = self.layers.iter().find(|(first, _)| *first == column)?;
        Some(Term {
            a: added.part(column, weight.rows()),
            w: *weight,
            along: Along::Rows,
        })
    }

    /// Hands over the gradients of the magnitudes. `dy` is that of the output, as it is.
    pub fn backward(&self, x: &[E], u: &[E], dy: View<E>) {
        let mut gradients = vec![0.0; dy.columns];
        self.each_output(x, u, |rows, columns, z| {
            let inverse_norms = &self.scales.inverse_norms[columns.clone()];
            let from = &dy.data[rows.start * dy.stride..];
            let dy = View::strided(from, rows.len(), dy.columns, dy.stride);
            let dy = dy.part(columns.start, columns.len());
            dora::add_gradient(&mut gradients[columns], dy, z, inverse_norms);
        });
        for (column, _) in &self.layers {
            let Some((magnitudes, _)) = self.adapters.magnitudes(*column) else {
                continue;
            };
            magnitudes
                .weight
                .add_gradient(|rows, gradient, accumulate| {
                    let from = &gradients[column + rows.start..column + rows.end];
                    match accumulate {
                        true => super::super::add_in_place(gradient, from),
                        false => gradient.copy_from_slice(from),
                    }
                });
        }
    }

    /// Computes `x Vᵀ` of each layer with magnitudes once more, of the input that its adapter reads; calls `read` with some rows,
    /// the layer's columns, and what stands there.
    fn each_output(
        &self,
        x: &[E],
        u: &[E],
        mut read: impl FnMut(Range<usize>, Range<usize>, &[f32]),
    ) {
        let Context { tokens, pool, .. } = self.context;
        let ranks = u.len() / tokens.max(1);
        for (column, weight) in &self.layers {
            if self.adapters.magnitudes(*column).is_none() {
                continue;
            }
            let (out, width) = (weight.rows(), weight.columns());
            let dropped = self.adapters.dropped_input(x, *column);
            let x = dropped.as_deref().unwrap_or(x);
            let mut z = pool.take::<f32>(tokens.min(AGAIN_ROWS) * out);
            for first in (0..tokens).step_by(AGAIN_ROWS) {
                let rows = first..(first + AGAIN_ROWS).min(tokens);
                let frozen = Term {
                    a: View::new(&x[first * width..], rows.len(), width),
                    w: *weight,
                    along: Along::Columns,
                };
                let u = &u[first * ranks..];
                let update = self.adapters.expand(u, rows.len(), *column..column + out);
                let part = Part {
                    first: 0,
                    start: Start::Zero,
                    terms: [frozen].into_iter().chain(update).collect(),
                };
                product(Target::new(&mut z[..], rows.len(), out), &[part]);
                read(rows.clone(), *column..column + out, &z[..rows.len() * out]);
            }
        }
    }
}
