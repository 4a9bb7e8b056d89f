//! What the user is told of workers that do not reach each other: the pair, the address, and what to open.

use std::collections::BTreeSet;
use std::time::Instant;

use crate::cluster::Cluster;
use crate::cluster::command::Command;
use crate::cluster::event::WorkerId;
use crate::cluster::run_event::RunEvent;

/// Most names in one line.
const MAX_NAMED: usize = 4;

impl Cluster {
    /// Tells the user each pair that was found to fail, unless the same was said a moment ago.
    pub(super) fn tell_failures(&mut self, now: Instant, commands: &mut Vec<Command>) {
        for (from, to) in self.probing.take_new_failures() {
            let Some(reason) = self.probing.reachability().failure(from, to) else {
                continue;
            };
            let (name, address) = (self.members.name(to), self.address_of(to));
            let advice = advice(name, address, self.address_of(from));
            let from = self.members.name(from);
            let text = format!(
                "worker {from} cannot reach worker {name} at {address}: {reason}; {advice}"
            );
            if self.probing.takes_notice(now, &text) {
                commands.push(Command::Emit(RunEvent::Notice(text)));
            }
        }
    }

    /// Tells the user which workers go on together, where that has changed.
    pub(super) fn tell_group(
        &mut self,
        outsiders: &BTreeSet<WorkerId>,
        commands: &mut Vec<Command>,
    ) {
        let name = |id: &WorkerId| self.members.name(*id).to_owned();
        let names: BTreeSet<String> = outsiders.iter().map(name).collect();
        let told = self.probing.told_group();
        // Whoever was sent away comes back in a moment, and is no news then; nor is it known yet whether it is reached.
        let all = self.members.ids();
        let is_back = |id: &WorkerId| told.contains(self.members.name(*id));
        let is_open = outsiders.is_empty()
            && (all.iter().any(|id| self.probing.is_awaited(*id)) || !all.iter().any(is_back));
        if names == *told || is_open {
            return;
        }
        let (here, need) = (all.len(), self.settings.min_workers);
        let text = match here - outsiders.len() {
            group if group == here => format!("all {here} workers reach each other again"),
            group => {
                let listed: Vec<&str> = names.iter().take(MAX_NAMED).map(String::as_str).collect();
                let more = match names.len() > listed.len() {
                    true => " and others",
                    false => "",
                };
                let goes_on = match group < need {
                    true => format!(", and {need} are needed"),
                    false => " and take part".to_owned(),
                };
                format!(
                    "{group} of {here} workers reach each other{goes_on}; tried again from time to time: {}{more}",
                    listed.join(", ")
                )
            }
        };
        self.probing.note_told_group(names);
        commands.push(Command::Emit(RunEvent::Notice(text)));
    }

    /// Tells the user of one worker that is here and takes no part, for a reminder.
    pub(in crate::cluster::handlers) fn tell_outsider(&self, commands: &mut Vec<Command>) {
        if let Some(id) = self.outsiders().first() {
            let (name, reason) = (self.members.name(*id), self.why_outside(*id));
            let text = format!("worker {name} is here but takes no part: {reason}");
            commands.push(Command::Emit(RunEvent::Notice(text)));
        }
    }

    /// Why a worker is left out: who did not reach whom at which address, and what to do.
    pub(super) fn why_outside(&self, id: WorkerId) -> String {
        let Some((from, to, reason)) = self.probing.reachability().reason_of(id) else {
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
    if address.parse::<std::net::SocketAddr>().is_err() {
        return format!(
            "see that the name resolves there and open that port, or start {name} with --exchange-host and an address that \
             others reach"
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
