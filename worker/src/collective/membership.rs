//! Who takes part in a generation.

use std::time::Duration;

use super::error::CollectiveError;

/// Who takes part in a generation, as seen by one member.
#[derive(Clone, Debug)]
pub struct Membership {
    /// Of job, run and term: connections of others are refused.
    pub run_id: [u8; 32],
    pub generation: u64,
    pub rank: u32,
    /// By rank.
    pub members: Vec<PeerAddress>,
    /// A peer that cannot be reached for so long, or that sends and takes nothing in the midst of a transfer, is given
    /// up.
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

#[derive(Clone, Debug)]
pub struct PeerAddress {
    pub name: String,
    /// `HOST:PORT`
    pub address: String,
}
