//! Products equal the plain sum, whatever their shapes and threads.

use super::*;
use crate::engine::ops::nf4::Nf4View;
use crate::engine::testing::{in_pool, random_values};
use common::nf4::Nf4;
use half::bf16;

/// Those that this processor has.
fn sets() -> impl Iterator<Item = InstructionSet> {
    InstructionSet::ALL.into_iter().filter(|set| set.is_there())
}

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
        for along in [Along::Columns, Along::Rows] {
            let factors = self.factors::<E>();
            let expected = self.plain(&factors, along);
            for set in sets() {
                let run = |target: Target, parts: &[Part<E>]| product_with(set, target, parts);
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
        let multiply = |set, w: Weights<E>, threads| {
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
            let target = Target::new(&mut y, rows, width);
            in_pool(threads, || product_with(set, target, &[part]));
            y
        };
        for set in sets() {
            let expected = multiply(set, dense.into(), 1);
            for threads in [1, 3] {
                let found = multiply(set, Weights::Nf4(four_bits), threads);
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

/// Numbers of every kind: usual ones, zeros of both signs, those below the normal ones, huge ones, infinities, and no numbers.
fn of_every_kind<E: Element>(len: usize, seed: u64, share: u64) -> Vec<E> {
    let mut rng = common::rng::CounterRng::new(seed, &[]);
    let draw = |_| {
        let usual = rng.normal() as f32;
        let special = match rng.below(12 * share) {
            0 => 0.0,
            1 => -0.0,
            2 => usual * 1e-39,
            3 => usual * 1e-20,
            4 => usual * 1e-38,
            5 => usual * 1e30,
            6 if rng.below(8) == 0 => f32::INFINITY,
            7 if rng.below(8) == 0 => f32::NEG_INFINITY,
            8 if rng.below(8) == 0 => f32::NAN,
            _ => usual,
        };
        E::round_from(special)
    };
    (0..len).map(draw).collect()
}

/// `a b + sum` of the products of bfloat16: what would be below the normal numbers, had it been rounded to as many places, is zero.
fn flushing(a: f32, b: f32, sum: f32) -> f32 {
    let flushed = |x: f32| match x.is_subnormal() {
        true => 0f32.copysign(x),
        false => x,
    };
    let [a, b, sum] = [a, b, sum].map(flushed);
    let result = a.mul_add(b, sum);
    // Far above the border nothing of this matters; below, a power of two leads there without rounding.
    const FAR: f32 = 1e-30;
    if !(result.abs() < FAR && sum.abs() < FAR) {
        return flushed(result);
    }
    let up = 2f32.powi(40);
    match (a * up).mul_add(b * up, sum * up * up).abs() < f32::MIN_POSITIVE * up * up {
        true => 0f32.copysign(result),
        false => result,
    }
}

/// The sum of an element as it is defined.
fn chain<E: Element>(start: f32, products: impl Iterator<Item = (E, E)>) -> f32 {
    let mut products: Vec<(f32, f32)> = products.map(|(a, w)| (a.wide(), w.wide())).collect();
    if size_of::<E>() == size_of::<f32>() {
        let products = products.into_iter();
        return products.fold(start, |sum, (a, w)| a.mul_add(w, sum));
    }
    if products.len() % 2 == 1 {
        products.push((0.0, 0.0));
    }
    products
        .chunks_exact_mut(2)
        .for_each(|pair| pair.swap(0, 1));
    let products = products.into_iter();
    products.fold(start, |sum, (a, w)| flushing(a, w, sum))
}

/// Sums at the border of the normal numbers, on both sides of where rounding takes them across it.
#[test]
fn products_of_bfloat16_below_the_normal_numbers_are_zero_with_every_set_of_instructions() {
    let half = bf16::from_f32(2f32.powi(-75));
    for (exponent, expected) in [(-75, 0.0), (-77, f32::MIN_POSITIVE)] {
        let (a, w) = (
            [half, bf16::ZERO],
            [-bf16::from_f32(2f32.powi(exponent)), bf16::ZERO],
        );
        for set in sets() {
            let part = Part {
                first: 0,
                start: Start::Rows(&[f32::MIN_POSITIVE]),
                terms: vec![Term {
                    a: View::new(&a, 1, 2),
                    w: View::new(&w, 1, 2).into(),
                    along: Along::Columns,
                }],
            };
            let mut y = [1.0f32];
            product_with(set, Target::new(&mut y, 1, 1), &[part]);
            assert_eq!(y[0], expected, "{set:?}, 2^{exponent}");
        }
    }
}

fn check_definition<E: Element>(share: u64) {
    let bits = |x: f32| match x.is_nan() {
        // Which of them it is, is no matter.
        true => f32::NAN.to_bits(),
        false => x.to_bits(),
    };
    for (rows, width, sum) in [
        (1, 1, 1),
        (13, 70, 33),
        (7, 64, 300),
        (50, 9, 128),
        (3, 130, 131),
    ] {
        let a: Vec<E> = of_every_kind(rows * sum, 1, share);
        let w: Vec<E> = of_every_kind(width * sum, 2, share);
        let starts: Vec<f32> = of_every_kind(rows * width, 3, share);
        for along in [Along::Columns, Along::Rows] {
            let of_w = |k: usize, column: usize| match along {
                Along::Columns => w[column * sum + k],
                Along::Rows => w[k * width + column],
            };
            let expected: Vec<u32> = (0..rows * width)
                .map(|i| {
                    let (row, column) = (i / width, i % width);
                    let products = (0..sum).map(|k| (a[row * sum + k], of_w(k, column)));
                    bits(chain(starts[i], products))
                })
                .collect();
            let view = match along {
                Along::Columns => View::new(&w, width, sum),
                Along::Rows => View::new(&w, sum, width),
            };
            for set in sets() {
                let part = Part {
                    first: 0,
                    start: Start::Rows(&starts),
                    terms: vec![Term {
                        a: View::new(&a, rows, sum),
                        w: view.into(),
                        along,
                    }],
                };
                let mut y = vec![0.0f32; rows * width];
                product_with(set, Target::new(&mut y, rows, width), &[part]);
                let found: Vec<u32> = y.into_iter().map(bits).collect();
                assert_eq!(found, expected, "{set:?}, {rows}x{width}x{sum}, {along:?}");
                // With whatever lies behind the sum where that ends within a word.
                let stride = sum.next_multiple_of(size_of::<f32>() / size_of::<E>());
                let mut padded = vec![E::round_from(7.0); rows * stride];
                for (to, from) in padded.chunks_exact_mut(stride).zip(a.chunks_exact(sum)) {
                    to[..sum].copy_from_slice(from);
                }
                let term = Term {
                    a: View::new(&padded, rows, stride),
                    w: view.into(),
                    along,
                };
                let mut c = starts.clone();
                kernels::multiply_small(set, MatrixMut::new(&mut c, rows, width), true, term);
                let found: Vec<u32> = c.into_iter().map(bits).collect();
                assert_eq!(
                    found, expected,
                    "{set:?}, small, {rows}x{width}x{sum}, {along:?}"
                );
            }
        }
        // The gradient of weights: the first factor lies the other way round.
        let a: Vec<E> = of_every_kind(sum * rows, 4, share);
        let w: Vec<E> = of_every_kind(sum * width, 5, share);
        let expected: Vec<u32> = (0..rows * width)
            .map(|i| {
                let (row, column) = (i / width, i % width);
                let products = (0..sum).map(|k| (a[k * rows + row], w[k * width + column]));
                bits(chain(starts[i], products))
            })
            .collect();
        for set in sets() {
            let mut c = starts.clone();
            let (a, w) = (View::new(&a, sum, rows), View::new(&w, sum, width));
            turned_with(set, MatrixMut::new(&mut c, rows, width), true, a, w);
            let found: Vec<u32> = c.into_iter().map(bits).collect();
            assert_eq!(found, expected, "{set:?}, turned, {rows}x{width}x{sum}");
        }
    }
}

#[test]
fn every_set_of_instructions_gives_the_bits_of_the_definition_for_numbers_of_every_kind() {
    for share in [1, 4, 100] {
        check_definition::<f32>(share);
        check_definition::<bf16>(share);
    }
}
