//! What the current generation exchanges over, and whether NCCL can still be used.

use std::time::Instant;

use super::probing::broken_exchanges::PEER_LOST_GRACE;

/// What the current generation exchanges over, and whether NCCL can still be used.
#[derive(Debug, Default)]
pub struct Transport {
    /// Whether the current generation exchanges over NCCL.
    is_nccl: bool,
    /// Whether the identifier of its communicator was sent to its members.
    is_identified: bool,
    /// When and why NCCL failed in this generation, while it is not known yet whether a lost member is the cause.
    failed: Option<(Instant, String)>,
    /// Why NCCL is not used any more in this term: it failed although every member was still there.
    given_up: Option<String>,
    /// The reason for TCP that the user was told last.
    told: String,
}

impl Transport {
    /// Why NCCL is not used any more in this term.
    pub fn given_up(&self) -> Option<&str> {
        self.given_up.as_deref()
    }

    /// Notes what the generation that begins exchanges over.
    pub fn begin(&mut self, is_nccl: bool) {
        self.is_nccl = is_nccl;
        self.is_identified = false;
        self.failed = None;
    }

    /// Whether the current generation exchanges over NCCL.
    pub fn is_nccl(&self) -> bool {
        self.is_nccl
    }

    /// Whether the user is to be told of this reason for TCP. True once in a row.
    pub fn takes_reason(&mut self, reason: &str) -> bool {
        let is_new = self.told != reason;
        if is_new {
            reason.clone_into(&mut self.told);
        }
        is_new
    }

    /// Whether the identifier of the communicator is awaited.
    pub fn awaits_identifier(&self) -> bool {
        self.is_nccl && !self.is_identified
    }

    /// Notes that the members are sent the identifier of the communicator.
    pub fn note_identified(&mut self) {
        self.is_identified = true;
    }

    /// Notes that NCCL failed. The first failure of a generation counts.
    pub fn note_failure(&mut self, now: Instant, reason: String) {
        self.failed.get_or_insert((now, reason));
    }

    /// Drops a failure of NCCL: a member may be lost, which was not NCCL's fault.
    pub fn forgive_failure(&mut self) {
        self.failed = None;
    }

    /// When NCCL failed and when that may be judged, while it is not known whether a lost member is the cause.
    pub fn failure(&self) -> Option<(Instant, Instant)> {
        let (since, _) = self.failed.as_ref()?;
        Some((*since, *since + PEER_LOST_GRACE))
    }

    /// Gives NCCL up for this term because of the failure that was noted.
    pub fn give_up(&mut self) {
        if let Some((_, reason)) = self.failed.take() {
            self.given_up = Some(reason);
        }
    }
}
