//! Decides who takes part, who waits and who has to go, by what is known of who reaches whom.
//!
//! In: what probes and broken exchanges left in [`Probing`](crate::cluster::parts::probing::Probing). Out: members sent away,
//! newcomers set aside or refused, new generations. It asks nobody anything.

use std::collections::BTreeSet;
use std::time::Instant;

use proto::v1;

use crate::cluster::Cluster;
use crate::cluster::command::Command;
use crate::cluster::event::WorkerId;
use crate::cluster::parts::reachability::Candidate;

impl Cluster {
    /// Tells the user what probes found, and judges by it; also where it is about somebody who is gone.
    pub(in crate::cluster::handlers) fn regard_news(
        &mut self,
        now: Instant,
        commands: &mut Vec<Command>,
    ) {
        if self.probing.take_news() {
            self.tell_failures(now, commands);
            self.regard_reach(now, commands);
        }
    }

    /// Sends members away that do not fit any more, and sees to those who wait.
    pub(in crate::cluster::handlers) fn regard_reach(
        &mut self,
        now: Instant,
        commands: &mut Vec<Command>,
    ) {
        if self.generation.is_over() || self.term.is_stopping() {
            return;
        }
        let outsiders = self.outsiders();
        // While it is being found out who lost whom, nobody is judged.
        let is_open = self.probing.is_exchange_broken();
        if !is_open {
            self.tell_group(&outsiders, commands);
        }
        self.probing.keep_aside_only(&outsiders);
        let mut is_member_gone = false;
        for id in outsiders {
            if self.members.rank_of(id).is_some() {
                if is_open {
                    continue;
                }
                is_member_gone = true;
                self.remove_member(now, id, commands);
            } else {
                self.let_wait(now, id, commands);
            }
        }
        if self.generation.is_waiting() {
            self.start_generation(now, commands);
        } else if self.generation.is_running() && is_member_gone {
            self.reconfigure_if_member_lost(now, commands);
        } else if self.generation.is_running() && !is_open {
            self.release_state(now, commands);
        }
    }

    /// Newcomers that must not enter a generation now.
    pub(in crate::cluster::handlers) fn kept_out(&self) -> BTreeSet<WorkerId> {
        let mut kept_out = self.outsiders();
        for id in self.members.ids() {
            let Some(worker) = self.members.get(id) else {
                continue;
            };
            // Whoever brings a state was a member before.
            let is_awaited = !worker.rejoined_with_state && self.probing.is_awaited(id);
            if is_awaited || self.probing.is_absent(&worker.name) {
                kept_out.insert(id);
            }
        }
        kept_out
    }

    /// How many of those who are here may take part together.
    pub(in crate::cluster::handlers) fn usable_count(&self) -> usize {
        self.members.count() - self.outsiders().len()
    }

    /// Why a worker is refused when it comes back: it was sent away too often.
    pub(in crate::cluster::handlers) fn is_too_often_absent(&self, name: &str) -> Option<String> {
        let count = self.probing.too_many_absences(name)?;
        Some(format!(
            "it was sent away {count} times in a row because other workers could not exchange with it; see to its network, \
             then start it again"
        ))
    }

    /// The workers that would break every exchange of a generation. Whoever still loads is judged against those who are ready.
    pub(super) fn outsiders(&self) -> BTreeSet<WorkerId> {
        let reachability = self.probing.reachability();
        if reachability.is_empty() {
            return BTreeSet::new();
        }
        let candidates = self.ready_candidates();
        let mut outsiders = reachability.outsiders(&candidates);
        let (count, need) = (candidates.len(), self.settings.min_workers.max(1));
        let suffices = |out: &BTreeSet<WorkerId>| count - out.len() >= need;
        if !suffices(&outsiders) {
            // Rather what is known of an earlier step is computed again, to the same bits, than nothing at all.
            let anybody: Vec<Candidate> = candidates
                .iter()
                .map(|one| Candidate {
                    is_newest: false,
                    ..*one
                })
                .collect();
            let without = reachability.outsiders(&anybody);
            if suffices(&without) {
                outsiders = without;
            }
        }
        let ready: BTreeSet<WorkerId> = candidates.iter().map(|one| one.id).collect();
        let group: BTreeSet<WorkerId> = ready.difference(&outsiders).copied().collect();
        let fits = |id: &WorkerId| group.is_disjoint(&reachability.partners(*id));
        let loading = self.members.ids().into_iter();
        let loading = loading.filter(|id| !ready.contains(id));
        outsiders.extend(loading.filter(|id| !fits(id)));
        outsiders
    }

    /// All ready workers, as candidates for the next generation.
    fn ready_candidates(&self) -> Vec<Candidate> {
        let ids = self.members.ids();
        let ready = |id: &WorkerId| {
            self.members
                .get(*id)
                .filter(|worker| worker.ready.is_some())
        };
        let newest = ids.iter().filter_map(ready).map(|worker| worker.seen).max();
        let candidate = |id: &WorkerId| {
            let worker = ready(id)?;
            Some(Candidate {
                id: *id,
                is_member: self.members.rank_of(*id).is_some(),
                is_newest: Some(worker.seen) == newest,
            })
        };
        ids.iter().filter_map(candidate).collect()
    }

    /// Drains the holders of the newest state where more could go on without them and they are at fault themselves: they hand it
    /// over as a checkpoint, from which the others go on.
    fn release_state(&mut self, now: Instant, commands: &mut Vec<Command>) {
        let reachability = self.probing.reachability();
        if reachability.is_empty() {
            return;
        }
        let mut candidates = self.ready_candidates();
        let now_out = reachability.outsiders(&candidates);
        let holders = candidates.iter().filter(|one| one.is_newest);
        let holders: BTreeSet<WorkerId> = holders.map(|one| one.id).collect();
        for candidate in &mut candidates {
            candidate.is_newest = false;
        }
        let then_out = reachability.outsiders(&candidates);
        let is_better = then_out.len() < now_out.len() && holders.is_subset(&then_out);
        if !is_better || !holders.iter().all(|id| reachability.is_at_fault(*id)) {
            return;
        }
        for id in holders {
            let reason = self.why_outside(id);
            self.drain_at_fault(now, id, reason, commands);
        }
    }

    /// Sends a member away that does not fit: it loses what it has in hand, comes back as a newcomer and is tried again.
    fn remove_member(&mut self, now: Instant, id: WorkerId, commands: &mut Vec<Command>) {
        if !self.generation.is_running() {
            self.members.demote(id);
            self.progress.ledger_mut().release(id);
            return self.let_wait(now, id, commands);
        }
        let reason = self.why_outside(id);
        self.probing.note_absence(now, self.members.name(id));
        self.forget(id, &reason, commands);
        commands.push(Command::Expel { worker: id, reason });
    }

    /// Sets a worker aside that does not fit, or refuses it where it was tried often enough and its own address is at fault.
    fn let_wait(&mut self, now: Instant, id: WorkerId, commands: &mut Vec<Command>) {
        if self.probing.set_aside(now, id) {
            let reason = self.why_outside(id);
            let aside = v1::Aside { reason };
            commands.push(Command::SendAside { worker: id, aside });
        } else if let Some(tries) = self.probing.is_to_be_refused(now, id) {
            let reason = format!("{} (tried {tries} times)", self.why_outside(id));
            self.forget(id, &reason, commands);
            commands.push(Command::Refuse { worker: id, reason });
        }
    }
}
