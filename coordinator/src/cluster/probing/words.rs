//! What is said of workers that do not reach each other: the pair, the address, and what to open.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::cluster::Cluster;
use crate::cluster::command::Command;
use crate::cluster::event::WorkerId;
use crate::events::RunEvent;

/// Names in one line.
const MAX_NAMED: usize = 4;
/// Pairs that are told of within a while. The group that goes on is told in any case.
const MAX_TOLD: u32 = 8;
const TOLD_AGAIN: Duration = Duration::from_secs(30);

impl Cluster {
    pub(super) fn tell_failures(
        &mut self,
        now: Instant,
        from: WorkerId,
        news: &[WorkerId],
        commands: &mut Vec<Command>,
    ) {
        for to in news {
            let (since, told) = self.probing.told_pairs.unwrap_or((now, 0));
            let told = match now.duration_since(since) < TOLD_AGAIN {
                true if told >= MAX_TOLD => return,
                true => (since, told + 1),
                false => (now, 1),
            };
            self.probing.told_pairs = Some(told);
            let Some(reason) = self.probing.reachability.failure(from, *to) else {
                continue;
            };
            let (name, address) = (self.members.name(*to), self.address_of(*to));
            let advice = advice(name, address, self.address_of(from));
            let from = self.members.name(from);
            let text = format!(
                "worker {from} cannot reach worker {name} at {address}: {reason}; {advice}"
            );
            commands.push(Command::Emit(RunEvent::Notice(text)));
        }
    }

    pub(super) fn tell_group(
        &mut self,
        outsiders: &BTreeSet<WorkerId>,
        commands: &mut Vec<Command>,
    ) {
        let before = self.probing.told_group.clone().unwrap_or_default();
        if *outsiders == before {
            return;
        }
        self.probing.told_group = Some(outsiders.clone());
        let here = self.members.count();
        let text = match outsiders.is_empty() {
            true if before.iter().all(|id| self.members.get(*id).is_none()) => return,
            true => format!("all {here} workers reach each other again"),
            false => {
                let names = outsiders.iter().take(MAX_NAMED);
                let names: Vec<&str> = names.map(|id| self.members.name(*id)).collect();
                let more = match outsiders.len() > names.len() {
                    true => " and others",
                    false => "",
                };
                format!(
                    "{} of {here} workers reach each other and take part; tried again from time to time: {}{more}",
                    here - outsiders.len(),
                    names.join(", ")
                )
            }
        };
        commands.push(Command::Emit(RunEvent::Notice(text)));
    }

    /// One of those who are here and take no part, for a reminder.
    pub(in crate::cluster) fn tell_outsider(&self, commands: &mut Vec<Command>) {
        if let Some(id) = self.outsiders().first() {
            let (name, reason) = (self.members.name(*id), self.why_outside(*id));
            let text = format!("worker {name} is here but takes no part: {reason}");
            commands.push(Command::Emit(RunEvent::Notice(text)));
        }
    }

    /// Names the address and what to do.
    pub(super) fn why_outside(&self, id: WorkerId) -> String {
        let Some((from, to, reason)) = self.probing.reachability.reason_of(id) else {
            return "other workers cannot exchange with it".to_owned();
        };
        let advice = advice(
            self.members.name(to),
            self.address_of(to),
            self.address_of(from),
        );
        match to == id {
            true => format!(
                "worker {} cannot reach it at {}: {reason}; {advice}",
                self.members.name(from),
                self.address_of(to)
            ),
            false => format!(
                "it cannot reach worker {} at {}: {reason}; {advice}",
                self.members.name(to),
                self.address_of(to)
            ),
        }
    }

    pub(super) fn address_of(&self, id: WorkerId) -> &str {
        self.members.get(id).map_or("", |worker| &worker.address)
    }
}

/// What to do where `from` does not reach a worker at this address.
fn advice(name: &str, address: &str, from: &str) -> String {
    if is_loopback(address) && !is_loopback(from) {
        return format!(
            "it joined over the loopback: let {name} join by an address of the coordinator's machine that others use too"
        );
    }
    format!(
        "open that port, or start {name} with --exchange-host HOST and --exchange-port PORT that others reach"
    )
}

fn is_loopback(address: &str) -> bool {
    let address = address.parse::<std::net::SocketAddr>();
    address.is_ok_and(|address| address.ip().is_loopback())
}
