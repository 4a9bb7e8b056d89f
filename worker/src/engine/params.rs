//! Weights and gradients: the trainable tensors of a model in one flat buffer ordered by name, and the sink that
//! collects their gradients in the same order.
//!
//! Ops take a [`Weight`]; whether it is trainable, and where its gradient goes, travels with it.

mod columns;

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use columns::{Columns, Deal, Dealt, Unfinished};
use common::files::FlatWeights;
use common::files::layout::Layout;
use common::job::BaseDtype;
use common::memory::processor::SUMS_TILE;
use common::nf4::Nf4;
use half::bf16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::EngineError;
use super::accumulator::Accumulator;
use super::buffer::Buffer;
use super::memory;
use super::ops::add_in_place;
use super::ops::element::Element;
use super::ops::element::WeightSlice;
use super::ops::matrix::{View, Weights};
use super::ops::nf4::Nf4View;

/// A weight tensor, row-major, in float32, or where it is frozen in bfloat16 or 4 bits.
#[derive(Clone)]
pub struct Weight {
    shape: Vec<usize>,
    store: Store,
}

#[derive(Clone)]
enum Store {
    F32(Arc<Buffer<f32>>),
    Bf16(Arc<Buffer<bf16>>),
    Nf4(Arc<Nf4>),
    Trainable(GradientSlot),
}

/// A trainable tensor's place in the flat weights, and where its gradient goes.
#[derive(Clone)]
struct GradientSlot {
    flat: Arc<RwLock<FlatWeights>>,
    version: Arc<AtomicU64>,
    range: Range<usize>,
    /// What the flat weights are kept in.
    dtype: BaseDtype,
    /// Which of the tensor's columns it has, where these are not all.
    columns: Option<Columns>,
    gradients: Gradients,
    index: usize,
    /// Which of the parts that are handed out it is.
    part: usize,
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

/// How the gradients of a slot get to the accumulator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collect {
    /// A slot's gradients are kept in a buffer of their own, and added as a whole when the slot is done: a slot that fails has
    /// added nothing. For adapters, where the buffer is small.
    Slot,
    /// Each gradient is added at once, as it is computed, so that none is ever kept.
    ///
    /// From the first on the slot cannot be abandoned, and if it fails it takes the accumulator's content with it. For all
    /// weights of a model, where a buffer would be as large as the model.
    Sums,
}

/// Gradients of all trainable tensors of one slot.
#[derive(Clone)]
pub struct Gradients(Arc<Mutex<GradientBuffer>>);

struct GradientBuffer {
    layout: Arc<Layout>,
    /// For each tensor, by the parts that are handed out of it, whether their gradient was handed over.
    written: Vec<Vec<bool>>,
    unfinished: Unfinished,
    sink: Sink,
}

enum Sink {
    /// The slot's gradient, flat in layout order.
    Slot(Vec<f32>),
    Sums(SumsSink),
}

#[derive(Default)]
struct SumsSink {
    /// The part of the gradient that is being computed.
    scratch: Vec<f32>,
    /// The accumulator, while a slot is computed.
    accumulator: Option<Accumulator>,
    /// How often the slot adds to any scalar at most.
    parts: u64,
}

impl SumsSink {
    fn add(&mut self, offset: usize, scalars: usize, write: impl FnOnce(&mut [f32])) {
        if self.scratch.len() < scalars {
            self.scratch = memory::zeros(scalars);
        }
        let gradient = &mut self.scratch[..scalars];
        write(gradient);
        let accumulator = self.accumulator.as_mut();
        let accumulator = accumulator.expect("gradients come after `begin`");
        accumulator.add_part(offset, gradient, self.parts);
    }
}

impl Gradients {
    fn new(layout: Arc<Layout>, collect: Collect) -> Self {
        Self(Arc::new(Mutex::new(GradientBuffer {
            written: vec![vec![false]; layout.tensors.len()],
            unfinished: Unfinished::default(),
            sink: match collect {
                Collect::Slot => Sink::Slot(vec![0.0; layout.scalars]),
                Collect::Sums => Sink::Sums(SumsSink::default()),
            },
            layout,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, GradientBuffer> {
        // A panic in an op leaves a half-written gradient; `begin` makes it valid again.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a slot. `parts` is how often it adds to any scalar at most.
    pub fn begin(&self, accumulator: &mut Accumulator, parts: u64) {
        let mut buffer = self.lock();
        buffer
            .written
            .iter_mut()
            .for_each(|parts| parts.fill(false));
        buffer.unfinished.clear();
        if let Sink::Sums(sums) = &mut buffer.sink {
            sums.accumulator = Some(std::mem::take(accumulator));
            sums.parts = parts;
        }
    }

    /// Whether a slot may still be abandoned after it has handed over gradients.
    pub fn can_be_dropped(&self) -> bool {
        matches!(self.lock().sink, Sink::Slot(_))
    }

    /// Ends a slot that was abandoned: the accumulator is as before.
    pub fn drop_slot(&self, accumulator: &mut Accumulator) {
        let mut buffer = self.lock();
        let untouched = !buffer.written.iter().flatten().any(|written| *written);
        if let Sink::Sums(sums) = &mut buffer.sink {
            assert!(untouched, "a slot abandoned after its first gradient");
            *accumulator = sums.accumulator.take().unwrap_or_default();
        }
    }

    /// Ends a slot: the accumulator holds it.
    ///
    /// # Errors
    /// Where a trainable tensor got no gradient; the accumulator holds what it did, or nothing.
    pub fn finish(&self, slot: u32, accumulator: &mut Accumulator) -> Result<(), EngineError> {
        let mut buffer = self.lock();
        let mut tensors = buffer.written.iter();
        let missing = tensors.position(|parts| parts.contains(&false));
        let missing = missing.map(|index| EngineError::MissingGradient {
            name: buffer.layout.tensors[index].name.clone(),
        });
        match &mut buffer.sink {
            Sink::Slot(flat) if missing.is_none() => {
                accumulator.add(slot, [&flat[..]]);
            }
            Sink::Slot(_) => {}
            Sink::Sums(sums) => {
                *accumulator = sums.accumulator.take().unwrap_or_default();
                match missing {
                    Some(_) => accumulator.clear(),
                    None => drop(accumulator.hold(slot)),
                }
            }
        }
        missing.map_or(Ok(()), Err)
    }

    /// The flat gradient of a slot, for tests of what fills it.
    #[cfg(test)]
    pub fn flat(&self) -> Option<Vec<f32>> {
        let buffer = self.lock();
        match &buffer.sink {
            Sink::Slot(flat) if buffer.written.iter().flatten().all(|written| *written) => {
                Some(flat.clone())
            }
            _ => None,
        }
    }
}

/// The trainable tensors of a model, in one flat buffer.
///
/// Every [`Weight`] handed out is a view of that buffer, so an update in place is seen by the whole model and no second copy
/// exists.
pub struct Parameters {
    layout: Arc<Layout>,
    flat: Arc<RwLock<FlatWeights>>,
    /// Number of the changes so far.
    version: Arc<AtomicU64>,
    gradients: Gradients,
}

impl Parameters {
    /// Takes the trainable tensors' starting values, in layout order.
    pub fn new(layout: Layout, values: impl Into<FlatWeights>, collect: Collect) -> Self {
        let values = values.into();
        assert_eq!(
            (values.len(), values.dtype()),
            (layout.scalars, layout.weights),
            "trainable weights"
        );
        let layout = Arc::new(layout);
        Self {
            flat: Arc::new(RwLock::new(values)),
            version: Arc::default(),
            gradients: Gradients::new(layout.clone(), collect),
            layout,
        }
    }

    pub fn layout(&self) -> Arc<Layout> {
        self.layout.clone()
    }

    pub fn gradients(&self) -> &Gradients {
        &self.gradients
    }

    /// The trainable weight of this name, or None where it is not trainable.
    pub fn weight(&self, name: &str) -> Option<Weight> {
        let index = self.index(name)?;
        Some(self.view(index, 0, &self.layout.tensors[index].shape))
    }

    /// One of the equal parts that the first dimension of the trainable tensor of this name counts, or None where it is not
    /// trainable. From then on the tensor has its gradient once every part has.
    pub fn part(&self, name: &str, part: usize) -> Option<Weight> {
        let index = self.index(name)?;
        let (parts, shape) = self.layout.tensors[index].shape.split_first()?;
        assert!(part < *parts, "part {part} of {parts} of {name}");
        self.gradients.lock().written[index].resize(*parts, false);
        Some(self.view(index, part, shape))
    }

    /// So many equal parts of the trainable matrix of this name, each with rows that follow one another, or None where it is not
    /// trainable. From then on the tensor has its gradient once every part has.
    pub fn rows(&self, name: &str, parts: usize) -> Option<Vec<Weight>> {
        let (index, [rows, columns]) = self.divided(name, parts)?;
        let part = |part| self.view(index, part, &[rows / parts, columns]);
        Some((0..parts).map(part).collect())
    }

    /// [`rows`](Self::rows), but of columns, which are dealt to the parts in turn.
    pub fn columns(&self, name: &str, parts: usize) -> Option<Vec<Weight>> {
        let (index, [rows, columns]) = self.divided(name, parts)?;
        let deal = Deal {
            rows,
            columns: columns / parts,
            parts,
        };
        let dealt = Arc::new(Dealt::new(deal));
        let part = |part| {
            let mut slot = self.slot(index, part);
            slot.columns = Some(Columns {
                part,
                dealt: dealt.clone(),
            });
            Weight {
                shape: vec![rows, deal.columns],
                store: Store::Trainable(slot),
            }
        };
        Some((0..parts).map(part).collect())
    }

    /// The matrix of this name, whose gradient comes in so many parts from now on.
    fn divided(&self, name: &str, parts: usize) -> Option<(usize, [usize; 2])> {
        let index = self.index(name)?;
        let shape: [usize; 2] = self.layout.tensors[index].shape[..].try_into().ok()?;
        self.gradients.lock().written[index].resize(parts, false);
        Some((index, shape))
    }

    fn index(&self, name: &str) -> Option<usize> {
        let tensors = &self.layout.tensors;
        let found = tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name));
        found.ok()
    }

    fn view(&self, index: usize, part: usize, shape: &[usize]) -> Weight {
        let scalars = shape.iter().product::<usize>();
        let mut slot = self.slot(index, part);
        let first = slot.range.start + part * scalars;
        slot.range = first..first + scalars;
        Weight {
            shape: shape.to_vec(),
            store: Store::Trainable(slot),
        }
    }

    /// The place of a whole tensor, for one of its parts.
    fn slot(&self, index: usize, part: usize) -> GradientSlot {
        let tensor = &self.layout.tensors[index];
        GradientSlot {
            flat: self.flat.clone(),
            version: self.version.clone(),
            range: tensor.offset..tensor.offset + tensor.scalars(),
            dtype: self.layout.weights,
            columns: None,
            gradients: self.gradients.clone(),
            index,
            part,
        }
    }

    /// Calls `read` with the flat weights, in layout order.
    pub fn read<R>(&self, read: impl FnOnce(&FlatWeights) -> R) -> R {
        read(&self.flat.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Shares the flat weights, without a copy.
    pub fn share(&self) -> FlatWeights {
        let flat = self.flat.read().unwrap_or_else(PoisonError::into_inner);
        flat.clone()
    }

    pub fn replace(&self, weights: FlatWeights) {
        *self.flat.write().unwrap_or_else(PoisonError::into_inner) = weights;
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Changes the flat weights in place, or a copy of them while somebody still reads what was shared.
    pub fn update(&self, write: impl FnOnce(&mut FlatWeights)) {
        write(&mut self.flat.write().unwrap_or_else(PoisonError::into_inner));
        self.version.fetch_add(1, Ordering::Release);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
