//! The queue of one worker: slots that were leased to it and that it has not delivered yet.
//!
//! A worker takes its slots in the order of their leases, so the first one is in hand as soon as the worker has nothing
//! else to do. It knows no clock: who calls says what time it is.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// Leased slots of one worker in the order in which it computes them.
#[derive(Clone, Debug, Default)]
pub struct Queue {
    slots: VecDeque<u32>,
    /// When the worker began with the first slot, as far as one can know from here.
    begun: Option<Instant>,
    /// Slots that were asked back and not yet answered for, with the time of asking.
    recalled: BTreeMap<u32, Instant>,
}

impl Queue {
    pub fn push(&mut self, slot: u32) {
        self.slots.push_back(slot);
    }

    /// Takes out a slot that was delivered, given back, or is void.
    pub fn remove(&mut self, slot: u32) {
        if self.slots.front() == Some(&slot) {
            self.begun = None;
        }
        self.slots.retain(|queued| *queued != slot);
        self.recalled.remove(&slot);
    }

    /// Notes that the worker is at its first slot, as it has nothing else to do.
    pub fn begin(&mut self, now: Instant) {
        if !self.slots.is_empty() {
            self.begun.get_or_insert(now);
        }
    }

    /// Moves the times of asking: nobody listened for so long, and what was asked back may have been answered for.
    pub fn postpone(&mut self, by: Duration) {
        for asked in self.recalled.values_mut() {
            *asked += by;
        }
    }

    pub fn len(&self) -> usize {
        self.slots.len()
    }

    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// The first slot, and since when it is in hand.
    pub fn in_hand(&self) -> Option<(u32, Instant)> {
        Some((*self.slots.front()?, self.begun?))
    }

    pub fn is_recalled(&self, slot: u32) -> bool {
        self.recalled.contains_key(&slot)
    }

    /// Slots that were not asked back, with how many come before each.
    pub fn kept(&self) -> impl Iterator<Item = (usize, u32)> {
        let slots = self.slots.iter().copied().enumerate();
        slots.filter(|(_, slot)| !self.is_recalled(*slot))
    }

    pub fn recall(&mut self, slot: u32, now: Instant) {
        if self.slots.contains(&slot) {
            self.recalled.entry(slot).or_insert(now);
        }
    }

    pub fn recalled_count(&self) -> usize {
        self.recalled.len()
    }

    /// When the oldest slot was asked back that is still not answered for.
    pub fn recalled_since(&self) -> Option<Instant> {
        self.recalled.values().min().copied()
    }
}
