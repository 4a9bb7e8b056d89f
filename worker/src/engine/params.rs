//! Weights and gradients: the trainable tensors of a model in one flat buffer ordered by name, and the sink that
//! collects their gradients in the same order.
//!
//! Ops take a [`Weight`]; whether it is trainable, and where its gradient goes, travels with it.

use std::fmt;
use std::ops::{Deref, Range};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use common::files::layout::Layout;
use half::bf16;

use super::EngineError;
use super::buffer::Buffer;
use super::ops::element::Element;
use super::ops::gemm::WeightSlice;

/// A weight tensor, row-major, in float32 or (frozen only) bfloat16.
#[derive(Clone)]
pub struct Weight {
    shape: Vec<usize>,
    store: Store,
}

#[derive(Clone)]
enum Store {
    F32(Arc<Buffer<f32>>),
    Bf16(Arc<Buffer<bf16>>),
    Trainable(GradientSlot),
}

/// A trainable tensor's place in the flat weights, and where its gradient goes.
#[derive(Clone)]
struct GradientSlot {
    flat: Arc<RwLock<Vec<f32>>>,
    range: Range<usize>,
    gradients: Gradients,
    index: usize,
}

/// A weight open for reading: no update happens meanwhile.
pub enum Reading<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    Trainable(RwLockReadGuard<'a, Vec<f32>>, Range<usize>),
}

/// A [`Reading`] of a weight in float32.
pub struct ReadingF32<'a>(Reading<'a>);

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

    pub fn dims(&self) -> &[usize] {
        &self.shape
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
        matches!(self.store, Store::Bf16(_))
    }

    pub fn read(&self) -> Reading<'_> {
        match &self.store {
            Store::F32(values) => Reading::F32(values),
            Store::Bf16(values) => Reading::Bf16(values),
            Store::Trainable(slot) => {
                // A panic in an update ends the trainer; what is read then matters to nobody.
                let flat = slot.flat.read().unwrap_or_else(PoisonError::into_inner);
                Reading::Trainable(flat, slot.range.clone())
            }
        }
    }

    /// Opens a weight that must be float32 (norms, biases, adapters).
    pub fn read_f32(&self) -> ReadingF32<'_> {
        assert!(!self.is_bf16(), "this weight must be float32");
        ReadingF32(self.read())
    }

    /// Hands over the gradient of a trainable weight: `write(gradient, accumulate)` fills the slice, or adds to it where
    /// another use of the weight has filled it already. Does nothing for a frozen weight.
    pub fn add_gradient(&self, write: impl FnOnce(&mut [f32], bool)) {
        let Store::Trainable(slot) = &self.store else {
            return;
        };
        let mut buffer = slot.gradients.lock();
        let written = std::mem::replace(&mut buffer.written[slot.index], true);
        write(&mut buffer.flat[slot.range.clone()], written);
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
            Self::Trainable(flat, range) => WeightSlice::F32(&flat[range.clone()]),
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
        self.0.elements()
    }
}

/// Gradients of all trainable tensors of one slot, in layout order.
#[derive(Clone)]
pub struct Gradients(Arc<Mutex<GradientBuffer>>);

struct GradientBuffer {
    layout: Arc<Layout>,
    flat: Vec<f32>,
    written: Vec<bool>,
}

impl Gradients {
    fn new(layout: Arc<Layout>) -> Self {
        Self(Arc::new(Mutex::new(GradientBuffer {
            flat: vec![0.0; layout.scalars],
            written: vec![false; layout.tensors.len()],
            layout,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, GradientBuffer> {
        // A panic in an op leaves a half-written gradient; `reset` makes it valid again.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets what was written, before the next slot.
    pub fn reset(&self) {
        self.lock().written.fill(false);
    }

    /// Shows the finished flat gradient.
    ///
    /// # Errors
    /// Where a trainable tensor got no gradient.
    pub fn read<R>(&self, read: impl FnOnce(&[f32]) -> R) -> Result<R, EngineError> {
        let buffer = self.lock();
        if let Some(missing) = buffer.written.iter().position(|written| !written) {
            return Err(EngineError::MissingGradient {
                name: buffer.layout.tensors[missing].name.clone(),
            });
        }
        Ok(read(&buffer.flat))
    }
}

/// The trainable tensors. Every [`Weight`] handed out is a view of the one flat buffer, so an update in place is seen
/// by the whole model and no second copy exists.
pub struct Parameters {
    layout: Arc<Layout>,
    flat: Arc<RwLock<Vec<f32>>>,
    gradients: Gradients,
}

impl Parameters {
    /// `values` are in layout order.
    pub fn new(layout: Layout, values: Vec<f32>) -> Self {
        assert_eq!(values.len(), layout.scalars, "trainable weights");
        let layout = Arc::new(layout);
        Self {
            flat: Arc::new(RwLock::new(values)),
            gradients: Gradients::new(layout.clone()),
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
        let tensors = &self.layout.tensors;
        let index = tensors
            .binary_search_by(|tensor| tensor.name.as_str().cmp(name))
            .ok()?;
        let tensor = &tensors[index];
        Some(Weight {
            shape: tensor.shape.clone(),
            store: Store::Trainable(GradientSlot {
                flat: self.flat.clone(),
                range: tensor.offset..tensor.offset + tensor.scalars(),
                gradients: self.gradients.clone(),
                index,
            }),
        })
    }

    /// Shows the flat weights.
    pub fn read<R>(&self, read: impl FnOnce(&[f32]) -> R) -> R {
        read(&self.flat.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the flat weights in place.
    pub fn update(&self, write: impl FnOnce(&mut [f32])) {
        write(&mut self.flat.write().unwrap_or_else(PoisonError::into_inner));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn parameters() -> Parameters {
        let layout = Layout::new([("b".into(), vec![2]), ("a".into(), vec![1, 2])]);
        Parameters::new(layout, vec![1.0, 2.0, 3.0, 4.0])
    }

    #[test]
    fn an_update_in_place_is_seen_by_every_view() {
        let parameters = parameters();
        let b = parameters.weight("b").unwrap();
        parameters.update(|flat| flat.iter_mut().for_each(|w| *w *= 10.0));
        assert_eq!(*b.read_f32(), [30.0, 40.0]);
        assert!(parameters.weight("c").is_none());
    }

    #[test]
    fn a_trainable_tensor_without_a_gradient_is_an_error() {
        let parameters = parameters();
        let gradients = parameters.gradients();
        let fill = |name: &str, value| {
            let weight = parameters.weight(name).unwrap();
            weight.add_gradient(|slice, accumulate| {
                for g in slice {
                    *g = if accumulate { *g + value } else { value };
                }
            });
        };
        fill("a", 1.0);
        assert!(matches!(
            gradients.read(|_| ()),
            Err(EngineError::MissingGradient { name }) if name == "b"
        ));
        fill("b", 1.0);
        fill("b", 2.0);
        assert_eq!(
            gradients.read(<[f32]>::to_vec).unwrap(),
            [1.0, 1.0, 3.0, 3.0]
        );
        gradients.reset();
        assert!(gradients.read(|_| ()).is_err());
    }
}
