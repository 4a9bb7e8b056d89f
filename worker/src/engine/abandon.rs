//! Giving up a slot half-way, asked for from another thread. The pass looks between layers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A request to give up the slot in hand, shared between the thread that computes it and those that may ask.
#[derive(Clone, Debug, Default)]
pub struct Abandon {
    asked: Arc<AtomicBool>,
    #[cfg(test)]
    looks_left: Arc<std::sync::atomic::AtomicUsize>,
}

impl Abandon {
    /// Asks for the slot in hand to be given up.
    pub fn ask(&self) {
        self.asked.store(true, Ordering::SeqCst);
    }

    /// Withdraws the request, before another slot.
    pub fn clear(&self) {
        self.asked.store(false, Ordering::SeqCst);
        #[cfg(test)]
        self.looks_left.store(0, Ordering::SeqCst);
    }

    /// Returns whether the slot in hand is to be given up.
    pub fn is_asked(&self) -> bool {
        #[cfg(test)]
        self.look();
        self.asked.load(Ordering::SeqCst)
    }

    /// Asks by itself at the `look`-th call of `is_asked` from now on, the first being 1.
    #[cfg(test)]
    pub fn ask_at_look(&self, look: usize) {
        self.clear();
        self.looks_left.store(look, Ordering::SeqCst);
    }

    #[cfg(test)]
    fn look(&self) {
        let left = self.looks_left.load(Ordering::SeqCst);
        self.looks_left
            .store(left.saturating_sub(1), Ordering::SeqCst);
        if left == 1 {
            self.ask();
        }
    }
}
