//! Buffers for parts in transfer, which one exchange leaves to the next: fresh memory costs a page fault for each page.
//!
//! In: buffers of no more use. Out: buffers of a length, with whatever bytes. Keeps a bounded number.

use std::sync::Mutex;

use super::lock::lock;

/// Most buffers that are kept, of about a MiB each.
const KEPT: usize = 16;

/// Buffers kept from one exchange to the next.
#[derive(Default)]
pub(super) struct Buffers(Mutex<Vec<Vec<u8>>>);

impl Buffers {
    /// A buffer of `length` bytes, whatever they are: the one used last where there is one, as it may still be in a cache.
    pub fn take(&self, length: usize) -> Vec<u8> {
        let kept = lock(&self.0).pop();
        let mut buffer = kept
            .filter(|kept| kept.len() >= length)
            .unwrap_or_else(|| vec![0; length]);
        buffer.truncate(length);
        buffer
    }

    /// Keeps a buffer for later, unless enough are kept.
    pub fn give(&self, buffer: Vec<u8>) {
        let mut kept = lock(&self.0);
        if kept.len() < KEPT {
            kept.push(buffer);
        }
    }
}
