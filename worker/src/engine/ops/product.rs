//! Products of activations and weights: sums of `a · w` or `a · wᵀ` over any number of terms, several outputs side by
//! side, in one pass.
//!
//! In: factors in float32 or bfloat16. Out: float32 sums, rounded where the target is bfloat16. A LoRA update is a term
//! beside the frozen weight's, so its skinny factors travel with the large product. The sum of an output element runs
//! in one fixed order, whoever computes it: the same bits for any number of threads.

use gemm::Parallelism;

use super::element::Element;
use super::gemm::{MatrixMut, all_threads};
use super::portable;

/// A read-only row-major matrix.
#[derive(Clone, Copy)]
pub struct View<'a, E> {
    pub data: &'a [E],
    pub rows: usize,
    pub columns: usize,
    /// Elements from row to row.
    pub stride: usize,
}

impl<'a, E> View<'a, E> {
    pub fn new(data: &'a [E], rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns)
    }

    pub fn strided(data: &'a [E], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(
            columns <= stride
                && (rows == 0 || columns == 0 || (rows - 1) * stride + columns <= data.len()),
            "a matrix outside its slice"
        );
        Self {
            data,
            rows,
            columns,
            stride,
        }
    }

    /// Columns `first..first + count`.
    pub fn part(self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.columns, "columns outside the matrix");
        Self {
            data: &self.data[first.min(self.data.len())..],
            columns: count,
            ..self
        }
    }

    /// Of float32 elements.
    pub fn wide(self) -> View<'a, f32>
    where
        E: Element,
    {
        let data = E::as_f32(self.data).expect("what is trained as a whole is float32");
        View::strided(data, self.rows, self.columns, self.stride)
    }

    pub fn row(&self, row: usize) -> &'a [E] {
        &self.data[row * self.stride..][..self.columns]
    }
}

/// Which side of the weights the sum runs along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Along {
    /// `a · wᵀ`, w `[out, sum]`: a linear layer's forward pass.
    Columns,
    /// `a · w`, w `[sum, out]`: its input gradient.
    Rows,
}

/// One product of the sum. `a` is `[rows of the target, sum]`.
#[derive(Clone, Copy)]
pub struct Term<'a, E> {
    pub a: View<'a, E>,
    pub w: View<'a, E>,
    pub along: Along,
}

impl<E> Term<'_, E> {
    pub(super) fn sum(&self) -> usize {
        match self.along {
            Along::Columns => self.w.columns,
            Along::Rows => self.w.rows,
        }
    }

    pub(super) fn width(&self) -> usize {
        match self.along {
            Along::Columns => self.w.rows,
            Along::Rows => self.w.columns,
        }
    }
}

/// What the sums start from.
#[derive(Clone, Copy)]
pub enum Start<'a> {
    Zero,
    /// The same for each row: a bias.
    Row(&'a [f32]),
    /// A residual of the target's shape.
    Rows(&'a [f32]),
}

/// Columns `first..` of the target: the sum of the terms.
pub struct Part<'a, E> {
    pub first: usize,
    pub start: Start<'a>,
    pub terms: Vec<Term<'a, E>>,
}

impl<E> Part<'_, E> {
    pub(super) fn width(&self) -> usize {
        self.terms.first().map_or(0, Term::width)
    }
}

/// A row-major matrix to write to.
pub struct Target<'a> {
    pub(super) data: Data<'a>,
    pub(super) rows: usize,
    pub(super) columns: usize,
}

pub(super) enum Data<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [half::bf16]),
}

impl<'a> Target<'a> {
    pub fn new<E: Element>(data: &'a mut [E], rows: usize, columns: usize) -> Self {
        assert!(data.len() >= rows * columns, "a matrix outside its slice");
        let narrow = size_of::<E>() == size_of::<half::bf16>();
        Self {
            data: match narrow {
                true => Data::Bf16(bytemuck::cast_slice_mut(data)),
                false => Data::F32(bytemuck::cast_slice_mut(data)),
            },
            rows,
            columns,
        }
    }
}

/// Fills the parts' columns of the target.
pub fn product<E: Element>(target: Target, parts: &[Part<E>]) {
    for part in parts {
        check(&target, part);
    }
    if target.rows == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if super::avx512::is_supported::<E>() {
        return super::avx512::product(target, parts);
    }
    portable::product(target, parts);
}

/// `target = a · wᵀ` or `a · w`
pub fn multiply<E: Element>(target: Target, a: View<E>, w: View<E>, along: Along) {
    let part = Part {
        first: 0,
        start: Start::Zero,
        terms: vec![Term { a, w, along }],
    };
    product(target, &[part]);
}

/// `c = a · wᵀ` or `a · w`, or with `add` what `c` holds more: a small product, on the calling thread alone. The sum of an
/// element runs in the same order as in [`product`].
///
/// Where the sum ends within a word of 32 bits, `a` has one column more, of any finite numbers: nothing is copied then.
pub fn multiply_small<E: Element>(c: MatrixMut, add: bool, term: Term<E>) {
    let per_word = size_of::<u32>() / size_of::<E>();
    assert!(
        (c.rows, c.columns) == (term.a.rows, term.width())
            && term.a.columns == term.sum().next_multiple_of(per_word),
        "a product of {}x{} and {}x{} ({:?}) into {}x{}",
        term.a.rows,
        term.a.columns,
        term.w.rows,
        term.w.columns,
        term.along,
        c.rows,
        c.columns
    );
    if c.rows == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if super::avx512::is_supported::<E>() {
        return super::avx512::multiply_small(c, add, term);
    }
    portable::multiply_small(c, add, term);
}

/// `c = aᵀ · w`, or with `add` what `c` holds more, on all threads: the gradient of weights, from that of what they
/// give, `a` `[sum, rows of c]`, and what they read, `w` `[sum, columns of c]`.
pub fn multiply_turned(c: MatrixMut, add: bool, a: View<f32>, w: View<f32>) {
    check_turned(&c, a, w);
    if c.rows == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if super::avx512::is_supported::<f32>() {
        return super::avx512::multiply_turned(c, add, a, w);
    }
    portable::multiply_turned(c, add, a, w, all_threads());
}

/// [`multiply_turned`] of a small product, on the calling thread alone.
pub fn multiply_small_turned(c: MatrixMut, add: bool, a: View<f32>, w: View<f32>) {
    check_turned(&c, a, w);
    if c.rows == 0 {
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if super::avx512::is_supported::<f32>() {
        return super::avx512::multiply_small_turned(c, add, a, w);
    }
    portable::multiply_turned(c, add, a, w, Parallelism::None);
}

fn check_turned(c: &MatrixMut, a: View<f32>, w: View<f32>) {
    assert!(
        (c.rows, c.columns, a.rows) == (a.columns, w.columns, w.rows) && a.rows > 0,
        "a product of {}x{} turned and {}x{} into {}x{}",
        a.rows,
        a.columns,
        w.rows,
        w.columns,
        c.rows,
        c.columns
    );
}

fn check<E>(target: &Target, part: &Part<E>) {
    let width = part.width();
    assert!(
        part.first + width <= target.columns,
        "a product outside its target"
    );
    for term in &part.terms {
        assert!(
            term.width() == width && term.a.rows == target.rows && term.a.columns == term.sum(),
            "a product of {}x{} and {}x{} ({:?}) into {}x{width}",
            term.a.rows,
            term.a.columns,
            term.w.rows,
            term.w.columns,
            term.along,
            target.rows
        );
    }
    match part.start {
        Start::Zero => {}
        Start::Row(row) => assert_eq!(row.len(), width, "a bias of another width"),
        Start::Rows(rows) => assert!(
            part.first == 0 && width == target.columns && rows.len() == target.rows * width,
            "a residual of another shape"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::testing::{in_pool, random_values};
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
                values.into_iter().map(E::narrow).collect::<Vec<E>>()
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
                                View::strided(&w[first * (sum + PAD)..], width, sum, sum + PAD)
                            }
                            Along::Rows => {
                                let stride = self.widths[0] + self.widths[1] + PAD;
                                View::strided(&w[first..], sum, width, stride)
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
                        (0..term.sum()).map(move |i| {
                            let w = match along {
                                Along::Columns => term.w.row(*column)[i],
                                Along::Rows => term.w.row(i)[*column],
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
            w: View::new(&w, 6, 5),
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
}
