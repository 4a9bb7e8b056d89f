//! What the current generation exchanges over, and whether NCCL can still be used.

use std::time::Instant;

/// What the current generation exchanges over, and whether NCCL can still be used.
#[derive(Debug, Default)]
pub struct Transport {
    /// Whether the current generation exchanges over NCCL.
    pub(in crate::cluster) is_nccl: bool,
    /// Whether the identifier of its communicator was sent to its members.
    pub(in crate::cluster) is_identified: bool,
    /// When and why NCCL failed in this generation, while it is not known yet whether a lost member is the cause.
    pub(in crate::cluster) failed: Option<(Instant, String)>,
    /// Why NCCL is not used any more in this term: it failed although every member was still there.
    pub(in crate::cluster) given_up: Option<String>,
    /// The reason for TCP that the user was told last.
    pub(in crate::cluster) told: String,
}
