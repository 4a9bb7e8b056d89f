//! Float32 matrix products of any strides: the one door to the `gemm` crate. Products with weights, of which there are
//! far more, are in [`super::product`].
//!
//! The same bits for any number of threads: `gemm` splits rows and columns but never the sum.

use gemm::Parallelism;

use super::matrix::{Matrix, MatrixMut};

/// Parallelism over all threads of the pool that this runs in.
pub fn all_threads() -> Parallelism {
    match rayon::current_num_threads() {
        1 => Parallelism::None,
        _ => Parallelism::Rayon(0),
    }
}

/// `c = alpha · a · b`, or `c += alpha · a · b` with `accumulate`.
pub fn multiply(
    c: &mut MatrixMut,
    accumulate: bool,
    alpha: f32,
    a: Matrix,
    b: Matrix,
    parallelism: Parallelism,
) {
    assert!(
        a.rows == c.rows && b.columns == c.columns && a.columns == b.rows,
        "a product of {}x{} and {}x{} into {}x{}",
        a.rows,
        a.columns,
        b.rows,
        b.columns,
        c.rows,
        c.columns
    );
    if c.rows == 0 || c.columns == 0 {
        return;
    }
    // SAFETY: the constructors checked that every index rows and strides can reach lies inside the slices; c is
    // exclusive. `gemm` computes dst = alpha * dst + beta * lhs * rhs.
    unsafe {
        gemm::gemm(
            c.rows,
            c.columns,
            a.columns,
            c.data,
            1,
            c.row_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            if accumulate { 1.0 } else { 0.0 },
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use common::rng::CounterRng;

    fn random(len: usize, key: u64) -> Vec<f32> {
        let mut rng = CounterRng::new(key, &[]);
        (0..len).map(|_| rng.normal() as f32).collect()
    }

    fn plain(a: &[f32], b: &[f32], m: usize, k: usize, n: usize) -> Vec<f64> {
        let mut c = vec![0.0; m * n];
        for i in 0..m {
            for j in 0..n {
                for l in 0..k {
                    c[i * n + j] += f64::from(a[i * k + l]) * f64::from(b[l * n + j]);
                }
            }
        }
        c
    }

    fn in_pool<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap()
            .install(work)
    }

    #[test]
    fn products_equal_the_plain_sum() {
        for (m, k, n) in [(1, 7, 5), (3, 64, 1), (33, 100, 70), (5, 1, 9)] {
            let (a, b) = (random(m * k, 1), random(k * n, 2));
            let mut c = vec![1.0; m * n];
            multiply(
                &mut MatrixMut::new(&mut c, m, n),
                true,
                2.0,
                Matrix::new(&a, m, k),
                Matrix::new(&b, k, n),
                Parallelism::None,
            );
            for (c, expected) in c.iter().zip(plain(&a, &b, m, k, n)) {
                assert!((f64::from(*c) - (1.0 + 2.0 * expected)).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn products_of_any_shape_have_the_same_bits_for_any_number_of_threads() {
        let mut rng = CounterRng::new(8, &[]);
        let sizes = [1, 2, 3, 16, 17, 48, 64, 200, 333];
        for _ in 0..60 {
            let mut size = || sizes[rng.below(sizes.len() as u64) as usize];
            let (m, n, k) = (size(), size(), size() * 4);
            let (a, b) = (random(m * k, 1), random(k * n, 2));
            for layout in 0..4 {
                let run = |threads| {
                    in_pool(threads, || {
                        let mut c = vec![1.0; m * n];
                        let a = match layout & 1 {
                            0 => Matrix::new(&a, m, k),
                            _ => Matrix::new(&a, k, m).transposed(),
                        };
                        let b = match layout & 2 {
                            0 => Matrix::new(&b, k, n),
                            _ => Matrix::new(&b, n, k).transposed(),
                        };
                        let mut target = MatrixMut::new(&mut c, m, n);
                        multiply(&mut target, true, 0.5, a, b, all_threads());
                        c
                    })
                };
                let expected = run(1);
                for threads in [2, 3, 5] {
                    assert_eq!(run(threads), expected, "{m}x{n}x{k}, layout {layout}");
                }
            }
        }
    }
}
