//! DoRA (Liu et al., 2024), as PEFT 0.21 computes it: the rows of an adapted weight `V = W + s B A` get magnitudes `m` that are
//! trained, `y = g · (x Vᵀ) + bias` with the gains `g = m / ‖V‖`.
//!
//! Norms are constants to the backward pass (section 4.3 of the paper): `dm = Σ dy · (x Vᵀ) / ‖V‖`, and everything else is LoRA's
//! with `g · dy` in place of `dy`. Where inputs are dropped, the base weight reads them whole and what the gains add reads what is
//! left: `y = x Wᵀ + bias + u Sᵀ + (g - 1) · (drop(x) Wᵀ + u Sᵀ)`, in the words of [`super::lora_linear`].
//!
//! Norms are computed once for each update, a few rows of `V` at a time, which never stands in memory.

use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use super::element::{Element, widen};
use super::matrix::{Along, Data, MatrixMut, Start, Target, Term, View, Weights};
use super::product::multiply_small;
use super::{ROW_TILE, vector};
use crate::engine::buffer::{Buffer, Pool};
use crate::engine::params::Weight;

/// Rows of `V` that stand in memory at a time for each thread.
const NORM_ROWS: usize = 16;
/// Columns that a task sums.
const SUM_COLUMNS: usize = 128;

/// The magnitudes of a layer's rows, `[out]`.
#[derive(Clone, Debug)]
pub struct Magnitudes {
    pub weight: Weight,
    /// What follows from the weights of one version.
    latest: Arc<Mutex<Option<Versioned>>>,
}

/// Scales with the version of the weights that they are of.
type Versioned = (u64, Arc<Scales>);

/// What rows are multiplied by, and their gradients.
#[derive(Debug, PartialEq)]
pub(super) struct Scales {
    /// `m / ‖V‖`
    pub gains: Vec<f32>,
    /// `1 / ‖V‖`
    pub inverse_norms: Vec<f32>,
}

impl Scales {
    /// Those of rows that stay as they are.
    pub fn ones(rows: usize) -> Self {
        Self {
            gains: vec![1.0; rows],
            inverse_norms: vec![0.0; rows],
        }
    }
}

impl Magnitudes {
    pub fn new(weight: Weight) -> Self {
        Self {
            weight,
            latest: Arc::default(),
        }
    }

    /// The scales of the rows of `W + update`, computed once for each version of the weights.
    ///
    /// A row of zeros has none and stays what it is, where PEFT would divide by zero.
    pub(super) fn scales<E: Element>(
        &self,
        w: Weights<E>,
        update: Update<E>,
        pool: &Pool,
    ) -> Arc<Scales> {
        let version = self.weight.version();
        let latest = || self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, scales)) = &*latest()
            && *of == version
        {
            return scales.clone();
        }
        let norms = row_norms(w, Some(update), pool);
        let inverse = |norm: &f32| if *norm > 0.0 { 1.0 / norm } else { 0.0 };
        let magnitudes = self.weight.read_f32();
        let gains = magnitudes.iter().zip(&norms);
        let gain = |(m, norm): (&f32, &f32)| if *norm > 0.0 { m / norm } else { 0.0 };
        let scales = Arc::new(Scales {
            gains: gains.map(gain).collect(),
            inverse_norms: norms.iter().map(inverse).collect(),
        });
        *latest() = Some((version, scales.clone()));
        scales
    }
}

/// What an adapter adds to a weight, `S A`: `S` is `[out][rank]`, `A` is `[rank][in]`.
#[derive(Clone, Copy)]
pub struct Update<'a, E> {
    pub s: View<'a, E>,
    pub a: View<'a, E>,
}

/// Euclidean norms of the rows of `W`, or of `W + S A`, each summed in one order.
pub fn row_norms<E: Element>(w: Weights<E>, update: Option<Update<E>>, pool: &Pool) -> Vec<f32> {
    let width = w.columns();
    let mut norms = vec![0.0; w.rows()];
    let tiles = norms.par_chunks_mut(NORM_ROWS).enumerate();
    tiles.for_each(|(tile, norms)| {
        let first = tile * NORM_ROWS;
        let mut row = pool.take::<f32>(width);
        let change = update.map(|update| {
            let mut change = pool.take::<f32>(norms.len() * width);
            let s = &update.s.data[first * update.s.stride..];
            let term = Term {
                a: View::strided(s, norms.len(), update.s.columns, update.s.stride),
                w: update.a.into(),
                along: Along::Rows,
            };
            multiply_small(MatrixMut::new(&mut change, norms.len(), width), false, term);
            change
        });
        for (index, norm) in norms.iter_mut().enumerate() {
            match w {
                Weights::Dense(view) => widen(view.row(first + index), &mut row),
                Weights::Nf4(view) => view.widen_to_f32::<E>(first + index, 0, &mut row),
            }
            let change = change
                .as_ref()
                .map(|change| &change[index * width..][..width]);
            *norm = vector::dispatch(
                #[inline(always)]
                || {
                    if let Some(change) = change {
                        vector::add_scaled(&mut row, change, 1.0);
                    }
                    euclidean_norm(&row)
                },
            );
        }
    });
    norms
}

/// Sums in eight lanes of float64: rows are long, and a gain of one must come out as one.
#[inline(always)]
fn euclidean_norm(row: &[f32]) -> f32 {
    let mut lanes = [0.0f64; 8];
    for group in row.chunks(lanes.len()) {
        for (lane, x) in lanes.iter_mut().zip(group) {
            let x = f64::from(*x);
            *lane += x * x;
        }
    }
    lanes.iter().sum::<f64>().sqrt() as f32
}

/// `y = start + factors · y`, a factor for each column.
pub(super) fn scale_columns(y: &mut Target, factors: &[f32], start: Start) {
    match &mut y.data {
        Data::F32(y) => scale_rows(y, factors, start),
        Data::Bf16(y) => scale_rows(y, factors, start),
    }
}

fn scale_rows<E: Element>(y: &mut [E], factors: &[f32], start: Start) {
    let width = factors.len();
    y.par_chunks_mut(ROW_TILE * width)
        .enumerate()
        .for_each(|(tile, rows)| {
            for (index, y) in rows.chunks_exact_mut(width).enumerate() {
                let row = (tile * ROW_TILE + index) * width;
                let start = match start {
                    Start::Zero => None,
                    Start::Row(bias) => Some(bias),
                    Start::Rows(residual) => Some(&residual[row..row + width]),
                };
                vector::dispatch(
                    #[inline(always)]
                    || scale_row(y, factors, start),
                );
            }
        });
}

#[inline(always)]
fn scale_row<E: Element>(y: &mut [E], factors: &[f32], start: Option<&[f32]>) {
    match start {
        None => {
            for (y, factor) in y.iter_mut().zip(factors) {
                *y = E::round_from(factor * y.wide());
            }
        }
        Some(start) => {
            for ((y, factor), start) in y.iter_mut().zip(factors).zip(start) {
                *y = E::round_from(start + factor * y.wide());
            }
        }
    }
}

/// Adds `(gains - 1) · z` to the columns of `y` from `first` on; `z` is `[rows][gains]` and stands at `row` of `y`.
pub(super) fn add_gained(y: &mut Target, (row, first): (usize, usize), z: &[f32], gains: &[f32]) {
    let stride = y.columns;
    match &mut y.data {
        Data::F32(y) => add_to_columns(&mut y[row * stride..], (stride, first), z, gains),
        Data::Bf16(y) => add_to_columns(&mut y[row * stride..], (stride, first), z, gains),
    }
}

fn add_to_columns<E: Element>(
    y: &mut [E],
    (stride, first): (usize, usize),
    z: &[f32],
    gains: &[f32],
) {
    let width = gains.len();
    y.par_chunks_mut(stride)
        .zip(z.par_chunks(width))
        .with_min_len(ROW_TILE)
        .for_each(|(y, z)| {
            let y = &mut y[first..first + width];
            vector::dispatch(
                #[inline(always)]
                || {
                    for ((y, z), gain) in y.iter_mut().zip(z).zip(gains) {
                        *y = E::round_from(y.wide() + (gain - 1.0) * z);
                    }
                },
            );
        });
}

/// A copy of `dy` with each column multiplied by its factor.
pub(super) fn scaled<E: Element>(dy: View<E>, factors: &[f32], pool: &Pool) -> Buffer<E> {
    let mut copy = pool.take(dy.rows * dy.columns);
    for (row, to) in copy.chunks_exact_mut(dy.columns).enumerate() {
        to.copy_from_slice(dy.row(row));
    }
    scale_rows(&mut copy[..], factors, Start::Zero);
    copy
}

/// Adds to the gradient of the magnitudes, `Σ dy · z / ‖V‖` over some rows.
pub(super) fn add_gradient<E: Element>(
    gradient: &mut [f32],
    dy: View<E>,
    z: &[f32],
    inverse_norms: &[f32],
) {
    let width = gradient.len();
    gradient
        .par_chunks_mut(SUM_COLUMNS)
        .zip(inverse_norms.par_chunks(SUM_COLUMNS))
        .enumerate()
        .for_each(|(tile, (gradient, inverse_norms))| {
            let columns = tile * SUM_COLUMNS..tile * SUM_COLUMNS + gradient.len();
            for (row, z) in z.chunks_exact(width).enumerate().take(dy.rows) {
                let (dy, z) = (&dy.row(row)[columns.clone()], &z[columns.clone()]);
                vector::dispatch(
                    #[inline(always)]
                    || {
                        let factors = dy.iter().zip(z).zip(inverse_norms);
                        for (sum, ((dy, z), inverse)) in gradient.iter_mut().zip(factors) {
                            *sum += dy.wide() * z * inverse;
                        }
                    },
                );
            }
        });
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use common::nf4::Nf4;
    use half::bf16;

    use super::*;
    use crate::engine::ops::nf4::Nf4View;
    use crate::engine::testing::{TestWeights, in_pool, random_values};

    fn plain(row: &[f32]) -> f32 {
        let squares = row.iter().map(|x| f64::from(*x).powi(2));
        squares.sum::<f64>().sqrt() as f32
    }

    #[test]
    fn norms_are_those_of_what_products_read() {
        let (rows, columns) = (37, 70);
        let values = random_values(rows * columns, 1);
        let pool = Pool::default();
        let check = |norms: Vec<f32>, values: &[f32]| {
            for (norm, row) in norms.iter().zip(values.chunks_exact(columns)) {
                assert!((norm - plain(row)).abs() < 1e-6 * norm, "{norm}");
            }
        };
        let wide = View::new(&values, rows, columns);
        check(row_norms(wide.into(), None, &pool), &values);
        let narrow: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x)).collect();
        let widened: Vec<f32> = narrow.iter().map(|x| x.to_f32()).collect();
        let narrow = View::new(&narrow, rows, columns);
        check(row_norms(narrow.into(), None, &pool), &widened);
        let four_bits = Nf4::quantise(&values, true).unwrap();
        let mut widened = vec![0.0; values.len()];
        four_bits.dequantise(0, &mut widened);
        let view = Weights::<f32>::Nf4(Nf4View::new(&four_bits, rows, columns));
        check(row_norms(view, None, &pool), &widened);
    }

    #[test]
    fn norms_of_an_adapted_weight_do_not_depend_on_threads() {
        let (rows, columns, rank) = (37, 70, 4);
        let (w, s, a) = (
            random_values(rows * columns, 1),
            random_values(rows * rank, 2),
            random_values(rank * columns, 3),
        );
        let mut sum = w.clone();
        for (row, s) in sum.chunks_exact_mut(columns).zip(s.chunks_exact(rank)) {
            for (s, a) in s.iter().zip(a.chunks_exact(columns)) {
                row.iter_mut().zip(a).for_each(|(x, a)| *x += s * a);
            }
        }
        let norms = |threads| {
            in_pool(threads, || {
                let update = Update {
                    s: View::new(&s, rows, rank),
                    a: View::new(&a, rank, columns),
                };
                let w = View::new(&w, rows, columns);
                row_norms(w.into(), Some(update), &Pool::default())
            })
        };
        let found = norms(1);
        assert_eq!(found, norms(3));
        for (norm, row) in found.iter().zip(sum.chunks_exact(columns)) {
            assert!((norm - plain(row)).abs() < 1e-5 * norm, "{norm}");
        }
    }

    #[test]
    fn scales_follow_the_weights_and_a_row_of_zeros_stays_one() {
        let weights = TestWeights::new(&[("m", &[2])]);
        let magnitudes = Magnitudes::new(weights.trainable("m"));
        let (w, s, a) = ([3.0, 4.0, 0.0, 0.0], [0.0; 4], [1.0; 4]);
        let scales = || {
            let update = Update {
                s: View::new(&s, 2, 2),
                a: View::new(&a, 2, 2),
            };
            let w = View::new(&w[..], 2, 2);
            magnitudes.scales(w.into(), update, &Pool::default())
        };
        let m = magnitudes.weight.read_f32()[0];
        let first = scales();
        assert_eq!(first.gains, [m / 5.0, 0.0]);
        assert_eq!(first.inverse_norms, [0.2, 0.0]);
        assert!(Arc::ptr_eq(&first, &scales()), "they are kept");
        magnitudes.weight.set(&[10.0, 10.0]);
        assert_eq!(scales().gains, [2.0, 0.0]);
    }
}
