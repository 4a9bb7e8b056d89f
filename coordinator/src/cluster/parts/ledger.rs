//! The ledger: who holds which slot of one piece of work. A slot stays with its worker until the worker is lost, says that it
//! does not hold it, or the work is over: so no slot is ever in two accumulators. Slots that a worker brings from an earlier
//! term or session become its own where nobody else has them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::queue::Queue;
use crate::cluster::event::WorkerId;
use crate::cluster::schedule::{RunSchedule, Work};

/// Where a slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Free,
    Leased(WorkerId),
    /// In this worker's accumulator (training) or counted (evaluation).
    Held(WorkerId),
}

/// What the records need of a computed slot: the same whoever computes it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SlotResult {
    /// Loss summed over the slot's trained tokens, in nats.
    pub loss_sum: f64,
    /// Trained tokens that were the model's first choice.
    pub correct_tokens: u64,
    /// Whether its gradient has scalars that are not finite or out of range.
    pub is_invalid: bool,
}

/// The slots of one piece of work.
#[derive(Clone, Debug)]
pub struct Ledger {
    work: Work,
    /// Trained tokens of each slot.
    slots: Vec<u64>,
    places: Vec<Place>,
    free: BTreeSet<u32>,
    queues: BTreeMap<WorkerId, Queue>,
    /// By slot, the longest time in seconds for which it was in hand and then given back.
    tried: BTreeMap<u32, f64>,
    held: usize,
    results: Vec<Option<SlotResult>>,
    /// By slot, who computed it last and in how many seconds, where it was computed while this ledger was there.
    seconds: BTreeMap<u32, (WorkerId, f64)>,
    /// Every slot was held once and the exchange was ordered, in this generation or an earlier one.
    exchanged: bool,
}

impl Ledger {
    /// The slots of this piece of work, all free.
    pub fn of(schedule: &RunSchedule, work: Work) -> Self {
        let slots = schedule.slots(work);
        Self {
            work,
            places: vec![Place::Free; slots.len()],
            free: (0..slots.len() as u32).collect(),
            queues: BTreeMap::new(),
            tried: BTreeMap::new(),
            held: 0,
            results: vec![None; slots.len()],
            seconds: BTreeMap::new(),
            slots,
            exchanged: false,
        }
    }

    pub fn work(&self) -> Work {
        self.work
    }

    /// Whether its slots are of a training step.
    pub fn is_training(&self) -> bool {
        matches!(self.work, Work::Train(_))
    }

    /// Trained tokens of each slot.
    pub fn slots(&self) -> &[u64] {
        &self.slots
    }

    /// Trained tokens of one slot. None where there is no such slot.
    pub fn trained_tokens_of(&self, slot: u32) -> Option<u64> {
        self.slots.get(slot as usize).copied()
    }

    /// Whether every slot was held once and the exchange was ordered, in this generation or an earlier one.
    pub fn is_exchanged(&self) -> bool {
        self.exchanged
    }

    /// Notes that every slot is held and the exchange is ordered.
    pub fn mark_exchanged(&mut self) {
        self.exchanged = true;
    }

    pub fn free_count(&self) -> usize {
        self.free.len()
    }

    /// Leases the next free slot to `worker`.
    pub fn lease(&mut self, worker: WorkerId) -> Option<u32> {
        let slot = self.free.pop_first()?;
        self.places[slot as usize] = Place::Leased(worker);
        self.queues.entry(worker).or_default().push(slot);
        Some(slot)
    }

    /// Slots that were leased to `worker` and are not delivered yet.
    pub fn queue(&self, worker: WorkerId) -> Option<&Queue> {
        self.queues.get(&worker)
    }

    pub fn queues(&self) -> impl Iterator<Item = (WorkerId, &Queue)> {
        self.queues.iter().map(|(worker, queue)| (*worker, queue))
    }

    /// `worker` has nothing else to do than its first leased slot.
    pub fn begin_next(&mut self, worker: WorkerId, now: Instant) {
        if let Some(queue) = self.queues.get_mut(&worker) {
            queue.begin(now);
        }
    }

    /// Moves the times at which slots were asked back: the driver did not listen for so long.
    pub fn postpone(&mut self, by: Duration) {
        for queue in self.queues.values_mut() {
            queue.postpone(by);
        }
    }

    /// Notes that `worker` was asked to give `slot` back.
    pub fn recall(&mut self, worker: WorkerId, slot: u32, now: Instant) {
        if let Some(queue) = self.queues.get_mut(&worker) {
            queue.recall(slot, now);
        }
    }

    /// Frees a slot that `worker` will not compute. False where it was not leased to it.
    pub fn give_back(&mut self, worker: WorkerId, slot: u32) -> bool {
        if self.places.get(slot as usize) != Some(&Place::Leased(worker)) {
            return false;
        }
        self.places[slot as usize] = Place::Free;
        self.free.insert(slot);
        self.end_lease(worker, slot);
        true
    }

    /// Notes that `slot` was given back after so many seconds in hand.
    pub fn note_tried(&mut self, slot: u32, seconds: f64) {
        let longest = self.tried.entry(slot).or_insert(seconds);
        *longest = longest.max(seconds);
    }

    /// Lower bound of the seconds that `slot` takes, from a worker that gave it back. 0 where none did.
    pub fn tried(&self, slot: u32) -> f64 {
        self.tried.get(&slot).copied().unwrap_or(0.0)
    }

    /// Whether this worker's accumulator has slots of this work, or it computed some slots of an evaluation.
    pub fn is_holder(&self, worker: WorkerId) -> bool {
        self.places.contains(&Place::Held(worker))
    }

    /// Records that `worker` computed `slot`. False where the slot is not this worker's.
    pub fn complete(&mut self, worker: WorkerId, slot: u32, result: SlotResult) -> bool {
        let Some(place) = self.places.get(slot as usize) else {
            return false;
        };
        match *place {
            Place::Leased(owner) if owner == worker => {
                self.hold(worker, slot, result);
                true
            }
            Place::Held(owner) => owner == worker,
            _ => false,
        }
    }

    /// Notes how long `worker` took for `slot`.
    pub fn note_seconds(&mut self, worker: WorkerId, slot: u32, seconds: f64) {
        self.seconds.insert(slot, (worker, seconds));
    }

    /// Number of slots that each worker holds, and the seconds that it took for them.
    pub fn shares(&self) -> BTreeMap<WorkerId, (u64, f64)> {
        let mut shares: BTreeMap<WorkerId, (u64, f64)> = BTreeMap::new();
        for (slot, place) in (0..).zip(&self.places) {
            let Place::Held(worker) = place else {
                continue;
            };
            let (slots, seconds) = shares.entry(*worker).or_default();
            *slots += 1;
            *seconds += match self.seconds.get(&slot) {
                Some((computed_by, seconds)) if computed_by == worker => *seconds,
                _ => 0.0,
            };
        }
        shares
    }

    /// Frees all slots that are leased to or held by `worker`, because it is lost. Evaluated slots stay counted.
    pub fn release(&mut self, worker: WorkerId) {
        let counted = matches!(self.work, Work::Eval(_));
        self.free_where(worker, |_, held| !(held && counted));
    }

    /// Makes what is with `worker` exactly what its accumulator holds. Slots that nobody has become its own.
    ///
    /// False where the accumulator cannot be counted, because another has one of its slots, or because this work is
    /// not the step that it was filled for: the worker must empty it, and everything that was with it is free. Evaluated
    /// slots are in no accumulator and stay counted.
    pub fn reconcile(&mut self, worker: WorkerId, accumulator: &BTreeMap<u32, SlotResult>) -> bool {
        if !self.is_training() {
            self.release(worker);
            return accumulator.is_empty();
        }
        let mine = |slot: &u32| match self.places.get(*slot as usize) {
            Some(Place::Free) => true,
            Some(Place::Leased(owner) | Place::Held(owner)) => *owner == worker,
            None => false,
        };
        if !accumulator.keys().all(mine) {
            self.release(worker);
            return false;
        }
        self.free_where(worker, |slot, _| !accumulator.contains_key(&slot));
        for (&slot, &result) in accumulator {
            self.hold(worker, slot, result);
        }
        true
    }

    /// Gives a slot that is free, or the worker's already, into the accumulator of `worker`.
    fn hold(&mut self, worker: WorkerId, slot: u32, result: SlotResult) {
        let place = &mut self.places[slot as usize];
        match std::mem::replace(place, Place::Held(worker)) {
            Place::Held(_) => return,
            Place::Leased(_) => self.end_lease(worker, slot),
            Place::Free => drop(self.free.remove(&slot)),
        }
        self.held += 1;
        self.results[slot as usize].get_or_insert(result);
    }

    /// Keeps the result of a slot, whoever has it. False where there is no such slot.
    pub fn learn(&mut self, slot: u32, result: SlotResult) -> bool {
        let Some(known) = self.results.get_mut(slot as usize) else {
            return false;
        };
        known.get_or_insert(result);
        true
    }

    fn free_where(&mut self, worker: WorkerId, frees: impl Fn(u32, bool) -> bool) {
        for slot in 0..self.places.len() as u32 {
            let held = match self.places[slot as usize] {
                Place::Leased(owner) if owner == worker => false,
                Place::Held(owner) if owner == worker => true,
                _ => continue,
            };
            if !frees(slot, held) {
                continue;
            }
            self.places[slot as usize] = Place::Free;
            self.free.insert(slot);
            if held {
                self.held -= 1;
            } else {
                self.end_lease(worker, slot);
            }
        }
    }

    fn end_lease(&mut self, worker: WorkerId, slot: u32) {
        if let Some(queue) = self.queues.get_mut(&worker) {
            queue.remove(slot);
        }
    }

    #[cfg(test)]
    pub fn is_leased(&self, worker: WorkerId, slot: u32) -> bool {
        self.places[slot as usize] == Place::Leased(worker)
    }

    /// Whether every slot is held.
    pub fn is_complete(&self) -> bool {
        self.held == self.places.len()
    }

    pub fn trained_tokens(&self) -> u64 {
        self.slots.iter().sum()
    }

    /// Mean loss and share of correct tokens over all trained tokens, summed in slot order. None before every slot was
    /// computed at least once.
    pub fn means(&self) -> Option<(f64, f64)> {
        let mut loss_sum = 0.0;
        let mut correct = 0;
        for result in &self.results {
            let result = (*result)?;
            loss_sum += result.loss_sum;
            correct += result.correct_tokens;
        }
        let tokens = self.trained_tokens().max(1) as f64;
        Some((loss_sum / tokens, correct as f64 / tokens))
    }

    /// Slots whose loss or gradient is not finite or out of range.
    pub fn broken_slots(&self) -> Vec<usize> {
        let broken = |result: &Option<SlotResult>| {
            result.is_some_and(|result| result.is_invalid || !result.loss_sum.is_finite())
        };
        (0..self.results.len())
            .filter(|&slot| broken(&self.results[slot]))
            .collect()
    }
}
