//! Giving up a slot half-way, asked for from another thread. The pass looks between layers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Shared between who computes and who may ask it to stop.
#[derive(Clone, Debug, Default)]
pub struct Abandon(Arc<AtomicBool>);

impl Abandon {
    pub fn ask(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Before another slot.
    pub fn clear(&self) {
        self.0.store(false, Ordering::SeqCst);
    }

    pub fn is_asked(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}
