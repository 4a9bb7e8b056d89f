//! bfloat16 products where the processor has no instructions for them: the weights are widened to float32 tile by tile,
//! exactly, and multiplied as such.
//!
//! Tiles are fixed, and each output element belongs to one of them, so its bits do not depend on the thread count.

use gemm::Parallelism;
use half::bf16;
use rayon::prelude::*;

use super::gemm::{Matrix, MatrixMut, multiply};
use super::vector;

/// Output columns for which a weight is widened at a time.
const COLUMN_TILE: usize = 256;
/// Rows of a weight widened at a time where they are summed over.
const DEPTH_TILE: usize = 4096;

/// `y (+)= x Wᵀ` with W `[columns of y, columns of x]`.
pub(super) fn multiply_by_transposed(
    y: &mut MatrixMut,
    accumulate: bool,
    x: Matrix,
    weight: &[bf16],
) {
    let (out, depth) = (y.columns_count(), x.columns());
    assert_eq!(weight.len(), out * depth, "a weight of another size");
    let y = &*y;
    (0..out.div_ceil(COLUMN_TILE))
        .into_par_iter()
        .for_each_init(Vec::new, |scratch, tile| {
            let first = tile * COLUMN_TILE;
            let count = COLUMN_TILE.min(out - first);
            scratch.resize(count * depth, 0.0);
            widen(&weight[first * depth..(first + count) * depth], scratch);
            // SAFETY: each tile has its own columns.
            let mut y = unsafe { y.columns_unchecked(first, count) };
            let weight = Matrix::new(scratch, count, depth).transposed();
            multiply(&mut y, accumulate, 1.0, x, weight, Parallelism::None);
        });
}

/// `dx (+)= dy W` with W `[columns of dy, columns of dx]`.
pub(super) fn multiply_by(dx: &mut MatrixMut, accumulate: bool, dy: Matrix, weight: &[bf16]) {
    let (depth, width) = (dy.columns(), dx.columns_count());
    assert_eq!(weight.len(), depth * width, "a weight of another size");
    let dx = &*dx;
    (0..width.div_ceil(COLUMN_TILE))
        .into_par_iter()
        .for_each_init(Vec::new, |scratch, tile| {
            let first = tile * COLUMN_TILE;
            let count = COLUMN_TILE.min(width - first);
            for top in (0..depth).step_by(DEPTH_TILE) {
                let rows = DEPTH_TILE.min(depth - top);
                scratch.resize(rows * count, 0.0);
                for (row, out) in scratch.chunks_exact_mut(count).enumerate() {
                    let start = (top + row) * width + first;
                    widen(&weight[start..start + count], out);
                }
                // SAFETY: each tile has its own columns.
                let mut dx = unsafe { dx.columns_unchecked(first, count) };
                let dy = dy.columns_part(top, rows);
                let weight = Matrix::new(scratch, rows, count);
                let accumulate = accumulate || top > 0;
                multiply(&mut dx, accumulate, 1.0, dy, weight, Parallelism::None);
            }
        });
}

/// bfloat16 to float32, exactly.
pub(super) fn widen(from: &[bf16], to: &mut [f32]) {
    vector::dispatch(
        #[inline(always)]
        || {
            for (to, from) in to.iter_mut().zip(from) {
                *to = f32::from_bits(u32::from(from.to_bits()) << 16);
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::testing::{assert_close, in_pool, random_values};

    #[test]
    fn products_equal_those_of_the_widened_weight_for_any_number_of_threads() {
        for (n, out, depth) in [(9, 600, 40), (5, 4200, 300), (1, 3, 2)] {
            let narrow: Vec<bf16> = random_values(out * depth, 1)
                .into_iter()
                .map(bf16::from_f32)
                .collect();
            let mut wide = vec![0.0; out * depth];
            widen(&narrow, &mut wide);
            let (x, dy) = (random_values(n * depth, 2), random_values(n * out, 3));
            let (x, dy) = (Matrix::new(&x, n, depth), Matrix::new(&dy, n, out));
            let run = |threads| {
                in_pool(threads, || {
                    let (mut y, mut dx) = (vec![1.0; n * out], vec![1.0; n * depth]);
                    multiply_by_transposed(&mut MatrixMut::new(&mut y, n, out), true, x, &narrow);
                    multiply_by(&mut MatrixMut::new(&mut dx, n, depth), true, dy, &narrow);
                    (y, dx)
                })
            };
            let (mut y, mut dx) = (vec![1.0; n * out], vec![1.0; n * depth]);
            let weight = Matrix::new(&wide, out, depth);
            let serial = Parallelism::None;
            let mut target = MatrixMut::new(&mut y, n, out);
            multiply(&mut target, true, 1.0, x, weight.transposed(), serial);
            let mut target = MatrixMut::new(&mut dx, n, depth);
            multiply(&mut target, true, 1.0, dy, weight, serial);
            let found = run(1);
            assert_close("forward", &found.0, &y);
            assert_close("backward", &found.1, &dx);
            assert_eq!(run(3), found);
        }
    }
}
