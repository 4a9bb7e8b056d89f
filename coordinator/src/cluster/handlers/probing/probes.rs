//! Probes: who is asked to call whom, what the answers change, and when it is tried again.
//!
//! In: newcomers, answers and time. Out: [`Command::SendProbe`], and what is known of who reaches whom. Whom that keeps out is
//! [`super::decisions`]' to say.

use std::time::Instant;

use proto::v1;

use crate::cluster::Cluster;
use crate::cluster::command::Command;
use crate::cluster::event::WorkerId;
use crate::cluster::parts::probing::probes::MAX_PROBED;

impl Cluster {
    /// Has a newcomer and those who are here try each other.
    pub(in crate::cluster::handlers) fn probe_newcomer(
        &mut self,
        now: Instant,
        id: WorkerId,
        commands: &mut Vec<Command>,
    ) {
        let others: Vec<WorkerId> = self
            .members
            .ids()
            .into_iter()
            .filter(|other| *other != id && !self.probing.is_set_aside(*other))
            .collect();
        let step = others.len().div_ceil(MAX_PROBED).max(1);
        let others: Vec<WorkerId> = others.into_iter().step_by(step).collect();
        self.try_each_other(now, id, &others, Some(id), commands);
    }

    /// Has a follower that lost its source, and that source, try each other: it may be out of reach.
    pub(in crate::cluster::handlers) fn try_source(
        &mut self,
        now: Instant,
        id: WorkerId,
        source: WorkerId,
        commands: &mut Vec<Command>,
    ) {
        self.try_each_other(now, id, &[source], Some(id), commands);
    }

    /// A worker answered a probe.
    pub(in crate::cluster::handlers) fn probed(
        &mut self,
        now: Instant,
        id: WorkerId,
        probed: &v1::Probed,
        commands: &mut Vec<Command>,
    ) {
        if self.probing.answer(id, probed) {
            self.regard_news(now, commands);
            self.mend_if_due(now, commands);
        }
    }

    /// Does what is due by the clock: answers that did not come, further tries, an exchange to be made again.
    pub(in crate::cluster::handlers) fn tick_probes(
        &mut self,
        now: Instant,
        commands: &mut Vec<Command>,
    ) {
        self.probing.expire(now);
        for id in self.probing.due_retries(now) {
            let is_idle = self.generation.is_waiting();
            let partners = self.probing.try_again(now, id, is_idle);
            self.try_each_other(now, id, &partners, Some(id), commands);
        }
        self.regard_news(now, commands);
        self.mend_if_due(now, commands);
    }

    fn try_each_other(
        &mut self,
        now: Instant,
        id: WorkerId,
        others: &[WorkerId],
        newcomer: Option<WorkerId>,
        commands: &mut Vec<Command>,
    ) {
        for other in others {
            self.probe(now, *other, &[id], newcomer, commands);
        }
        self.probe(now, id, others, newcomer, commands);
    }

    /// Asks `from` to try the exchange addresses of `to`; `newcomer` is whom the round is about.
    pub(super) fn probe(
        &mut self,
        now: Instant,
        from: WorkerId,
        to: &[WorkerId],
        newcomer: Option<WorkerId>,
        commands: &mut Vec<Command>,
    ) {
        let member = |id: &WorkerId| {
            let worker = self.members.get(*id)?;
            Some(v1::Member {
                worker: id.0,
                name: worker.name.clone(),
                address: worker.address.clone(),
            })
        };
        let members: Vec<v1::Member> = to.iter().filter_map(member).collect();
        if members.is_empty() || self.members.get(from).is_none() {
            return;
        }
        let number = self.probing.ask(now, from, to, newcomer);
        commands.push(Command::SendProbe {
            worker: from,
            probe: v1::Probe { number, members },
        });
    }
}
