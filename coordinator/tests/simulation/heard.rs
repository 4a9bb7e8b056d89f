//! What a worker has heard from its coordinator, so that it can be seen whether it obeys what it knows to be over.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Shared by a worker's sessions and what computes for it.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    /// The newest generation; above all of them between two sessions.
    pub newest_generation: Arc<AtomicU64>,
    /// Generation of the newest lease, by step and slot of the training.
    leased: Arc<Mutex<BTreeMap<(u64, u32), u64>>>,
}

impl Heard {
    pub fn leased(&self, step: u64, slot: u32, generation: u64) {
        let mut leased = self.leased.lock().unwrap_or_else(PoisonError::into_inner);
        leased.insert((step, slot), generation);
    }

    /// Whether nothing newer is known than the lease of this slot.
    pub fn is_due(&self, step: u64, slot: u32) -> bool {
        let leased = self.leased.lock().unwrap_or_else(PoisonError::into_inner);
        let generation = leased.get(&(step, slot));
        generation.is_some_and(|generation| self.is_newest(*generation))
    }

    pub fn is_newest(&self, generation: u64) -> bool {
        self.newest_generation.load(Ordering::SeqCst) == generation
    }
}
