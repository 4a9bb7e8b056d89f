//! The time in which the workers of an earlier term may come back.

use std::time::Instant;

use crate::cluster::settings::PreviousTerms;

/// The time in which the workers of an earlier term may come back before the run begins without them.
#[derive(Debug)]
pub struct RejoinWindow {
    /// Number of workers that may come back.
    pub(in crate::cluster) expected: usize,
    /// When the first one came back with more than the newest checkpoint.
    pub(in crate::cluster) united: Option<Instant>,
    /// Whether the user was told of the waiting.
    pub(in crate::cluster) was_told: bool,
}

impl RejoinWindow {
    /// The time to wait for workers of earlier terms; None where nothing is to be gained by waiting.
    pub fn of(earlier: &PreviousTerms, start_step: u64) -> Option<Self> {
        (earlier.recorded > start_step && earlier.workers > 0).then_some(Self {
            expected: earlier.workers,
            united: None,
            was_told: false,
        })
    }
}
