//! Slots that were leased to this worker and are not computed yet, shared by the session and the engine.
//!
//! The coordinator may want a slot back. Under one lock it is decided whether the engine has begun it: what it has not
//! begun is given back at once, what it has in hand it is asked to abandon. So a slot is either given back or added to the
//! accumulator, and never both.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::wire::{PlanKind, WireError};
use proto::v1;

use crate::engine::Abandon;

/// Most slots that may be leased at a time: far beyond what any coordinator leases ahead.
const MAX_LEASES: usize = 4096;

/// Identifies a leased slot: its number, and the generation, kind and step of the work that it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SlotKey {
    pub generation: u64,
    pub kind: PlanKind,
    pub step: u64,
    pub slot: u32,
}

/// The slots leased to this worker, and the one in hand.
#[derive(Debug, Default)]
pub struct Leases(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    waiting: BTreeSet<SlotKey>,
    in_hand: Option<(SlotKey, Abandon)>,
}

impl Leases {
    /// Notes leased slots. Returns false where they are too many.
    pub fn add(&self, keys: impl Iterator<Item = SlotKey>) -> bool {
        let mut inner = self.lock();
        inner.waiting.extend(keys);
        inner.waiting.len() <= MAX_LEASES
    }

    /// Forgets the slots not begun yet, because a new generation has begun.
    pub fn clear(&self) {
        self.lock().waiting.clear();
    }

    /// Takes a slot in hand. Returns false where it was given back, or is leased no more.
    pub fn begin(&self, key: SlotKey, abandon: &Abandon) -> bool {
        let mut inner = self.lock();
        if !inner.waiting.remove(&key) {
            return false;
        }
        abandon.clear();
        inner.in_hand = Some((key, abandon.clone()));
        true
    }

    /// Says that the slot in hand is done or abandoned.
    pub fn end(&self) {
        self.lock().in_hand = None;
    }

    /// Gives back those of the wanted slots that are not begun, and asks for the one in hand to be abandoned. Returns the
    /// answer to the coordinator, or None where it follows when the slot in hand is done or abandoned.
    pub fn give_back(&self, withdraw: v1::Withdraw) -> Result<Option<v1::Withdrawn>, WireError> {
        let v1::Withdraw {
            generation, step, ..
        } = withdraw;
        let kind = PlanKind::from_wire(withdraw.kind)?;
        let slots = withdraw.slots.into_iter();
        let slots = self.withdraw(slots.map(|slot| SlotKey {
            generation,
            kind,
            step,
            slot,
        }));
        let withdrawn = v1::Withdrawn {
            generation,
            step,
            kind: kind.to_wire(),
            slots,
        };
        Ok(Some(withdrawn).filter(|withdrawn| !withdrawn.slots.is_empty()))
    }

    fn withdraw(&self, keys: impl Iterator<Item = SlotKey>) -> Vec<u32> {
        let mut inner = self.lock();
        let mut given_back = Vec::new();
        for key in keys {
            if inner.waiting.remove(&key) {
                given_back.push(key.slot);
            } else if let Some((in_hand, abandon)) = &inner.in_hand
                && *in_hand == key
            {
                abandon.ask();
            }
        }
        given_back
    }

    /// A poisoned lock only says that another thread panicked; the sets are valid at every moment.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(slot: u32) -> SlotKey {
        SlotKey {
            generation: 1,
            kind: PlanKind::Train,
            step: 0,
            slot,
        }
    }

    #[test]
    fn a_slot_is_either_begun_or_given_back() {
        let (leases, abandon) = (Leases::default(), Abandon::default());
        assert!(leases.add([1, 2, 3].map(key).into_iter()));
        assert!(leases.begin(key(1), &abandon));
        assert_eq!(leases.withdraw([1, 3].map(key).into_iter()), [3]);
        assert!(abandon.is_asked());
        leases.end();
        assert!(!leases.begin(key(3), &abandon));
        assert!(leases.begin(key(2), &abandon));
        assert!(!abandon.is_asked(), "that was another slot");
        leases.end();
        assert_eq!(leases.withdraw([2].map(key).into_iter()), [0; 0]);
    }

    #[test]
    fn what_was_leased_before_a_new_generation_is_not_begun() {
        let (leases, abandon) = (Leases::default(), Abandon::default());
        leases.add([key(1)].into_iter());
        leases.clear();
        assert!(!leases.begin(key(1), &abandon));
        let newer = SlotKey {
            generation: 2,
            ..key(1)
        };
        leases.add([newer].into_iter());
        assert!(!leases.begin(key(1), &abandon));
        assert!(leases.begin(newer, &abandon));
    }

    #[test]
    fn leases_are_bounded() {
        let leases = Leases::default();
        assert!(leases.add((0..MAX_LEASES as u32).map(key)));
        assert!(!leases.add([key(MAX_LEASES as u32)].into_iter()));
    }
}
