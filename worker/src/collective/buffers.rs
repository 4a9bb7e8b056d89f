//! Buffers for parts on their way, which one exchange leaves to the next: fresh memory costs a fault a page.
//!
//! In: buffers of no more use. Out: buffers of a length, with whatever bytes. Keeps a bounded number.

use std::sync::Mutex;

use super::lock::lock;

/// Buffers that are kept at most: about a MiB each.
const KEPT: usize = 16;

#[derive(Default)]
pub(super) struct Buffers(Mutex<Vec<Vec<u8>>>);

impl Buffers {
    /// The one that was used last, as it may still be in a cache.
    pub fn take(&self, length: usize) -> Vec<u8> {
        let kept = lock(&self.0).pop();
        let mut buffer = kept
            .filter(|kept| kept.len() >= length)
            .unwrap_or_else(|| vec![0; length]);
        buffer.truncate(length);
        buffer
    }

    pub fn give(&self, buffer: Vec<u8>) {
        let mut kept = lock(&self.0);
        if kept.len() < KEPT {
            kept.push(buffer);
        }
    }
}
