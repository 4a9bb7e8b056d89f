//! What can go wrong between workers.

use std::net::IpAddr;

use thiserror::Error;

/// Why workers could not exchange gradients or states.
#[derive(Clone, Debug, Error)]
pub enum CollectiveError {
    /// The generation is over: a newer one began, or the worker is on its way out.
    #[error("the exchange was given up because its generation is over")]
    Superseded,
    #[error("{name} (rank {rank}): {reason}")]
    Peer {
        rank: u32,
        name: String,
        reason: String,
    },
    #[error("the slots held for step {step} do not make it up: {reason}")]
    Slots { step: u64, reason: String },
    #[error("cannot listen for other workers on {host}: {reason}")]
    Listen { host: IpAddr, reason: String },
    #[error(
        "port {port} for the exchange with other workers is taken on this machine, by another worker or program: give each \
         worker here an --exchange-port of its own, or leave it out to get a free one"
    )]
    PortInUse { port: u16 },
}
