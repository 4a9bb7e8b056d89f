//! Who takes part in a generation.

use std::time::Duration;

use super::error::CollectiveError;

/// Who takes part in a generation, as seen by one member.
#[derive(Clone, Debug)]
pub struct Membership {
    /// Identifies job, run and term: connections of others are refused.
    pub run_id: [u8; 32],
    pub generation: u64,
    pub rank: u32,
    /// The members by rank, this worker included.
    pub members: Vec<PeerAddress>,
    /// Time after which a peer is given up that cannot be reached, or that sends and takes nothing in the midst of a transfer.
    pub silence: Duration,
}

impl Membership {
    pub(super) fn blame(&self, rank: u32, reason: &str) -> CollectiveError {
        let member = self.members.get(rank as usize);
        CollectiveError::Peer {
            rank,
            name: member.map_or_else(String::new, |member| member.name.clone()),
            reason: reason.to_owned(),
        }
    }
}

/// A worker that takes part in a generation: its name for messages, and where its exchange listens.
#[derive(Clone, Debug)]
pub struct PeerAddress {
    pub name: String,
    /// Where the worker's exchange listens, `HOST:PORT`.
    pub address: String,
}
