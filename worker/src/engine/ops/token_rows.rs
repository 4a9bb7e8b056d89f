//! Rows that are of some of a batch's tokens: taken out of the rows of all, and added to them again.
//!
//! Tokens are ascending and each occurs once, so that threads can share the rows of all by tiles.

use rayon::prelude::*;

use super::ROW_TILE;
use super::element::{Element, round_slice, widen};
use super::vector::{self, dispatch};

/// Copies the rows of these tokens out of `x`, `[all tokens][width]`.
pub fn gather<E: Element>(x: &[E], tokens: &[u32], rows: &mut [E], width: usize) {
    each_row(rows, width, |index, row| {
        let token = tokens[index] as usize;
        row.copy_from_slice(&x[token * width..][..width]);
    });
}

/// [`gather`] out of float32 rows, which are rounded.
pub fn gather_rounded<E: Element>(x: &[f32], tokens: &[u32], rows: &mut [E], width: usize) {
    each_row(rows, width, |index, row| {
        let token = tokens[index] as usize;
        round_slice(&x[token * width..][..width], 1.0, row);
    });
}

/// Adds rows, each times its weight, to those of their tokens in `y`, `[all tokens][width]`.
pub fn add_weighted(y: &mut [f32], tokens: &[u32], rows: &[f32], weights: &[f32], width: usize) {
    add(y, tokens, rows, &|row| weights[row], width);
}

/// Adds rows to those of their tokens in `y`, `[all tokens][width]`.
pub fn add_rows(y: &mut [f32], tokens: &[u32], rows: &[f32], width: usize) {
    add(y, tokens, rows, &|_| 1.0, width);
}

fn add(
    y: &mut [f32],
    tokens: &[u32],
    rows: &[f32],
    weight: &(impl Fn(usize) -> f32 + Sync),
    width: usize,
) {
    y.par_chunks_mut(ROW_TILE * width)
        .enumerate()
        .for_each(|(tile, y)| {
            let first = tile * ROW_TILE;
            let before = |end: usize| tokens.partition_point(|token| (*token as usize) < end);
            for row in before(first)..before(first + ROW_TILE) {
                let at = (tokens[row] as usize - first) * width;
                let y = &mut y[at..at + width];
                let from = &rows[row * width..][..width];
                dispatch(
                    #[inline(always)]
                    || vector::add_scaled(y, from, weight(row)),
                );
            }
        });
}

/// Computes the product of each row of `a` with the same row of `b`.
pub fn dots<E: Element>(a: &[f32], b: &[E], products: &mut [f32], width: usize) {
    products
        .par_chunks_mut(ROW_TILE)
        .enumerate()
        .for_each(|(tile, products)| {
            let mut wide = vec![0.0; width];
            for (index, product) in products.iter_mut().enumerate() {
                let row = (tile * ROW_TILE + index) * width;
                widen(&b[row..row + width], &mut wide);
                *product = dispatch(
                    #[inline(always)]
                    || vector::dot(&a[row..row + width], &wide),
                );
            }
        });
}

/// Adds the product of each row with `vector` to `products`.
pub fn add_products_with<E: Element>(rows: &[E], vector: &[f32], products: &mut [f32]) {
    let width = vector.len();
    products
        .par_chunks_mut(ROW_TILE)
        .zip(rows.par_chunks(ROW_TILE * width))
        .for_each(|(products, rows)| {
            let mut wide = vec![0.0; width];
            for (product, row) in products.iter_mut().zip(rows.chunks_exact(width)) {
                widen(row, &mut wide);
                *product += dispatch(
                    #[inline(always)]
                    || vector::dot(&wide, vector),
                );
            }
        });
}

/// Multiplies each row by its weight.
pub fn scale<E: Element>(rows: &mut [E], weights: &[f32], width: usize) {
    each_row(rows, width, |index, row| {
        let weight = weights[index];
        dispatch(
            #[inline(always)]
            || {
                for x in row {
                    *x = E::round_from(x.wide() * weight);
                }
            },
        );
    });
}

fn each_row<E: Element>(rows: &mut [E], width: usize, work: impl Fn(usize, &mut [E]) + Sync) {
    rows.par_chunks_exact_mut(width)
        .with_min_len(ROW_TILE)
        .enumerate()
        .for_each(|(index, row)| work(index, row));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::testing::random_values;

    #[test]
    fn rows_come_out_and_go_back_to_their_tokens() {
        let (width, all) = (3, 200);
        let tokens: Vec<u32> = (0..all as u32).filter(|token| token % 7 < 2).collect();
        let x = random_values(all * width, 1);
        let mut rows = vec![0.0; tokens.len() * width];
        gather(&x, &tokens, &mut rows, width);
        let weights = random_values(tokens.len(), 2);
        let mut y = vec![1.0; x.len()];
        add_weighted(&mut y, &tokens, &rows, &weights, width);
        for token in 0..all {
            let row = tokens.iter().position(|known| *known as usize == token);
            let weight = row.map_or(0.0, |row| weights[row]);
            for column in token * width..(token + 1) * width {
                assert_eq!(y[column], 1.0 + weight * x[column]);
            }
        }
        let mut products = vec![0.0; tokens.len()];
        dots(&rows, &rows, &mut products, width);
        let mut sums = products.clone();
        add_products_with(&rows, &[0.0, 2.0, 0.0], &mut sums);
        assert_eq!(sums[1], products[1] + 2.0 * rows[width + 1]);
        scale(&mut rows, &products, width);
        let first = &x[..width];
        let square: f32 = vector::sum_squares(first);
        assert_eq!((products[0], rows[0]), (square, first[0] * square));
    }
}
