//! The gradients of one slot: where ops hand them over, and how they get to the accumulator.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::files::layout::Layout;

use super::columns::Unfinished;
use crate::engine::EngineError;
use crate::engine::accumulator::Accumulator;
use crate::engine::memory;

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

pub(super) struct GradientBuffer {
    layout: Arc<Layout>,
    /// For each tensor, by the parts that are handed out of it, whether their gradient was handed over.
    pub(super) written: Vec<Vec<bool>>,
    pub(super) unfinished: Unfinished,
    pub(super) sink: Sink,
}

pub(super) enum Sink {
    /// The slot's gradient, flat in layout order.
    Slot(Vec<f32>),
    Sums(SumsSink),
}

#[derive(Default)]
pub(super) struct SumsSink {
    /// The part of the gradient that is being computed.
    scratch: Vec<f32>,
    /// The accumulator, while a slot is computed.
    accumulator: Option<Accumulator>,
    /// How often the slot adds to any scalar at most.
    parts: u64,
}

impl SumsSink {
    pub(super) fn add(&mut self, offset: usize, scalars: usize, write: impl FnOnce(&mut [f32])) {
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
    pub(super) fn new(layout: Arc<Layout>, collect: Collect) -> Self {
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

    pub(super) fn lock(&self) -> MutexGuard<'_, GradientBuffer> {
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
