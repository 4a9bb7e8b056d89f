//! Pauses that grow.

use std::time::Duration;

/// The pause after `count` earlier ones: each is twice as long as the one before, up to `longest`.
pub fn doubled(first: Duration, count: u32, longest: Duration) -> Duration {
    (first * 2u32.pow(count.min(16))).min(longest)
}
