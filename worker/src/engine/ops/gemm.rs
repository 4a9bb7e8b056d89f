//! Matrix products: the one door to the `gemm` crate, and the place for kernels of our own (bfloat16 instructions).
//!
//! In: float32 activations, float32 or bfloat16 weights. Out: float32. The same bits for any number of threads: `gemm`
//! splits rows and columns but never the sum, and the tiles here are fixed. Against bfloat16 weights the activations
//! are rounded to bfloat16 where the processor multiplies such pairs (`avx512_bf16`); elsewhere the weights
//! are widened tile by tile ([`super::widened`]). They never stand in memory as float32 as a whole.

use std::marker::PhantomData;

use gemm::Parallelism;
use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::avx512_bf16;
use super::widened;

/// A read-only matrix of any strides.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major and dense.
    pub fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns)
    }

    /// Row-major, `stride` elements from row to row.
    pub fn strided(data: &'a [f32], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(
            rows == 0 || columns == 0 || (rows - 1) * stride + columns <= data.len(),
            "a matrix outside its slice"
        );
        Self {
            data,
            rows,
            columns,
            row_stride: stride,
            column_stride: 1,
        }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    /// A row of a row-major matrix.
    pub fn row(&self, row: usize) -> &'a [f32] {
        assert!(
            self.column_stride == 1 && row < self.rows,
            "a row outside the matrix"
        );
        &self.data[row * self.row_stride..][..self.columns]
    }

    /// Columns `first..first + count` of a row-major matrix.
    pub fn columns_part(self, first: usize, count: usize) -> Self {
        assert!(
            self.column_stride == 1 && first + count <= self.columns,
            "columns outside the matrix"
        );
        Self {
            data: &self.data[first.min(self.data.len())..],
            columns: count,
            ..self
        }
    }

    pub fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// A row-major matrix to write to. Several of them may cover disjoint columns of one buffer.
pub struct MatrixMut<'a> {
    data: *mut f32,
    rows: usize,
    columns: usize,
    row_stride: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: a MatrixMut is an exclusive borrow of the elements it covers, as `&mut [f32]` is.
unsafe impl Send for MatrixMut<'_> {}
// SAFETY: shared references to it read nothing.
unsafe impl Sync for MatrixMut<'_> {}

impl<'a> MatrixMut<'a> {
    /// Row-major and dense.
    pub fn new(data: &'a mut [f32], rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns)
    }

    pub fn strided(data: &'a mut [f32], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(
            rows == 0 || columns == 0 || (rows - 1) * stride + columns <= data.len(),
            "a matrix outside its slice"
        );
        Self {
            data: data.as_mut_ptr(),
            rows,
            columns,
            row_stride: stride,
            lifetime: PhantomData,
        }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn columns_count(&self) -> usize {
        self.columns
    }

    /// Elements from row to row.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    pub fn as_mut_ptr(&mut self) -> *mut f32 {
        self.data
    }

    /// Columns `first..first + count`.
    pub fn columns(&mut self, first: usize, count: usize) -> MatrixMut<'_> {
        // SAFETY: the exclusive borrow of self covers the part.
        unsafe { self.columns_unchecked(first, count) }
    }

    /// # Safety
    /// No two parts that live at the same time may overlap.
    pub(super) unsafe fn columns_unchecked(&self, first: usize, count: usize) -> MatrixMut<'_> {
        assert!(first + count <= self.columns, "columns outside the matrix");
        MatrixMut {
            data: self.data.wrapping_add(first),
            columns: count,
            lifetime: PhantomData,
            ..*self
        }
    }
}

/// A buffer that tasks write to at places that do not overlap.
pub struct Shared<'a> {
    data: *mut f32,
    len: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: access is only through the unsafe methods, whose callers keep the parts apart.
unsafe impl Sync for Shared<'_> {}
// SAFETY: as above.
unsafe impl Send for Shared<'_> {}

impl<'a> Shared<'a> {
    pub fn new(data: &'a mut [f32]) -> Self {
        Self {
            data: data.as_mut_ptr(),
            len: data.len(),
            lifetime: PhantomData,
        }
    }

    /// # Safety
    /// No two parts that live at the same time may overlap.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, start: usize, len: usize) -> &mut [f32] {
        assert!(start + len <= self.len, "a part outside its buffer");
        // SAFETY: in bounds as asserted; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }

    /// # Safety
    /// No two parts that live at the same time may overlap.
    pub unsafe fn matrix(
        &self,
        start: usize,
        rows: usize,
        columns: usize,
        row_stride: usize,
    ) -> MatrixMut<'_> {
        assert!(
            rows == 0 || columns == 0 || start + (rows - 1) * row_stride + columns <= self.len,
            "a part outside its buffer"
        );
        MatrixMut {
            data: self.data.wrapping_add(start),
            rows,
            columns,
            row_stride,
            lifetime: PhantomData,
        }
    }
}

/// A weight matrix as it lies in memory, row-major `[out, in]`.
#[derive(Clone, Copy)]
pub enum WeightSlice<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl WeightSlice<'_> {
    /// Row `row` of a matrix `columns` wide, as float32.
    pub fn copy_row(&self, row: usize, columns: usize, out: &mut [f32]) {
        let range = row * columns..(row + 1) * columns;
        match self {
            Self::F32(data) => out.copy_from_slice(&data[range]),
            Self::Bf16(data) => widened::widen(&data[range], out),
        }
    }
}

/// On all threads of the pool this runs in.
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

/// `y (+)= x Wᵀ` with W `[out, in]`: a linear layer forward.
pub fn multiply_by_transposed_weight(
    y: &mut MatrixMut,
    accumulate: bool,
    x: Matrix,
    weight: WeightSlice,
) {
    let (out, depth) = (y.columns, x.columns);
    match weight {
        WeightSlice::F32(data) => {
            let weight = Matrix::new(data, out, depth).transposed();
            multiply(y, accumulate, 1.0, x, weight, all_threads());
        }
        #[cfg(target_arch = "x86_64")]
        WeightSlice::Bf16(data) if avx512_bf16::is_supported() => {
            let weights = avx512_bf16::Weights {
                data,
                rows: out,
                columns: depth,
            };
            avx512_bf16::multiply(y, accumulate, x, weights, avx512_bf16::Along::Columns);
        }
        WeightSlice::Bf16(data) => widened::multiply_by_transposed(y, accumulate, x, data),
    }
}

/// `dx (+)= dy W` with W `[out, in]`: a linear layer backward.
pub fn multiply_by_weight(dx: &mut MatrixMut, accumulate: bool, dy: Matrix, weight: WeightSlice) {
    let (depth, width) = (dy.columns, dx.columns);
    match weight {
        WeightSlice::F32(data) => {
            let weight = Matrix::new(data, depth, width);
            multiply(dx, accumulate, 1.0, dy, weight, all_threads());
        }
        #[cfg(target_arch = "x86_64")]
        WeightSlice::Bf16(data) if avx512_bf16::is_supported() => {
            let weights = avx512_bf16::Weights {
                data,
                rows: depth,
                columns: width,
            };
            avx512_bf16::multiply(dx, accumulate, dy, weights, avx512_bf16::Along::Rows);
        }
        WeightSlice::Bf16(data) => widened::multiply_by(dx, accumulate, dy, data),
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
    fn any_number_of_threads_gives_the_same_bits() {
        let (n, out, depth) = (67, 530, 300);
        let (x, dy) = (random(n * depth, 3), random(n * out, 4));
        let wide = random(out * depth, 5);
        let narrow: Vec<bf16> = wide.iter().map(|w| bf16::from_f32(*w)).collect();
        let run = |threads, weight: WeightSlice| {
            in_pool(threads, || {
                let (mut y, mut dx) = (vec![0.0; n * out], vec![0.0; n * depth]);
                let x = Matrix::new(&x, n, depth);
                multiply_by_transposed_weight(
                    &mut MatrixMut::new(&mut y, n, out),
                    false,
                    x,
                    weight,
                );
                let dy = Matrix::new(&dy, n, out);
                multiply_by_weight(&mut MatrixMut::new(&mut dx, n, depth), false, dy, weight);
                (y, dx)
            })
        };
        for weight in [WeightSlice::F32(&wide), WeightSlice::Bf16(&narrow)] {
            let expected = run(1, weight);
            assert_eq!(run(2, weight), expected);
            assert_eq!(run(3, weight), expected);
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

    #[test]
    fn a_bfloat16_weight_counts_as_its_widened_self() {
        let (n, out, depth) = (9, 600, 40);
        // Exact in bfloat16, so that rounding the input changes nothing.
        let x: Vec<f32> = random(n * depth, 6)
            .iter()
            .map(|x| bf16::from_f32(*x).to_f32())
            .collect();
        let narrow: Vec<bf16> = random(out * depth, 7)
            .iter()
            .map(|w| bf16::from_f32(*w))
            .collect();
        let wide: Vec<f32> = narrow.iter().map(|w| w.to_f32()).collect();
        let run = |weight| {
            let mut y = vec![0.0; n * out];
            let x = Matrix::new(&x, n, depth);
            multiply_by_transposed_weight(&mut MatrixMut::new(&mut y, n, out), false, x, weight);
            y
        };
        let (a, b) = (
            run(WeightSlice::Bf16(&narrow)),
            run(WeightSlice::F32(&wide)),
        );
        for (a, b) in a.iter().zip(&b) {
            assert!((a - b).abs() < 1e-4);
        }
    }
}
