//! Members of a mesh over the loopback, all in this process.
#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use worker::collective::{Collective, Membership, PeerAddress};

pub const HOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
pub const SILENCE: Duration = Duration::from_secs(20);
pub const RUN_ID: [u8; 32] = [7; 32];

pub fn collectives(size: usize) -> Vec<Arc<Collective>> {
    (0..size)
        .map(|_| Arc::new(Collective::bind(HOST).unwrap()))
        .collect()
}

pub fn addresses(collectives: &[Arc<Collective>]) -> Vec<PeerAddress> {
    let peers = collectives.iter().enumerate();
    peers
        .map(|(rank, collective)| PeerAddress {
            name: format!("worker-{rank}"),
            address: format!("127.0.0.1:{}", collective.port()),
        })
        .collect()
}

pub fn enter(collectives: &[Arc<Collective>], generation: u64) {
    enter_with(collectives, generation, SILENCE);
}

pub fn enter_with(collectives: &[Arc<Collective>], generation: u64, silence: Duration) {
    let members = addresses(collectives);
    for (rank, collective) in collectives.iter().enumerate() {
        collective.enter(Membership {
            run_id: RUN_ID,
            generation,
            rank: rank as u32,
            members: members.clone(),
            silence,
        });
    }
}
