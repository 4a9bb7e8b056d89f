//! Probes: who is asked to call whom, what the answers change, and when it is tried again.
//!
//! In: newcomers, answers and time. Out: [`Command::SendProbe`], and what is known of who reaches whom. Whom that keeps out is
//! [`super::decisions`]' to say.

use std::time::Instant;

use proto::v1;

use super::{ANSWER_LIMIT, Asked, FIRST_RETRY, LONGEST_RETRY, MAX_PROBED, Waiting, pause};
use crate::cluster::Cluster;
use crate::cluster::command::Command;
use crate::cluster::event::WorkerId;

impl Cluster {
    /// Has a newcomer and those who are here try each other.
    pub(in crate::cluster) fn probe_newcomer(
        &mut self,
        now: Instant,
        id: WorkerId,
        commands: &mut Vec<Command>,
    ) {
        let others: Vec<WorkerId> = self
            .members
            .ids()
            .into_iter()
            .filter(|other| *other != id && !self.probing.waiting.contains_key(other))
            .collect();
        let step = others.len().div_ceil(MAX_PROBED).max(1);
        let others: Vec<WorkerId> = others.into_iter().step_by(step).collect();
        self.try_each_other(now, id, &others, Some(id), commands);
    }

    /// A follower lost its source, which may be out of its reach.
    pub(in crate::cluster) fn try_source(
        &mut self,
        now: Instant,
        id: WorkerId,
        source: WorkerId,
        commands: &mut Vec<Command>,
    ) {
        self.try_each_other(now, id, &[source], Some(id), commands);
    }

    pub(in crate::cluster) fn probed(
        &mut self,
        now: Instant,
        id: WorkerId,
        probed: &v1::Probed,
        commands: &mut Vec<Command>,
    ) {
        let is_asked = |asked: &Asked| asked.from == id;
        if !self.probing.asked.get(&probed.number).is_some_and(is_asked) {
            return;
        }
        let Some(asked) = self.probing.take(probed.number) else {
            return;
        };
        let mut news = Vec::new();
        // Whether anything may be different now.
        let newcomer = asked.newcomer;
        let mut is_news = newcomer.is_none_or(|newcomer| !self.probing.is_awaited(newcomer));
        for to in asked.to {
            let unreached = probed.unreached.iter().find(|one| one.worker == to.0);
            let reachability = &mut self.probing.reachability;
            match unreached {
                Some(unreached) => {
                    is_news = true;
                    if reachability.fail(id, to, &unreached.reason) {
                        news.push(to);
                    }
                }
                None => is_news |= reachability.succeed(id, to),
            }
        }
        self.tell_failures(now, id, &news, commands);
        if is_news {
            self.regard_reach(now, commands);
        }
        self.mend_if_due(now, commands);
    }

    /// What is due by the clock: answers that did not come, tries again, an exchange to be made again.
    pub(in crate::cluster) fn tick_probes(&mut self, now: Instant, commands: &mut Vec<Command>) {
        let expired = self.probing.expire(now);
        let due = |(id, waiting): (&WorkerId, &Waiting)| (waiting.retry_at <= now).then_some(*id);
        let due: Vec<WorkerId> = self.probing.waiting.iter().filter_map(due).collect();
        for id in &due {
            self.try_again(now, *id, commands);
        }
        if expired || !due.is_empty() {
            self.regard_reach(now, commands);
        }
        self.mend_if_due(now, commands);
    }

    fn try_again(&mut self, now: Instant, id: WorkerId, commands: &mut Vec<Command>) {
        if let Some(waiting) = self.probing.waiting.get_mut(&id) {
            waiting.retry_at = now + pause(FIRST_RETRY, waiting.tries, LONGEST_RETRY);
            waiting.tries += 1;
        }
        let partners = self.probing.reachability.partners(id);
        let partners: Vec<WorkerId> = partners.into_iter().take(MAX_PROBED).collect();
        self.try_each_other(now, id, &partners, Some(id), commands);
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
        let number = self.probing.ask(Asked {
            from,
            to: to.to_vec(),
            newcomer,
            due: now + ANSWER_LIMIT,
        });
        commands.push(Command::SendProbe {
            worker: from,
            probe: v1::Probe { number, members },
        });
    }
}
