//! Adapters that begin with a part of the weight that they are on: PiSSA (Meng et al., 2024), its largest singular directions, and
//! OLoRA (Büyükakyüz, 2024), the first columns of its QR decomposition.
//!
//! In: a weight, and a generator. Out: factors whose product, scaled, is that part; the same bits for any number of threads.

use common::job::AdapterInit;
use common::rng::CounterRng;
use rayon::prelude::*;

use crate::engine::ops::matrix::{Along, MatrixMut, Target, View};
use crate::engine::ops::product::{multiply, multiply_turned};

/// Shorter side up to which all singular directions are found, so that the largest are exact.
const WHOLE_SIDE: usize = 256;
/// Directions that are followed beside those that are wanted, at most.
const SPARE_DIRECTIONS: usize = 32;
/// Power iterations where the job does not say how many.
const ITERATIONS: u32 = 8;
/// Sweeps after which eigenvalues that still move stay as they are.
const MOST_SWEEPS: usize = 40;

/// The factors that an adapter starts with, and that stay taken off: `A`, `[rank][in]`, and `B`, `[out][rank]`.
pub struct Factors {
    pub a: Vec<f32>,
    pub b: Vec<f32>,
}

/// The part of a weight, `[out][in]`, that an adapter of this rank and scale begins with.
pub fn factors_of(
    init: AdapterInit,
    weight: View<f32>,
    (rank, scale): (usize, f64),
    rng: &mut CounterRng,
) -> Option<Factors> {
    match init {
        AdapterInit::Kaiming | AdapterInit::Gaussian | AdapterInit::Orthogonal => None,
        AdapterInit::Pissa { iterations } => Some(pissa(weight, (rank, scale), iterations, rng)),
        AdapterInit::Olora => Some(olora(weight, rank)),
    }
}

/// `B` is the orthogonal basis of the first columns, `A` what the weight is in it.
fn olora(weight: View<f32>, rank: usize) -> Factors {
    let mut basis = Columns::zeros(rank, weight.rows);
    for (column, values) in basis.values.chunks_exact_mut(weight.rows).enumerate() {
        for (row, value) in values.iter_mut().enumerate() {
            *value = weight.row(row)[column];
        }
    }
    basis.orthonormalise();
    let b = basis.rows();
    Factors {
        a: in_basis(&b, rank, weight),
        b,
    }
}

/// Both factors have the square roots of the largest singular values, each by `scale` smaller together.
fn pissa(
    weight: View<f32>,
    (rank, scale): (usize, f64),
    iterations: Option<u32>,
    rng: &mut CounterRng,
) -> Factors {
    let (out, width) = (weight.rows, weight.columns);
    let side = out.min(width);
    let followed = match side <= WHOLE_SIDE && iterations.is_none() {
        true => side,
        false => side.min(rank + rank.min(SPARE_DIRECTIONS)),
    };
    let start: Vec<f32> = (0..width * followed).map(|_| rng.normal() as f32).collect();
    let mut basis = orthonormal_image(weight, &start, followed);
    for _ in 0..iterations.unwrap_or(ITERATIONS) {
        let mut back = vec![0.0; width * followed];
        let target = MatrixMut::new(&mut back, width, followed);
        multiply_turned(target, false, weight, View::new(&basis, out, followed));
        let mut columns = Columns::of(&back, followed);
        columns.orthonormalise();
        basis = orthonormal_image(weight, &columns.rows(), followed);
    }
    let projected = in_basis(&basis, followed, weight);
    let (values, vectors) = eigen(gram(&projected, followed), followed);
    // Those of the largest singular values, by which both factors are turned.
    let mut order: Vec<usize> = (0..followed).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
    order.truncate(rank);
    let mut turned_b = vec![0.0; followed * rank];
    let mut turned_a = vec![0.0; rank * followed];
    for (index, direction) in order.into_iter().enumerate() {
        let singular = values[direction].max(0.0).sqrt();
        let to_b = (singular / scale).sqrt();
        let to_a = match singular > 0.0 {
            true => 1.0 / (singular * scale).sqrt(),
            false => 0.0,
        };
        for row in 0..followed {
            let x = vectors[row * followed + direction];
            turned_b[row * rank + index] = (x * to_b) as f32;
            turned_a[index * followed + row] = (x * to_a) as f32;
        }
    }
    let (mut a, mut b) = (vec![0.0; rank * width], vec![0.0; out * rank]);
    multiply(
        Target::new(&mut a, rank, width),
        View::new(&turned_a, rank, followed),
        View::new(&projected, followed, width),
        Along::Rows,
    );
    multiply(
        Target::new(&mut b, out, rank),
        View::new(&basis, out, followed),
        View::new(&turned_b, followed, rank),
        Along::Rows,
    );
    Factors { a, b }
}

/// An orthonormal basis, `[out][count]`, of what the weight makes of the columns of `from`, `[in][count]`.
fn orthonormal_image(weight: View<f32>, from: &[f32], count: usize) -> Vec<f32> {
    let mut image = vec![0.0; weight.rows * count];
    multiply(
        Target::new(&mut image, weight.rows, count),
        weight,
        View::new(from, weight.columns, count),
        Along::Rows,
    );
    let mut columns = Columns::of(&image, count);
    columns.orthonormalise();
    columns.rows()
}

/// The weight in a basis of its columns' space, `[out][count]`: `[count][in]`.
fn in_basis(basis: &[f32], count: usize, weight: View<f32>) -> Vec<f32> {
    let mut projected = vec![0.0; count * weight.columns];
    let target = MatrixMut::new(&mut projected, count, weight.columns);
    multiply_turned(target, false, View::new(basis, weight.rows, count), weight);
    projected
}

/// Columns of a matrix, one behind the other.
struct Columns {
    values: Vec<f32>,
    length: usize,
}

impl Columns {
    fn zeros(count: usize, length: usize) -> Self {
        Self {
            values: vec![0.0; count * length],
            length,
        }
    }

    /// Those of a matrix of rows.
    fn of(rows: &[f32], count: usize) -> Self {
        let mut columns = Self::zeros(count, rows.len() / count);
        let length = columns.length;
        let values = columns.values.par_chunks_exact_mut(length).enumerate();
        values.for_each(|(column, values)| {
            for (value, row) in values.iter_mut().zip(rows.chunks_exact(count)) {
                *value = row[column];
            }
        });
        columns
    }

    /// The matrix row by row.
    fn rows(&self) -> Vec<f32> {
        let count = self.values.len() / self.length;
        let mut rows = vec![0.0; self.values.len()];
        rows.par_chunks_exact_mut(count)
            .enumerate()
            .for_each(|(row, values)| {
                for (column, value) in values.iter_mut().enumerate() {
                    *value = self.values[column * self.length + row];
                }
            });
        rows
    }

    /// Gram-Schmidt, twice, because once leaves what rounding adds. A column that is nothing new becomes zero.
    fn orthonormalise(&mut self) {
        for _ in 0..2 {
            let mut rest = &mut self.values[..];
            while !rest.is_empty() {
                let (column, later) = rest.split_at_mut(self.length);
                let norm = dot(column, column).sqrt();
                let factor = match norm > f64::from(f32::MIN_POSITIVE) {
                    true => 1.0 / norm,
                    false => 0.0,
                };
                for x in &mut *column {
                    *x = (f64::from(*x) * factor) as f32;
                }
                later.par_chunks_exact_mut(self.length).for_each(|other| {
                    let along = dot(column, other) as f32;
                    for (x, column) in other.iter_mut().zip(&*column) {
                        *x -= along * column;
                    }
                });
                rest = later;
            }
        }
    }
}

/// Sums in eight lanes of float64.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 8];
    for (a, b) in a.chunks(lanes.len()).zip(b.chunks(lanes.len())) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += f64::from(*a) * f64::from(*b);
        }
    }
    lanes.iter().sum()
}

/// `P Pᵀ` of `P`, `[count][...]`.
fn gram(p: &[f32], count: usize) -> Vec<f64> {
    let length = p.len() / count;
    let rows: Vec<&[f32]> = p.chunks_exact(length).collect();
    let products = rows
        .par_iter()
        .flat_map_iter(|a| rows.iter().map(|b| dot(a, b)));
    products.collect()
}

/// Eigenvalues and eigenvectors (columns) of a symmetric matrix: cyclic Jacobi rotations (Golub & Van Loan, 8.5).
fn eigen(mut matrix: Vec<f64>, count: usize) -> (Vec<f64>, Vec<f64>) {
    let mut vectors = vec![0.0; count * count];
    for index in 0..count {
        vectors[index * count + index] = 1.0;
    }
    let total: f64 = matrix.iter().map(|x| x * x).sum();
    for _ in 0..MOST_SWEEPS {
        let mut off = 0.0;
        for p in 0..count {
            for q in p + 1..count {
                let between = matrix[p * count + q];
                off += between * between;
                if between * between > f64::EPSILON * f64::EPSILON * total {
                    rotate(&mut matrix, &mut vectors, count, (p, q));
                }
            }
        }
        if off <= f64::EPSILON * f64::EPSILON * total {
            break;
        }
    }
    let values = (0..count).map(|index| matrix[index * count + index]);
    (values.collect(), vectors)
}

/// Turns the rows and columns p and q so that what is between them becomes zero.
fn rotate(matrix: &mut [f64], vectors: &mut [f64], count: usize, (p, q): (usize, usize)) {
    let between = matrix[p * count + q];
    let theta = (matrix[q * count + q] - matrix[p * count + p]) / (2.0 * between);
    let tangent = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
    let cosine = 1.0 / (tangent * tangent + 1.0).sqrt();
    let sine = tangent * cosine;
    for row in 0..count {
        turn(matrix, (row * count + p, row * count + q), (cosine, sine));
        turn(vectors, (row * count + p, row * count + q), (cosine, sine));
    }
    for column in 0..count {
        turn(
            matrix,
            (p * count + column, q * count + column),
            (cosine, sine),
        );
    }
}

fn turn(values: &mut [f64], (p, q): (usize, usize), (cosine, sine): (f64, f64)) {
    let (x, y) = (values[p], values[q]);
    values[p] = cosine * x - sine * y;
    values[q] = sine * x + cosine * y;
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::testing::{in_pool, random_values};

    /// A matrix with these singular values, and the part of it that the first `rank` make.
    fn with_singular_values(
        rows: usize,
        columns: usize,
        values: &[f32],
        rank: usize,
    ) -> [Vec<f32>; 2] {
        let basis = |length: usize, seed| {
            let mut columns = Columns {
                values: random_values(values.len() * length, seed),
                length,
            };
            columns.orthonormalise();
            columns.values
        };
        let (left, right) = (basis(rows, 1), basis(columns, 2));
        let sum = |count: usize| {
            let mut sum = vec![0.0; rows * columns];
            for (index, value) in values.iter().enumerate().take(count) {
                for (row, sums) in sum.chunks_exact_mut(columns).enumerate() {
                    for (column, sum) in sums.iter_mut().enumerate() {
                        *sum += value * left[index * rows + row] * right[index * columns + column];
                    }
                }
            }
            sum
        };
        [sum(values.len()), sum(rank)]
    }

    fn product(factors: &Factors, rank: usize, scale: f64) -> Vec<f32> {
        let columns = factors.a.len() / rank;
        let mut product = vec![0.0; factors.b.len() / rank * columns];
        for (row, b) in product
            .chunks_exact_mut(columns)
            .zip(factors.b.chunks_exact(rank))
        {
            for (b, a) in b.iter().zip(factors.a.chunks_exact(columns)) {
                row.iter_mut()
                    .zip(a)
                    .for_each(|(x, a)| *x += scale as f32 * b * a);
            }
        }
        product
    }

    fn distance(a: &[f32], b: &[f32]) -> f32 {
        a.iter()
            .zip(b)
            .fold(0.0, |most, (a, b)| most.max((a - b).abs()))
    }

    fn factors(init: AdapterInit, weight: View<f32>, rank: usize, threads: usize) -> Factors {
        in_pool(threads, || {
            factors_of(init, weight, (rank, 2.0), &mut CounterRng::new(1, &[2])).unwrap()
        })
    }

    #[test]
    fn pissa_begins_with_the_largest_singular_directions() {
        let singular: Vec<f32> = (0..40).map(|index| 10.0 * 0.9f32.powi(index)).collect();
        for (rows, columns) in [(60, 45), (45, 60), (300, 280)] {
            let [weight, expected] = with_singular_values(rows, columns, &singular, 4);
            let view = View::new(&weight, rows, columns);
            for iterations in [None, Some(16)] {
                let init = AdapterInit::Pissa { iterations };
                let found = factors(init, view, 4, 1);
                let off = distance(&product(&found, 4, 2.0), &expected);
                assert!(off < 1e-3, "{rows} x {columns}, {iterations:?}: {off}");
                let again = factors(init, view, 4, 3);
                assert!(found.a == again.a && found.b == again.b);
                // The factors have equal shares: the columns of B are as long as the rows of A.
                let of_a: f32 = found.a[..columns].iter().map(|x| x * x).sum();
                let of_b: f32 = found.b.chunks_exact(4).map(|row| row[0] * row[0]).sum();
                assert!((of_a - 5.0).abs() < 1e-3 && (of_b - 5.0).abs() < 1e-3);
            }
        }
    }

    #[test]
    fn olora_begins_with_the_first_columns_of_an_orthogonal_basis() {
        let (rows, columns, rank) = (30, 50, 6);
        let weight = random_values(rows * columns, 3);
        let found = factors(
            AdapterInit::Olora,
            View::new(&weight, rows, columns),
            rank,
            2,
        );
        let product = product(&found, rank, 1.0);
        // Of the first columns nothing is left.
        for (row, expected) in product
            .chunks_exact(columns)
            .zip(weight.chunks_exact(columns))
        {
            assert!(distance(&row[..rank], &expected[..rank]) < 1e-5);
        }
        for i in 0..rank {
            for j in 0..rank {
                let dot: f32 = found.b.chunks_exact(rank).map(|row| row[i] * row[j]).sum();
                assert!((dot - f32::from(u8::from(i == j))).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn a_weight_of_lower_rank_gives_finite_factors() {
        let [weight, _] = with_singular_values(20, 24, &[3.0, 1.0], 2);
        let view = View::new(&weight, 20, 24);
        for init in [AdapterInit::Pissa { iterations: None }, AdapterInit::Olora] {
            let found = factors(init, view, 4, 1);
            assert!(
                found.a.iter().chain(&found.b).all(|x| x.is_finite()),
                "{init:?}"
            );
            if init != AdapterInit::Olora {
                assert!(distance(&product(&found, 4, 2.0), &weight) < 1e-3);
            }
        }
    }
}
