//! Weights and gradients: the trainable tensors of a model in one flat buffer ordered by name, and the sink that
//! collects their gradients in the same order.
//!
//! Ops take a [`Weight`]; whether it is trainable, and where its gradient goes, travels with it.

mod columns;
mod gradients;
mod weight;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use columns::{Columns, Deal, Dealt};
use common::files::FlatWeights;
use common::files::layout::Layout;
pub use gradients::{Collect, Gradients};
use weight::{GradientSlot, Store};
pub use weight::{Reading, ReadingF32, Weight};

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
