//! Workers that were asked to stop.

/// A worker that was asked to stop.
#[derive(Debug)]
pub struct Draining {
    pub(in crate::cluster) reason: String,
    /// Whether it was asked for the committed state, as nobody else has it.
    pub(in crate::cluster) was_asked: bool,
    /// Whether it is not to come back, because others cannot reach it.
    pub(in crate::cluster) is_at_fault: bool,
}
