//! Slot gradients on their way to the sum over all workers. In: each slot's gradient of its summed token loss. Out: this
//! worker's part of the sum, and which slots are in it.
//!
//! The exchange reads it and never changes it, so a broken exchange is repeated without computing anything again.

use std::collections::BTreeSet;

use common::exact::FixedPoint;
use common::job::Reduction;
use rayon::prelude::*;

use super::packed::PackedSums;

/// Scalars that a thread works on at a time. Fixed, so that results do not depend on the number of threads.
const ACCUMULATOR_TILE: usize = 1 << 16;

/// This worker's part of one step's gradient.
#[derive(Debug)]
pub struct Accumulator {
    sums: Sums,
    held: BTreeSet<u32>,
    open: Option<OpenStep>,
}

/// The sums of an accumulator: flat, one for each trainable scalar in the layout's order.
#[derive(Debug)]
pub enum Sums {
    /// Exact sums in fixed point (see [`common::exact`]). `invalid` counts the scalars that were not finite or out of range;
    /// any of them, on any worker, makes everybody skip the step.
    Exact { sums: PackedSums, invalid: u64 },
    /// Float32 sums in fast mode, already divided by the step's trained tokens.
    Fast { sums: Vec<f32> },
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct OpenStep {
    step: u64,
    trained_tokens: u64,
    rule: FixedPoint,
}

/// An accumulator of no scalars: the placeholder left by `mem::take` while gradients are added to the real one elsewhere.
impl Default for Accumulator {
    fn default() -> Self {
        Self::new(Reduction::Exact, 0)
    }
}

impl Accumulator {
    pub fn new(reduction: Reduction, scalars: usize) -> Self {
        let sums = match reduction {
            Reduction::Exact => Sums::Exact {
                sums: PackedSums::zeros(scalars),
                invalid: 0,
            },
            Reduction::Fast => Sums::Fast {
                sums: vec![0.0; scalars],
            },
        };
        Self {
            sums,
            held: BTreeSet::new(),
            open: None,
        }
    }

    /// Makes room for a step. What is held stays if it is this step's: after a loss of workers the same step goes on.
    ///
    /// `trained_tokens` and `slots` are those of the whole step, over all workers. Returns false where the step was open already.
    pub fn begin(&mut self, step: u64, trained_tokens: u64, slots: usize) -> bool {
        let opened = OpenStep {
            step,
            trained_tokens,
            rule: FixedPoint::new(trained_tokens, slots),
        };
        if self.open == Some(opened) {
            return false;
        }
        self.clear();
        self.open = Some(opened);
        true
    }

    /// The step that is open, whose gradients these are.
    pub fn step(&self) -> Option<u64> {
        self.open.map(|open| open.step)
    }

    pub fn held(&self) -> &BTreeSet<u32> {
        &self.held
    }

    pub fn holds(&self, slot: u32) -> bool {
        self.held.contains(&slot)
    }

    pub fn sums(&self) -> &Sums {
        &self.sums
    }

    /// Number of gradient scalars of the step that were not finite or out of range.
    pub fn invalid(&self) -> u64 {
        match &self.sums {
            Sums::Exact { invalid, .. } => *invalid,
            Sums::Fast { .. } => 0,
        }
    }

    /// Adds a slot's gradient, given tensor by tensor in the layout's order.
    ///
    /// A slot that is already held adds nothing, and false is returned.
    pub fn add<'a>(&mut self, slot: u32, gradients: impl IntoIterator<Item = &'a [f32]>) -> bool {
        if self.holds(slot) {
            return false;
        }
        let mut offset = 0;
        for gradient in gradients {
            self.add_part(offset, gradient, 1);
            offset += gradient.len();
        }
        assert_eq!(offset, self.scalars(), "a gradient of another layout");
        self.hold(slot)
    }

    /// Adds a part of the gradient of a slot that is not held yet, to the scalars from `offset`. `parts` is how often
    /// the slot adds to any scalar at most; the scalars' range is divided by it, so that no sum can leave it.
    ///
    /// Parts cannot be taken back: where the rest of the slot does not follow, everything is forgotten.
    pub fn add_part(&mut self, offset: usize, gradient: &[f32], parts: u64) {
        let open = self.open.expect("a step is begun before slots are added");
        match &mut self.sums {
            Sums::Exact { sums, invalid } => {
                *invalid += sums.add(&open.rule.of_parts(parts), offset, gradient);
            }
            Sums::Fast { sums } => {
                let sums = &mut sums[offset..offset + gradient.len()];
                add_fast(open.trained_tokens, sums, gradient);
            }
        }
    }

    /// Notes that all of a slot's gradient was added. Returns false where the slot was held already.
    pub fn hold(&mut self, slot: u32) -> bool {
        self.held.insert(slot)
    }

    /// Forgets the sums and the slots held.
    pub fn clear(&mut self) {
        match &mut self.sums {
            Sums::Exact { sums, invalid } => {
                sums.clear();
                *invalid = 0;
            }
            Sums::Fast { sums } => sums
                .par_chunks_mut(ACCUMULATOR_TILE)
                .for_each(|tile| tile.fill(0.0)),
        }
        self.held.clear();
        self.open = None;
    }

    /// Opens the same step as `other` and notes the same slots as held: their sums are to follow.
    #[cfg(feature = "cuda")]
    pub fn hold_as(&mut self, other: &Self) {
        self.open = other.open;
        self.held.clone_from(&other.held);
    }

    /// Overwrites exact sums from scalar `start`, for an engine that keeps its sums elsewhere.
    #[cfg(feature = "cuda")]
    pub fn set_exact(&mut self, start: usize, values: &[i64]) {
        match &mut self.sums {
            Sums::Exact { sums, .. } => sums.write(start, values),
            Sums::Fast { .. } => unreachable!("made for exact sums"),
        }
    }

    #[cfg(feature = "cuda")]
    pub fn set_fast(&mut self, start: usize, values: &[f32]) {
        match &mut self.sums {
            Sums::Exact { .. } => unreachable!("made for float32 sums"),
            Sums::Fast { sums } => sums[start..start + values.len()].copy_from_slice(values),
        }
    }

    #[cfg(feature = "cuda")]
    pub fn set_invalid(&mut self, count: u64) {
        if let Sums::Exact { invalid, .. } = &mut self.sums {
            *invalid = count;
        }
    }

    /// The mean gradient, flat in layout order, where this worker holds every slot.
    pub fn mean(&self) -> Vec<f32> {
        let mut mean = vec![0.0; self.scalars()];
        let tiles = mean.par_chunks_mut(ACCUMULATOR_TILE).enumerate();
        tiles.for_each(|(index, mean)| self.read_means(index * ACCUMULATOR_TILE, mean));
        mean
    }

    /// Reads the mean gradients from scalar `start`, as many as `out` takes, where this worker holds every slot.
    pub fn read_means(&self, start: usize, out: &mut [f32]) {
        match &self.sums {
            Sums::Exact { sums, .. } => sums.read_means(start, out),
            Sums::Fast { sums } => out.copy_from_slice(&sums[start..start + out.len()]),
        }
    }

    pub fn scalars(&self) -> usize {
        match &self.sums {
            Sums::Exact { sums, .. } => sums.len(),
            Sums::Fast { sums } => sums.len(),
        }
    }
}

fn add_fast(trained_tokens: u64, sums: &mut [f32], gradient: &[f32]) {
    let factor = 1.0 / trained_tokens as f32;
    let tiles = sums
        .par_chunks_mut(ACCUMULATOR_TILE)
        .zip(gradient.par_chunks(ACCUMULATOR_TILE));
    tiles.for_each(|(sums, gradient)| {
        for (sum, g) in sums.iter_mut().zip(gradient) {
            *sum += g * factor;
        }
    });
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn exact(accumulator: &Accumulator) -> Vec<i64> {
        match accumulator.sums() {
            Sums::Exact { sums, .. } => {
                let mut plain = vec![0; sums.len()];
                sums.read(0, &mut plain);
                plain
            }
            Sums::Fast { .. } => unreachable!("made as exact"),
        }
    }

    #[test]
    fn a_slot_counts_once() {
        let mut accumulator = Accumulator::new(Reduction::Exact, 3);
        accumulator.begin(0, 2, 4);
        assert!(accumulator.add(3, [&[1.0f32, 2.0][..], &[3.0]]));
        assert!(!accumulator.add(3, [&[1.0f32, 2.0][..], &[3.0]]));
        assert_eq!(accumulator.mean(), [0.5, 1.0, 1.5]);
        assert_eq!(accumulator.held().iter().collect::<Vec<_>>(), [&3]);
    }

    #[test]
    fn the_same_step_goes_on_and_another_starts_empty() {
        let mut accumulator = Accumulator::new(Reduction::Exact, 1);
        accumulator.begin(5, 1, 2);
        accumulator.add(0, [&[1.0f32][..]]);
        accumulator.begin(5, 1, 2);
        assert!(accumulator.holds(0));
        accumulator.begin(6, 1, 2);
        assert!(accumulator.held().is_empty());
        assert_eq!(accumulator.mean(), [0.0]);
    }

    #[test]
    fn the_sum_is_the_same_for_any_number_of_threads() {
        let gradient: Vec<f32> = (0..3 * ACCUMULATOR_TILE + 17)
            .map(|i| (i as f32).sin() * 1e-3)
            .collect();
        let sums = [1, 3].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| {
                let mut accumulator = Accumulator::new(Reduction::Exact, gradient.len());
                accumulator.begin(0, 7, 2);
                accumulator.add(1, [&gradient[..]]);
                accumulator.add(0, [&gradient[..]]);
                exact(&accumulator)
            })
        });
        assert_eq!(sums[0], sums[1]);
    }

    #[test]
    fn gradients_that_are_not_finite_are_counted() {
        let mut accumulator = Accumulator::new(Reduction::Exact, 2);
        accumulator.begin(0, 1, 1);
        accumulator.add(0, [&[f32::NAN, 1.0][..]]);
        assert_eq!(accumulator.invalid(), 1);
        accumulator.begin(1, 1, 1);
        assert_eq!(accumulator.invalid(), 0);
    }

    #[test]
    fn fast_sums_are_means_too() {
        let mut accumulator = Accumulator::new(Reduction::Fast, 2);
        accumulator.begin(0, 4, 2);
        accumulator.add(0, [&[1.0f32, 2.0][..]]);
        accumulator.add(1, [&[3.0f32, 2.0][..]]);
        assert_eq!(accumulator.mean(), [1.0, 1.0]);
    }
}
