//! Matrices as products see them: where their elements lie, and what a product is made of. Nothing is computed here.

use std::marker::PhantomData;

use super::element::Element;
use super::nf4::Nf4View;

/// A read-only row-major matrix.
#[derive(Clone, Copy)]
pub struct View<'a, E> {
    pub data: &'a [E],
    pub rows: usize,
    pub columns: usize,
    /// Number of elements from row to row.
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

    /// View of the columns `first..first + count`.
    pub fn part(self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.columns, "columns outside the matrix");
        Self {
            data: &self.data[first.min(self.data.len())..],
            columns: count,
            ..self
        }
    }

    /// A view like this of other elements, which lie without gaps.
    pub fn of(self, data: &'a [E]) -> Self {
        Self::new(data, self.rows, self.columns)
    }

    /// This view as one of float32 elements, which they must be.
    pub fn wide(self) -> View<'a, f32>
    where
        E: Element,
    {
        let data = E::as_f32(self.data).expect("elements that are float32, or were widened");
        View::strided(data, self.rows, self.columns, self.stride)
    }

    pub fn row(&self, row: usize) -> &'a [E] {
        &self.data[row * self.stride..][..self.columns]
    }
}

/// The weights of a product: as they are multiplied, or in 4 bits and widened while they are packed.
#[derive(Clone, Copy)]
pub enum Weights<'a, E> {
    Dense(View<'a, E>),
    Nf4(Nf4View<'a>),
}

impl<E> Weights<'_, E> {
    pub fn rows(&self) -> usize {
        match self {
            Self::Dense(view) => view.rows,
            Self::Nf4(view) => view.rows,
        }
    }

    pub fn columns(&self) -> usize {
        match self {
            Self::Dense(view) => view.columns,
            Self::Nf4(view) => view.columns,
        }
    }
}

impl<'a, E> From<View<'a, E>> for Weights<'a, E> {
    fn from(view: View<'a, E>) -> Self {
        Self::Dense(view)
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
    pub w: Weights<'a, E>,
    pub along: Along,
}

impl<E> Term<'_, E> {
    pub(super) fn sum(&self) -> usize {
        match self.along {
            Along::Columns => self.w.columns(),
            Along::Rows => self.w.rows(),
        }
    }

    pub(super) fn width(&self) -> usize {
        match self.along {
            Along::Columns => self.w.rows(),
            Along::Rows => self.w.columns(),
        }
    }
}

/// What the sums of a product start from.
#[derive(Clone, Copy)]
pub enum Start<'a> {
    Zero,
    /// The same values for each row: a bias.
    Row(&'a [f32]),
    /// A residual of the target's shape.
    Rows(&'a [f32]),
}

/// Columns of the target from `first` on, which become the sum of the terms.
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

    /// The same matrix, for a shorter time.
    pub fn reborrow(&mut self) -> Target<'_> {
        Target {
            data: match &mut self.data {
                Data::F32(data) => Data::F32(data),
                Data::Bf16(data) => Data::Bf16(data),
            },
            rows: self.rows,
            columns: self.columns,
        }
    }
}

/// A row-major matrix to write to. Several of them may cover disjoint columns of one buffer.
pub struct MatrixMut<'a> {
    pub(super) data: *mut f32,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) row_stride: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: a MatrixMut is an exclusive borrow of the elements it covers, as `&mut [f32]` is.
unsafe impl Send for MatrixMut<'_> {}
// SAFETY: shared references to it read nothing.
unsafe impl Sync for MatrixMut<'_> {}

impl<'a> MatrixMut<'a> {
    /// A row-major matrix without gaps between its rows.
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
}

/// A buffer that tasks write to at places that do not overlap.
pub struct Shared<'a, T> {
    data: *mut T,
    len: usize,
    lifetime: PhantomData<&'a mut [T]>,
}

// SAFETY: access is only through the unsafe methods, whose callers keep the parts apart.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub fn new(data: &'a mut [T]) -> Self {
        Self {
            data: data.as_mut_ptr(),
            len: data.len(),
            lifetime: PhantomData,
        }
    }

    /// # Safety
    /// No two parts that live at the same time may overlap.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start + len <= self.len, "a part outside its buffer");
        // SAFETY: in bounds as asserted; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }
}

impl Shared<'_, f32> {
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
