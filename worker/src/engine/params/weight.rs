//! A weight as ops take it, open for reading, and the hand-over of its gradient.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use common::files::FlatWeights;
use common::job::BaseDtype;
use common::memory::processor::SUMS_TILE;
use common::nf4::Nf4;
use half::bf16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::columns::Columns;
use super::gradients::{Gradients, Sink};
use crate::engine::buffer::Buffer;
use crate::engine::ops::add_in_place;
use crate::engine::ops::element::{Element, WeightSlice};
use crate::engine::ops::matrix::{View, Weights};
use crate::engine::ops::nf4::Nf4View;

/// A weight tensor, row-major, in float32, or where it is frozen in bfloat16 or 4 bits.
#[derive(Clone)]
pub struct Weight {
    pub(super) shape: Vec<usize>,
    pub(super) store: Store,
}

#[derive(Clone)]
pub(super) enum Store {
    F32(Arc<Buffer<f32>>),
    Bf16(Arc<Buffer<bf16>>),
    Nf4(Arc<Nf4>),
    Trainable(GradientSlot),
}

/// A trainable tensor's place in the flat weights, and where its gradient goes.
#[derive(Clone)]
pub(super) struct GradientSlot {
    pub(super) flat: Arc<RwLock<FlatWeights>>,
    pub(super) version: Arc<AtomicU64>,
    pub(super) range: Range<usize>,
    /// What the flat weights are kept in.
    pub(super) dtype: BaseDtype,
    /// Which of the tensor's columns it has, where these are not all.
    pub(super) columns: Option<Columns>,
    pub(super) gradients: Gradients,
    pub(super) index: usize,
    /// Which of the parts that are handed out it is.
    pub(super) part: usize,
}

/// A weight open for reading: no update happens meanwhile.
pub enum Reading<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    Nf4(&'a Nf4),
    Trainable(RwLockReadGuard<'a, FlatWeights>, Range<usize>),
    /// Some columns, in a copy.
    Columns(Arc<Vec<f32>>, Range<usize>),
}

/// A [`Reading`] of a weight in float32: as it is, or a widened copy of one that is trained in bfloat16.
pub enum ReadingF32<'a> {
    Own(Reading<'a>),
    Widened(Vec<f32>),
}

impl Weight {
    /// A weight that training leaves as it is. Its gradient is never computed.
    pub fn frozen_f32(values: Buffer<f32>, shape: &[usize]) -> Self {
        assert_eq!(
            values.len(),
            shape.iter().product::<usize>(),
            "weights of {shape:?}"
        );
        Self {
            shape: shape.to_vec(),
            store: Store::F32(Arc::new(values)),
        }
    }

    pub fn frozen_bf16(values: Buffer<bf16>, shape: &[usize]) -> Self {
        assert_eq!(
            values.len(),
            shape.iter().product::<usize>(),
            "weights of {shape:?}"
        );
        Self {
            shape: shape.to_vec(),
            store: Store::Bf16(Arc::new(values)),
        }
    }

    /// A frozen matrix of 4 bits a scalar.
    pub fn frozen_nf4(matrix: Nf4, shape: &[usize]) -> Self {
        assert_eq!(
            matrix.scalars(),
            shape.iter().product::<usize>(),
            "weights of {shape:?}"
        );
        Self {
            shape: shape.to_vec(),
            store: Store::Nf4(Arc::new(matrix)),
        }
    }

    pub fn dims(&self) -> &[usize] {
        &self.shape
    }

    /// Number of scalars.
    pub fn scalars(&self) -> usize {
        self.shape.iter().product()
    }

    /// Rows and columns of a matrix.
    pub fn matrix_dims(&self) -> (usize, usize) {
        match self.shape[..] {
            [rows, columns] => (rows, columns),
            _ => panic!("a weight of shape {:?} where a matrix is due", self.shape),
        }
    }

    pub fn is_trainable(&self) -> bool {
        matches!(self.store, Store::Trainable(_))
    }

    pub fn is_bf16(&self) -> bool {
        match &self.store {
            Store::Bf16(_) => true,
            Store::Trainable(slot) => slot.dtype == BaseDtype::Bfloat16,
            Store::F32(_) | Store::Nf4(_) => false,
        }
    }

    pub fn read(&self) -> Reading<'_> {
        match &self.store {
            Store::F32(values) => Reading::F32(values),
            Store::Bf16(values) => Reading::Bf16(values),
            Store::Nf4(matrix) => Reading::Nf4(matrix),
            Store::Trainable(slot) => {
                // What is read is no older.
                let version = slot.version.load(Ordering::Acquire);
                // A panic in an update ends the trainer; what is read then matters to nobody.
                let flat = slot.flat.read().unwrap_or_else(PoisonError::into_inner);
                let Some(Columns { part, dealt }) = &slot.columns else {
                    return Reading::Trainable(flat, slot.range.clone());
                };
                let scalars = dealt.deal.scalars();
                let copy = match &*flat {
                    FlatWeights::Float32(flat) => dealt.apart(version, &flat[slot.range.clone()]),
                    FlatWeights::Bfloat16(_) => {
                        dealt.apart(version, &flat.widened(slot.range.clone()))
                    }
                };
                Reading::Columns(copy, part * scalars..(part + 1) * scalars)
            }
        }
    }

    /// Opens a weight that is read in float32 (norms, biases, adapters): only where it is trained may it be kept in bfloat16.
    pub fn read_f32(&self) -> ReadingF32<'_> {
        assert!(
            matches!(self.store, Store::F32(_) | Store::Trainable(_)),
            "this weight must be float32"
        );
        let reading = self.read();
        match reading.slice() {
            WeightSlice::Bf16(narrow) => ReadingF32::Widened(narrow.to_f32_vec()),
            _ => ReadingF32::Own(reading),
        }
    }

    /// Number of the changes to the trainable weights so far. What is computed from a frozen weight stays true.
    pub fn version(&self) -> u64 {
        match &self.store {
            Store::Trainable(slot) => slot.version.load(Ordering::Acquire),
            _ => 0,
        }
    }

    /// Puts values in place of a trainable weight's, before training begins.
    pub fn set(&self, values: &[f32]) {
        let Store::Trainable(slot) = &self.store else {
            return;
        };
        assert!(slot.columns.is_none(), "values of some columns");
        let mut flat = slot.flat.write().unwrap_or_else(PoisonError::into_inner);
        match &mut *flat {
            FlatWeights::Float32(flat) => flat[slot.range.clone()].copy_from_slice(values),
            FlatWeights::Bfloat16(flat) => {
                flat[slot.range.clone()].convert_from_f32_slice(values);
            }
        }
        slot.version.fetch_add(1, Ordering::Release);
    }

    /// Hands over the gradient of a trainable weight: `write(rows, gradient, accumulate)` fills the slice of these rows,
    /// or adds to it where another use of the weight has filled it already. Called once or for one tile of rows after
    /// the other; a vector's rows are its scalars. Does nothing for a frozen weight.
    pub fn add_gradient(&self, mut write: impl FnMut(Range<usize>, &mut [f32], bool)) {
        let Store::Trainable(slot) = &self.store else {
            return;
        };
        let (rows, width) = (self.shape[0], slot.range.len() / self.shape[0].max(1));
        if let Some(columns) = &slot.columns {
            let mut gradient = vec![0.0; self.scalars()];
            write(0..rows, &mut gradient, false);
            return slot.add_columns(columns, &gradient);
        }
        let mut buffer = slot.gradients.lock();
        let buffer = &mut *buffer;
        let written = std::mem::replace(&mut buffer.written[slot.index][slot.part], true);
        match &mut buffer.sink {
            Sink::Slot(flat) => write(0..rows, &mut flat[slot.range.clone()], written),
            Sink::Sums(sums) => {
                let tile = (SUMS_TILE / width.max(1)).max(1);
                for first in (0..rows).step_by(tile) {
                    let rows = first..(first + tile).min(rows);
                    let offset = slot.range.start + first * width;
                    sums.add(offset, rows.len() * width, |gradient| {
                        write(rows, gradient, false)
                    });
                }
            }
        }
    }

    /// Hands over the gradient of some rows of a trainable weight, where that of all others is zero. `gradients` has one row
    /// for each of `rows`, which are all different. A vector's rows are its scalars. Of some columns of a tensor none may be given.
    pub fn add_gradient_rows(&self, rows: &[usize], gradients: &[f32]) {
        let Store::Trainable(slot) = &self.store else {
            return;
        };
        let width = slot.range.len() / self.shape[0].max(1);
        if let Some(columns) = &slot.columns {
            assert!(rows.is_empty(), "some rows of some columns");
            return slot.add_columns(columns, &vec![0.0; self.scalars()]);
        }
        let mut buffer = slot.gradients.lock();
        let buffer = &mut *buffer;
        let written = std::mem::replace(&mut buffer.written[slot.index][slot.part], true);
        match &mut buffer.sink {
            Sink::Slot(flat) => {
                let flat = &mut flat[slot.range.clone()];
                if !written {
                    flat.par_chunks_mut(SUMS_TILE)
                        .for_each(|tile| tile.fill(0.0));
                }
                for (row, gradient) in rows.iter().zip(gradients.chunks_exact(width)) {
                    add_in_place(&mut flat[row * width..(row + 1) * width], gradient);
                }
            }
            Sink::Sums(sums) => {
                for (row, gradient) in rows.iter().zip(gradients.chunks_exact(width)) {
                    let offset = slot.range.start + row * width;
                    sums.add(offset, width, |sum| sum.copy_from_slice(gradient));
                }
            }
        }
    }
}

impl GradientSlot {
    /// Hands over the gradient of some columns, which goes on with those of all others.
    fn add_columns(&self, columns: &Columns, gradient: &[f32]) {
        let mut buffer = self.gradients.lock();
        let buffer = &mut *buffer;
        let written = std::mem::replace(&mut buffer.written[self.index][self.part], true);
        let Some(apart) = buffer.unfinished.take(self.index, columns, gradient) else {
            return;
        };
        let deal = columns.dealt.deal;
        match &mut buffer.sink {
            Sink::Slot(flat) => {
                deal.put_back(&apart, 0, &mut flat[self.range.clone()], written);
            }
            Sink::Sums(sums) => {
                let width = deal.columns * deal.parts;
                let tile = (SUMS_TILE / width.max(1)).max(1);
                for first in (0..deal.rows).step_by(tile) {
                    let rows = tile.min(deal.rows - first);
                    let offset = self.range.start + first * width;
                    sums.add(offset, rows * width, |sum| {
                        deal.put_back(&apart, first, sum, false);
                    });
                }
            }
        }
    }
}

impl fmt::Debug for Weight {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "weight {:?}", self.shape)
    }
}

impl Reading<'_> {
    pub fn slice(&self) -> WeightSlice<'_> {
        match self {
            Self::F32(values) => WeightSlice::F32(values),
            Self::Bf16(values) => WeightSlice::Bf16(values),
            Self::Nf4(matrix) => WeightSlice::Nf4(matrix),
            Self::Trainable(flat, range) => match &**flat {
                FlatWeights::Float32(flat) => WeightSlice::F32(&flat[range.clone()]),
                FlatWeights::Bfloat16(flat) => WeightSlice::Bf16(&flat[range.clone()]),
            },
            Self::Columns(values, range) => WeightSlice::F32(&values[range.clone()]),
        }
    }

    /// The weights as a product reads them, `[rows][columns]`.
    pub fn matrix<E: Element>(&self, rows: usize, columns: usize) -> Weights<'_, E> {
        match self {
            Self::Nf4(matrix) => Weights::Nf4(Nf4View::new(matrix, rows, columns)),
            _ => View::new(self.elements(), rows, columns).into(),
        }
    }

    /// The weights as the elements that this model computes with.
    pub fn elements<E: Element>(&self) -> &[E] {
        E::of(self.slice()).expect("a model's matrices are of one type")
    }
}

impl Deref for ReadingF32<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            Self::Own(reading) => reading.elements(),
            Self::Widened(values) => values,
        }
    }
}
