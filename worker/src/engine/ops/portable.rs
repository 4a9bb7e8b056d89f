//! Products where the processor has no instructions that [`super::avx512`] could use: through the `gemm` crate, whose
//! kernels know many processors. bfloat16 factors are widened to float32 tile by tile, exactly.
//!
//! Tiles are fixed, and each output element belongs to one of them, so its bits do not depend on the thread count.

use std::ops::Range;

use gemm::Parallelism;
use rayon::prelude::*;

use super::element::{Element, round_slice, widen};
use super::gemm::multiply;
use super::matrix::{Along, Data, Part, Start, Target, Term, View, Weights};
use super::matrix::{Matrix, MatrixMut, Shared};

/// Output columns computed at a time.
const COLUMN_TILE: usize = 256;
/// Elements of the sum for which a weight is widened at a time.
const SUM_TILE: usize = 4096;

pub(super) fn product<E: Element>(target: Target, parts: &[Part<E>]) {
    let (rows, columns) = (target.rows, target.columns);
    let tiles: Vec<(&Part<E>, usize, usize)> = parts
        .iter()
        .flat_map(|part| {
            (0..part.width()).step_by(COLUMN_TILE).map(move |first| {
                let count = COLUMN_TILE.min(part.width() - first);
                (part, first, count)
            })
        })
        .collect();
    let out = match target.data {
        Data::F32(data) => Out::F32(Shared::new(data)),
        Data::Bf16(data) => Out::Bf16(Shared::new(data)),
    };
    tiles
        .into_par_iter()
        .for_each_init(Scratch::default, |scratch, (part, first, count)| {
            scratch.sums.clear();
            scratch.sums.resize(rows * count, 0.0);
            begin(part, first, count, columns, &mut scratch.sums);
            for term in &part.terms {
                add_term(term, first, count, scratch);
            }
            for (row, sums) in scratch.sums.chunks_exact(count).enumerate() {
                let start = row * columns + part.first + first;
                // SAFETY: each tile has its own columns.
                unsafe {
                    match &out {
                        Out::F32(out) => out.slice(start, count).copy_from_slice(sums),
                        Out::Bf16(out) => round_slice(sums, 1.0, out.slice(start, count)),
                    }
                }
            }
        });
}

enum Out<'a> {
    F32(Shared<'a, f32>),
    Bf16(Shared<'a, half::bf16>),
}

#[derive(Default)]
struct Scratch {
    sums: Vec<f32>,
    a: Vec<f32>,
    w: Vec<f32>,
}

/// Computes one product on the calling thread, of shapes that were checked.
pub(super) fn multiply_small<E: Element>(mut c: MatrixMut, add: bool, term: Term<E>) {
    let Scratch { a, w, .. } = &mut Scratch::default();
    let a = wide(term.a.part(0, term.sum()), a);
    let whole = || (0..term.w.rows(), 0..term.w.columns());
    let w = match term.along {
        Along::Columns => wide_part(&term.w, whole(), w).transposed(),
        Along::Rows => wide_part(&term.w, whole(), w),
    };
    multiply(&mut c, add, 1.0, a, w, Parallelism::None);
}

/// `c = aᵀ · w`, of shapes that were checked.
pub(super) fn multiply_turned(
    mut c: MatrixMut,
    add: bool,
    a: View<f32>,
    w: View<f32>,
    parallelism: Parallelism,
) {
    let (a, w) = (Matrix::from(a).transposed(), Matrix::from(w));
    multiply(&mut c, add, 1.0, a, w, parallelism);
}

fn begin<E>(part: &Part<E>, first: usize, count: usize, columns: usize, sums: &mut [f32]) {
    for (row, sums) in sums.chunks_exact_mut(count).enumerate() {
        match part.start {
            Start::Zero => {}
            Start::Row(bias) => sums.copy_from_slice(&bias[first..first + count]),
            Start::Rows(residual) => {
                sums.copy_from_slice(&residual[row * columns + first..][..count]);
            }
        }
    }
}

fn add_term<E: Element>(term: &Term<E>, first: usize, count: usize, scratch: &mut Scratch) {
    let sum = term.sum();
    for start in (0..sum).step_by(SUM_TILE) {
        let len = SUM_TILE.min(sum - start);
        let Scratch { sums, a, w } = scratch;
        let a = wide(term.a.part(start, len), a);
        let w = match term.along {
            Along::Columns => {
                let rows = first..first + count;
                wide_part(&term.w, (rows, start..start + len), w).transposed()
            }
            Along::Rows => {
                let rows = start..start + len;
                wide_part(&term.w, (rows, first..first + count), w)
            }
        };
        let mut target = MatrixMut::new(sums, term.a.rows, count);
        multiply(&mut target, true, 1.0, a, w, Parallelism::None);
    }
}

/// Some rows and columns of the weights as float32.
fn wide_part<'a, E: Element>(
    weights: &Weights<'a, E>,
    (rows, columns): (Range<usize>, Range<usize>),
    scratch: &'a mut Vec<f32>,
) -> Matrix<'a> {
    match weights {
        Weights::Dense(view) => {
            let of_rows = View {
                data: &view.data[(rows.start * view.stride).min(view.data.len())..],
                rows: rows.len(),
                ..*view
            };
            wide(of_rows.part(columns.start, columns.len()), scratch)
        }
        Weights::Nf4(view) => {
            scratch.resize(rows.len() * columns.len(), 0.0);
            let parts = scratch.chunks_exact_mut(columns.len().max(1));
            for (row, out) in rows.clone().zip(parts) {
                view.widen_to_f32::<E>(row, columns.start, out);
            }
            Matrix::new(scratch, rows.len(), columns.len())
        }
    }
}

/// The matrix as float32: itself where it is, a copy where it is not.
fn wide<'a, E: Element>(view: View<'a, E>, scratch: &'a mut Vec<f32>) -> Matrix<'a> {
    if let Some(data) = E::as_f32(view.data) {
        return Matrix::strided(data, view.rows, view.columns, view.stride);
    }
    scratch.resize(view.rows * view.columns, 0.0);
    for (row, out) in scratch.chunks_exact_mut(view.columns.max(1)).enumerate() {
        widen(view.row(row), out);
    }
    Matrix::new(scratch, view.rows, view.columns)
}
