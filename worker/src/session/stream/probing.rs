//! Whom this worker reaches, when the coordinator asks for it.
//!
//! In: the workers to be tried. Out: those that were not reached, on the session, from a thread that holds nothing else up.

use common::wire::{WireError, up};
use proto::v1;
use proto::v1::worker_message::Message as Up;

use crate::collective::PeerAddress;
use crate::collective::probe::{MAX_PEERS, Target, probe};
use crate::session::stream::Forwarder;

impl Forwarder {
    /// Tries to reach the workers named, on a thread of its own, and reports those that were not reached.
    pub(super) fn probe(&self, order: v1::Probe) -> Result<(), WireError> {
        if order.members.len() > MAX_PEERS {
            let (field, found) = ("probe", format!("{} members", order.members.len()));
            return Err(WireError::Invalid { field, found });
        }
        let (run_id, own, session) = (self.run_id, self.worker, self.up.clone());
        std::thread::spawn(move || {
            let target = |member: v1::Member| Target {
                worker: member.worker,
                peer: PeerAddress {
                    name: member.name,
                    address: member.address,
                },
            };
            let targets: Vec<Target> = order.members.into_iter().map(target).collect();
            let unreached = |(worker, reason): (u64, String)| v1::Unreached { worker, reason };
            let failed = probe(run_id, own, &targets);
            let probed = v1::Probed {
                number: order.number,
                unreached: failed.into_iter().map(unreached).collect(),
            };
            // Where it cannot be said, the session is over.
            let _ = session.blocking_send(up(Up::Probed(probed)));
        });
        Ok(())
    }
}
