//! The generation: whether anything is computed, and which losses lead to the next one.

use std::time::Duration;

/// Time between two reminders that workers are missing.
pub(in crate::cluster) const REMINDER: Duration = Duration::from_secs(30);
/// A member lost within this time after a generation began waits for other losses, so that all share the next generation.
pub const LOSSES_GATHER: Duration = Duration::from_millis(150);
/// [`LOSSES_GATHER`] per member of a large cluster: to tell a thousand members of a generation takes a while, and so does to
/// hear of a hundred losses.
pub(in crate::cluster) const LOSSES_GATHER_PER_MEMBER: Duration = Duration::from_millis(2);

/// Whether anything is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Nothing can be computed: too few workers are ready.
    Waiting,
    Running,
    Ended,
}
