//! Products equal the plain sum, whatever their shapes and threads.

use super::*;
use crate::engine::ops::nf4::Nf4View;
use crate::engine::testing::{in_pool, random_values};
use common::nf4::Nf4;
use half::bf16;

struct Case {
    rows: usize,
    /// Of the two parts.
    widths: [usize; 2],
    /// Of the terms of each part.
    sums: Vec<usize>,
}

struct Factors<E> {
    a: Vec<Vec<E>>,
    w: Vec<Vec<E>>,
    bias: Vec<f32>,
}

const PAD: usize = 3;

impl Case {
    fn factors<E: Element>(&self) -> Factors<E> {
        let random = |len, key| {
            let values = random_values(len, key);
            values.into_iter().map(E::round_from).collect::<Vec<E>>()
        };
        let width: usize = self.widths.iter().sum();
        let sums = || self.sums.iter().enumerate();
        Factors {
            a: sums()
                .map(|(i, sum)| random(self.rows * (sum + PAD), 2 * i as u64))
                .collect(),
            w: sums()
                .map(|(i, sum)| random((width + PAD) * (sum + PAD), 2 * i as u64 + 1))
                .collect(),
            bias: random_values(self.widths[1], 99),
        }
    }

    fn parts<'a, E>(&self, factors: &'a Factors<E>, along: Along) -> Vec<Part<'a, E>> {
        let part = |first: usize, width: usize, start| Part {
            first,
            start,
            terms: (self.sums.iter().zip(&factors.a).zip(&factors.w))
                .map(|((&sum, a), w)| Term {
                    a: View::strided(a, self.rows, sum, sum + PAD),
                    w: match along {
                        Along::Columns => {
                            View::strided(&w[first * (sum + PAD)..], width, sum, sum + PAD).into()
                        }
                        Along::Rows => {
                            let stride = self.widths[0] + self.widths[1] + PAD;
                            View::strided(&w[first..], sum, width, stride).into()
                        }
                    },
                    along,
                })
                .collect(),
        };
        let bias = Start::Row(&factors.bias);
        vec![
            part(0, self.widths[0], Start::Zero),
            part(self.widths[0], self.widths[1], bias),
        ]
    }

    fn plain<E: Element>(&self, factors: &Factors<E>, along: Along) -> Vec<f64> {
        let parts = self.parts(factors, along);
        let columns = parts
            .iter()
            .flat_map(|part| (0..part.width()).map(move |column| (part, column)));
        let columns: Vec<_> = columns.collect();
        (0..self.rows)
            .flat_map(|row| columns.iter().map(move |column| (row, column)))
            .map(|(row, (part, column))| {
                let start = match part.start {
                    Start::Row(bias) => f64::from(bias[*column]),
                    _ => 0.0,
                };
                let products = part.terms.iter().flat_map(|term| {
                    let Weights::Dense(w) = term.w else {
                        panic!("weights of 4 bits");
                    };
                    (0..term.sum()).map(move |i| {
                        let w = match along {
                            Along::Columns => w.row(*column)[i],
                            Along::Rows => w.row(i)[*column],
                        };
                        f64::from(term.a.row(row)[i].wide()) * f64::from(w.wide())
                    })
                });
                start + products.sum::<f64>()
            })
            .collect()
    }

    fn check<E: Element>(&self) {
        type Run<E> = fn(Target, &[Part<E>]);
        for along in [Along::Columns, Along::Rows] {
            let factors = self.factors::<E>();
            let expected = self.plain(&factors, along);
            for run in [product::<E> as Run<E>, portable::product::<E> as Run<E>] {
                let width: usize = self.widths.iter().sum();
                let run = |threads| {
                    let parts = self.parts(&factors, along);
                    let (mut wide, mut narrow) = (
                        vec![f32::NAN; self.rows * width],
                        vec![bf16::NAN; self.rows * width],
                    );
                    in_pool(threads, || {
                        run(Target::new(&mut wide, self.rows, width), &parts);
                        run(Target::new(&mut narrow, self.rows, width), &parts);
                    });
                    (wide, narrow)
                };
                let (wide, narrow) = run(1);
                assert_eq!(run(3), (wide.clone(), narrow.clone()));
                for ((found, narrow), expected) in wide.iter().zip(&narrow).zip(&expected) {
                    assert!(
                        (f64::from(*found) - expected).abs() < 2e-4,
                        "{found} {expected}"
                    );
                    assert_eq!(*narrow, bf16::from_f32(*found));
                }
            }
        }
    }
}

#[test]
fn products_equal_the_plain_sum_for_any_number_of_threads() {
    for (rows, widths, sums) in [
        (1, [1, 1], vec![1]),
        (7, [65, 33], vec![33, 2]),
        (13, [130, 3], vec![300, 16]),
        (5, [48, 70], vec![257, 3, 130]),
        (150, [20, 16], vec![64]),
        (700, [5, 300], vec![40, 4]),
    ] {
        let case = Case { rows, widths, sums };
        case.check::<f32>();
        case.check::<bf16>();
    }
}

/// Weights of 4 bits in a product with a bias and an adapter's term, and the same weights widened before.
fn check_four_bits<E: Element>(rows: usize, (height, columns): (usize, usize)) {
    type Run<E> = fn(Target, &[Part<E>]);
    let scalars = random_values(height * columns, 5);
    let matrix = Nf4::quantise(&scalars, true).unwrap();
    let four_bits = Nf4View::new(&matrix, height, columns);
    let mut widened = vec![E::zeroed(); scalars.len()];
    for (row, out) in widened.chunks_exact_mut(columns).enumerate() {
        four_bits.widen(row, 0, out);
    }
    let dense = View::new(&widened, height, columns);
    let elements = |len, key| random_values(len, key).into_iter().map(E::round_from);
    for along in [Along::Columns, Along::Rows] {
        let (width, sum) = match along {
            Along::Columns => (height, columns),
            Along::Rows => (columns, height),
        };
        let a: Vec<E> = elements(rows * sum, 6).collect();
        let (u, b): (Vec<E>, Vec<E>) = (
            elements(rows * 4, 7).collect(),
            elements(width * 4, 8).collect(),
        );
        let bias = random_values(width, 9);
        let multiply = |run: Run<E>, w: Weights<E>, threads| {
            let term = |a, w, along| Term { a, w, along };
            let adapter = View::new(&b, width, 4).into();
            let part = Part {
                first: 0,
                start: Start::Row(&bias),
                terms: vec![
                    term(View::new(&a, rows, sum), w, along),
                    term(View::new(&u, rows, 4), adapter, Along::Columns),
                ],
            };
            let mut y = vec![f32::NAN; rows * width];
            in_pool(threads, || run(Target::new(&mut y, rows, width), &[part]));
            y
        };
        for run in [product::<E> as Run<E>, portable::product::<E> as Run<E>] {
            let expected = multiply(run, dense.into(), 1);
            for threads in [1, 3] {
                let found = multiply(run, Weights::Nf4(four_bits), threads);
                assert_eq!(
                    found, expected,
                    "{rows} rows, {height}x{columns}, {along:?}"
                );
            }
        }
    }
}

#[test]
fn products_with_weights_of_4_bits_have_the_bits_of_those_with_the_same_weights_widened() {
    for shape in [
        (1, 64),
        (70, 128),
        (200, 192),
        (33, 50),
        (130, 7),
        (64, 320),
        (5, 1000),
    ] {
        for rows in [1, 9, 150] {
            check_four_bits::<f32>(rows, shape);
            check_four_bits::<bf16>(rows, shape);
        }
    }
}

#[test]
fn turned_products_equal_the_plain_sum_for_any_number_of_threads() {
    for (rows, columns, sum) in [(1, 1, 1), (7, 65, 300), (130, 33, 16), (600, 70, 129)] {
        let strides = (rows + PAD, columns + PAD);
        let (a, w) = (
            random_values(sum * strides.0, 1),
            random_values(sum * strides.1, 2),
        );
        let (a, w) = (
            View::strided(&a, sum, rows, strides.0),
            View::strided(&w, sum, columns, strides.1),
        );
        let whole = |threads| {
            let mut c = vec![1.0; rows * columns];
            in_pool(threads, || {
                multiply_turned(MatrixMut::new(&mut c, rows, columns), false, a, w);
                multiply_turned(MatrixMut::new(&mut c, rows, columns), true, a, w);
            });
            c
        };
        let mut small = vec![1.0; rows * columns];
        multiply_small_turned(MatrixMut::new(&mut small, rows, columns), false, a, w);
        multiply_small_turned(MatrixMut::new(&mut small, rows, columns), true, a, w);
        let found = whole(1);
        assert_eq!(whole(3), found);
        for (i, (found, small)) in found.iter().zip(&small).enumerate() {
            let products = (0..sum).map(|k| a.row(k)[i / columns] * w.row(k)[i % columns]);
            let expected = 2.0 * products.map(f64::from).sum::<f64>();
            assert!((f64::from(*found) - expected).abs() < 2e-4);
            assert!((f64::from(*small) - expected).abs() < 2e-4);
        }
    }
}

/// The products of two numbers of bfloat16 are exact in float32.
#[test]
fn turned_products_of_bfloat16_are_those_of_the_widened_factors_for_any_number_of_threads() {
    for (rows, columns, sum) in [(1, 1, 1), (7, 65, 301), (130, 33, 16), (600, 70, 129)] {
        let strides = (rows + PAD, columns + PAD);
        let narrow = |scalars: usize, seed| -> Vec<bf16> {
            let values = random_values(scalars, seed);
            values.into_iter().map(bf16::from_f32).collect()
        };
        let (a, w) = (narrow(sum * strides.0, 1), narrow(sum * strides.1, 2));
        let (a, w) = (
            View::strided(&a, sum, rows, strides.0),
            View::strided(&w, sum, columns, strides.1),
        );
        let whole = |threads| {
            let mut c = vec![1.0; rows * columns];
            in_pool(threads, || {
                multiply_turned(MatrixMut::new(&mut c, rows, columns), false, a, w);
                multiply_turned(MatrixMut::new(&mut c, rows, columns), true, a, w);
            });
            c
        };
        let found = whole(1);
        assert_eq!(whole(3), found);
        for (i, found) in found.iter().enumerate() {
            let products =
                (0..sum).map(|k| a.row(k)[i / columns].to_f64() * w.row(k)[i % columns].to_f64());
            let expected = 2.0 * products.sum::<f64>();
            assert!((f64::from(*found) - expected).abs() < 2e-4);
        }
    }
}

#[test]
fn a_residual_is_what_the_sum_starts_from() {
    let (residual, a, w) = (
        random_values(60, 1),
        random_values(50, 2),
        random_values(30, 3),
    );
    let mut y = vec![f32::NAN; 60];
    let term = Term {
        a: View::new(&a, 10, 5),
        w: View::new(&w, 6, 5).into(),
        along: Along::Columns,
    };
    let part = Part {
        first: 0,
        start: Start::Rows(&residual),
        terms: vec![term],
    };
    product(Target::new(&mut y, 10, 6), &[part]);
    for (i, y) in y.iter().enumerate() {
        let dot: f32 = (0..5).map(|k| a[i / 6 * 5 + k] * w[i % 6 * 5 + k]).sum();
        assert!((y - residual[i] - dot).abs() < 1e-5);
    }
}
