//! A matrix with a row for each token, the embedding or the output layer, of which some rows may be trained each by itself.
//!
//! What the frozen matrix has in those rows is never read: the trained rows stand in their place, as in PEFT's
//! `trainable_token_indices`.

use std::collections::HashMap;
use std::sync::Arc;

use super::add_in_place;
use super::element::{Element, round_slice};
use super::matrix::{Along, MatrixMut, Target, View};
use super::product::{multiply, multiply_turned};
use crate::engine::buffer::{Buffer, Pool};
use crate::engine::params::Weight;

/// The embedding, or the output layer, `[vocabulary][width]`.
#[derive(Clone, Debug)]
pub struct TokenMatrix {
    pub weight: Weight,
    /// Rows that are trained beside it.
    pub rows: Option<TokenRows>,
}

/// Rows of a token matrix that are trained each by itself.
#[derive(Clone, Debug)]
pub struct TokenRows {
    /// `[rows][width]`
    pub weight: Weight,
    ids: Arc<Vec<u32>>,
    row_of: Arc<HashMap<u32, usize>>,
}

impl From<Weight> for TokenMatrix {
    fn from(weight: Weight) -> Self {
        Self { weight, rows: None }
    }
}

impl TokenMatrix {
    /// Whether anything of it is trained.
    pub fn is_trained(&self) -> bool {
        self.weight.is_trainable() || self.rows.is_some()
    }

    /// What products with it take, in the elements that the model is computed in.
    pub fn factors<E: Element>(&self, pool: &Pool) -> Factors<E> {
        let is_narrower = size_of::<E>() < size_of::<f32>();
        Factors {
            whole: (self.weight.is_trainable() && is_narrower && !self.weight.is_bf16())
                .then(|| rounded(&self.weight, pool)),
            rows: self.rows.as_ref().map(|rows| rounded(&rows.weight, pool)),
        }
    }

    /// Fills `logits` `[tokens][vocabulary]` with the products of `x` `[tokens][width]` and every row.
    pub fn multiply<E: Element>(
        &self,
        factors: &Factors<E>,
        x: View<E>,
        logits: &mut [f32],
        pool: &Pool,
    ) {
        let (vocabulary, width) = self.weight.matrix_dims();
        let target = Target::new(&mut logits[..], x.rows, vocabulary);
        match &factors.whole {
            Some(whole) => {
                let whole = View::new(&whole[..], vocabulary, width);
                multiply(target, x, whole, Along::Columns);
            }
            None => {
                let weight = self.weight.read();
                let whole = weight.matrix::<E>(vocabulary, width);
                multiply(target, x, whole, Along::Columns);
            }
        }
        let (Some(rows), Some(values)) = (&self.rows, &factors.rows) else {
            return;
        };
        let count = rows.ids.len();
        let mut own = pool.take::<f32>(x.rows * count);
        let target = Target::new(&mut own[..], x.rows, count);
        multiply(
            target,
            x,
            View::new(&values[..], count, width),
            Along::Columns,
        );
        for (logits, own) in logits
            .chunks_exact_mut(vocabulary)
            .zip(own.chunks_exact(count))
        {
            for (id, logit) in rows.ids.iter().zip(own) {
                logits[*id as usize] = *logit;
            }
        }
    }

    /// Writes the gradient of `x` to `dx` `[tokens][width]`, and hands over those of what is trained.
    ///
    /// `d_logits` are elements at the beginning of rows of `vocabulary` float32 each; those of rows that are trained by themselves
    /// are zero afterwards.
    pub fn backward<E: Element>(
        &self,
        factors: &Factors<E>,
        x: View<E>,
        d_logits: &mut [f32],
        dx: &mut [f32],
        pool: &Pool,
    ) {
        let (vocabulary, width) = self.weight.matrix_dims();
        let stride = vocabulary * size_of::<f32>() / size_of::<E>();
        let own = self.rows.as_ref().map(|rows| {
            let d_logits: &mut [E] = bytemuck::cast_slice_mut(d_logits);
            rows.take_columns(d_logits, (x.rows, stride), pool)
        });
        let d_logits =
            View::<E>::strided(bytemuck::cast_slice(d_logits), x.rows, vocabulary, stride);
        let target = Target::new(&mut dx[..], x.rows, width);
        match &factors.whole {
            Some(whole) => {
                let whole = View::new(&whole[..], vocabulary, width);
                multiply(target, d_logits, whole, Along::Rows);
            }
            None => {
                let weight = self.weight.read();
                let whole = weight.matrix::<E>(vocabulary, width);
                multiply(target, d_logits, whole, Along::Rows);
            }
        }
        add_gradient(&self.weight, d_logits, x);
        if let (Some(rows), Some(own), Some(values)) = (&self.rows, own, &factors.rows) {
            let count = rows.ids.len();
            let own = View::new(&own[..], x.rows, count);
            let mut more = pool.take::<f32>(x.rows * width);
            let target = Target::new(&mut more[..], x.rows, width);
            multiply(
                target,
                own,
                View::new(&values[..], count, width),
                Along::Rows,
            );
            add_in_place(&mut dx[..x.rows * width], &more);
            add_gradient(&rows.weight, own, x);
        }
    }
}

/// Weights of a token matrix in the elements of a product, where they are not so already.
pub struct Factors<E> {
    whole: Option<Buffer<E>>,
    rows: Option<Buffer<E>>,
}

impl TokenRows {
    /// The rows of these tokens, which are all different.
    pub fn new(weight: Weight, ids: &[u32]) -> Self {
        assert_eq!(weight.matrix_dims().0, ids.len(), "a row for each token");
        let rows = ids.iter().enumerate().map(|(row, id)| (*id, row));
        Self {
            weight,
            row_of: Arc::new(rows.collect()),
            ids: Arc::new(ids.to_vec()),
        }
    }

    /// The row of a token, if it is one of these.
    pub fn row_of(&self, id: u32) -> Option<usize> {
        self.row_of.get(&id).copied()
    }

    /// Takes the columns of these tokens out of a matrix, whose rows lie `stride` elements apart.
    fn take_columns<E: Element>(
        &self,
        matrix: &mut [E],
        (rows, stride): (usize, usize),
        pool: &Pool,
    ) -> Buffer<E> {
        let count = self.ids.len();
        let mut taken = pool.take::<E>(rows * count);
        for (row, taken) in taken.chunks_exact_mut(count).enumerate() {
            for (id, taken) in self.ids.iter().zip(taken) {
                let element = &mut matrix[row * stride + *id as usize];
                *taken = std::mem::replace(element, E::zeroed());
            }
        }
        taken
    }
}

/// The weight in elements of another type.
fn rounded<E: Element>(weight: &Weight, pool: &Pool) -> Buffer<E> {
    let values = weight.read_f32();
    let mut narrow = pool.take::<E>(values.len());
    round_slice(&values, 1.0, &mut narrow);
    narrow
}

/// Hands over the gradient `dyᵀ · x` of a weight that is trained.
fn add_gradient<E: Element>(weight: &Weight, dy: View<E>, x: View<E>) {
    weight.add_gradient(|rows, gradient, accumulate| {
        let target = MatrixMut::new(gradient, rows.len(), x.columns);
        multiply_turned(target, accumulate, dy.part(rows.start, rows.len()), x);
    });
}
