//! Probes: who is asked to call whom, what the answers change, and when it is tried again.
//!
//! In: newcomers, answers and time. Out: [`Command::SendProbe`], and what is known of who reaches whom. Whom that keeps out is
//! [`super::decisions`]' to say.

use std::time::Instant;

use proto::v1;

use crate::cluster::Cluster;
use crate::cluster::command::Command;
use crate::cluster::event::WorkerId;
use crate::cluster::parts::probing::{
    ANSWER_LIMIT, Asked, FIRST_RETRY, LONGEST_RETRY, LONGEST_RETRY_IDLE, MAX_PROBED, PendingReply,
    Waiting, pause,
};

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

    /// Has a follower that lost its source, and that source, try each other: it may be out of reach.
    pub(in crate::cluster) fn try_source(
        &mut self,
        now: Instant,
        id: WorkerId,
        source: WorkerId,
        commands: &mut Vec<Command>,
    ) {
        self.try_each_other(now, id, &[source], Some(id), commands);
    }

    /// A worker answered a probe.
    pub(in crate::cluster) fn probed(
        &mut self,
        now: Instant,
        id: WorkerId,
        probed: &v1::Probed,
        commands: &mut Vec<Command>,
    ) {
        let asked = self.probing.asked.get(&probed.number);
        let Some(asked) = asked.filter(|asked| asked.from == id) else {
            return;
        };
        let answer = |to: &WorkerId| {
            let unreached = probed.unreached.iter().find(|one| one.worker == to.0);
            PendingReply {
                from: id,
                to: *to,
                failure: unreached.map(|unreached| unreached.reason.clone()),
            }
        };
        let answers = asked.to.iter().map(answer).collect();
        self.probing.finish(probed.number, answers);
        self.regard_news(now, commands);
        self.mend_if_due(now, commands);
    }

    /// Does what is due by the clock: answers that did not come, further tries, an exchange to be made again.
    pub(in crate::cluster) fn tick_probes(&mut self, now: Instant, commands: &mut Vec<Command>) {
        self.probing.expire(now);
        let due = |(id, waiting): (&WorkerId, &Waiting)| (waiting.retry_at <= now).then_some(*id);
        let due: Vec<WorkerId> = self.probing.waiting.iter().filter_map(due).collect();
        for id in &due {
            self.try_again(now, *id, commands);
        }
        self.probing.has_news |= !due.is_empty();
        self.regard_news(now, commands);
        self.mend_if_due(now, commands);
    }

    /// Has a worker that waits and those with whom it fails try each other: so many at a time, in turn, until all were tried.
    fn try_again(&mut self, now: Instant, id: WorkerId, commands: &mut Vec<Command>) {
        let is_awaited = self.probing.is_awaited(id);
        let Some(waiting) = self.probing.waiting.get_mut(&id) else {
            return;
        };
        waiting.retry_at = now + FIRST_RETRY;
        if is_awaited {
            return;
        }
        let partners = self.probing.reachability.partners(id);
        waiting.tried.retain(|one| partners.contains(one));
        let untried = partners.difference(&waiting.tried).copied();
        let untried: Vec<WorkerId> = untried.take(MAX_PROBED).collect();
        waiting.tried.extend(&untried);
        if waiting.tried == partners {
            waiting.tried.clear();
            let longest = match self.generation.is_waiting() {
                true => LONGEST_RETRY_IDLE,
                false => LONGEST_RETRY,
            };
            waiting.retry_at = now + pause(FIRST_RETRY, waiting.tries, longest);
            waiting.tries += 1;
        }
        self.try_each_other(now, id, &untried, Some(id), commands);
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
    pub(in crate::cluster) fn probe(
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
