//! Tries out who reaches whom, and keeps those out of generations who would break every exchange.
//!
//! In: who came, what probes found, and which exchanges broke. Out: probes of newcomers as they join and of pairs whose exchange
//! broke; members that do not fit are sent away, newcomers that do not fit wait and are tried again, with growing pauses, until
//! they fit or it is clear that their own address is at fault. Which group goes on is [`super::reachability`]'s to say.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use proto::v1;

use super::command::Command;
use super::event::WorkerId;
use super::hours::PEER_LOST_GRACE;
use super::reachability::{Candidate, Reachability};
use super::{Cluster, Stage};
use crate::events::RunEvent;

/// Workers that a newcomer tries, and that try it.
pub const MAX_PROBED: usize = 16;
/// For the answer to a probe. A worker takes no longer than 3 s for it.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Before whoever does not fit is tried again; each time twice that, up to the longest.
const FIRST_RETRY: Duration = Duration::from_secs(2);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// Tries after which one whose own address is at fault is refused.
const MAX_TRIES: u32 = 5;
/// Broken exchanges of one pair without a committed step between them, after which they count as unable to exchange.
const MAX_BREAKS: u32 = 3;
/// After a worker was sent away because of its connections, until it may take part again; each time twice that.
const FIRST_ABSENCE: Duration = Duration::from_secs(5);
const LONGEST_ABSENCE: Duration = Duration::from_secs(300);
/// Times that a worker is sent away for that before it is refused.
const MAX_ABSENCES: u32 = 6;
/// Names of workers that were sent away.
const MAX_REMEMBERED: usize = 1024;
/// Names in one line.
const MAX_NAMED: usize = 4;
/// Pairs that are told of within a while. The group that goes on is told in any case.
const MAX_TOLD: u32 = 8;
const TOLD_AGAIN: Duration = Duration::from_secs(30);
/// Of what a worker says of a broken exchange.
const MAX_REASON_CHARS: usize = 200;

/// What is being tried, and who waits.
#[derive(Debug, Default)]
pub struct Probing {
    reachability: Reachability,
    /// Probes so far: each has a number of its own.
    count: u64,
    asked: BTreeMap<u64, Asked>,
    /// Answers about a newcomer, or of it, that are not there yet.
    awaited: BTreeMap<WorkerId, usize>,
    /// Those who do not fit and are no members.
    waiting: BTreeMap<WorkerId, Waiting>,
    broken: Option<Broken>,
    /// Exchanges that broke between two since the last committed step, lower number first.
    breaks: BTreeMap<(WorkerId, WorkerId), u32>,
    /// By name, because whoever comes back has another number.
    absences: BTreeMap<String, Absence>,
    told_group: Option<BTreeSet<WorkerId>>,
    /// Since when, and how many.
    told_pairs: Option<(Instant, u32)>,
}

#[derive(Debug)]
struct Asked {
    from: WorkerId,
    to: Vec<WorkerId>,
    /// Why: somebody joined, or an exchange broke.
    newcomer: Option<WorkerId>,
    due: Instant,
}

#[derive(Debug)]
struct Waiting {
    tries: u32,
    retry_at: Instant,
}

#[derive(Clone, Copy, Debug)]
struct Absence {
    count: u32,
    /// None once that is past.
    until: Option<Instant>,
}

/// An exchange that broke although both ends still talk to us.
#[derive(Debug)]
struct Broken {
    since: Instant,
    accusations: Vec<(WorkerId, WorkerId, String)>,
    /// Those who were asked to try each other.
    tried: BTreeSet<WorkerId>,
}

impl Probing {
    pub fn forget(&mut self, worker: WorkerId) {
        self.reachability.forget(worker);
        self.waiting.remove(&worker);
        self.breaks.retain(|(a, b), _| *a != worker && *b != worker);
        let concerns = |(number, asked): (&u64, &mut Asked)| {
            asked.to.retain(|to| *to != worker);
            (asked.from == worker || asked.to.is_empty()).then_some(*number)
        };
        let over: Vec<u64> = self.asked.iter_mut().filter_map(concerns).collect();
        for number in over {
            self.take(number);
        }
        self.awaited.remove(&worker);
    }

    fn ask(&mut self, asked: Asked) -> u64 {
        self.count += 1;
        if let Some(newcomer) = asked.newcomer {
            *self.awaited.entry(newcomer).or_default() += 1;
        }
        self.asked.insert(self.count, asked);
        self.count
    }

    fn take(&mut self, number: u64) -> Option<Asked> {
        let asked = self.asked.remove(&number)?;
        if let Some(newcomer) = asked.newcomer
            && let Some(count) = self.awaited.get_mut(&newcomer)
        {
            *count -= 1;
            if *count == 0 {
                self.awaited.remove(&newcomer);
            }
        }
        Some(asked)
    }

    /// Takes out what was not answered in time. True where there was any.
    fn expire(&mut self, now: Instant) -> bool {
        let asked = self.asked.iter().filter(|(_, asked)| asked.due <= now);
        let over: Vec<u64> = asked.map(|(number, _)| *number).collect();
        for number in &over {
            self.take(*number);
        }
        let mut is_back = false;
        for absence in self.absences.values_mut() {
            is_back |= absence.until.take_if(|until| *until <= now).is_some();
        }
        !over.is_empty() || is_back
    }

    /// Somebody is, or was, kept out.
    pub fn keeps_out(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// A new generation begins: what broke the one before is past.
    pub fn note_generation(&mut self) {
        self.broken = None;
    }

    /// A step was committed.
    pub fn note_commit<'a>(&mut self, members: impl Iterator<Item = &'a str>) {
        self.breaks.clear();
        if !self.absences.is_empty() {
            for name in members {
                self.absences.remove(name);
            }
        }
    }

    #[cfg(test)]
    pub fn is_at_peace(&self) -> bool {
        self.reachability.is_empty() && self.waiting.is_empty()
    }

    /// What was tried when it joined is not known yet.
    fn is_awaited(&self, worker: WorkerId) -> bool {
        self.awaited.contains_key(&worker)
    }

    /// When something is due.
    pub fn wakes_at(&self) -> Option<Instant> {
        let due = self.asked.values().map(|asked| asked.due);
        let retries = self.waiting.values().map(|waiting| waiting.retry_at);
        let absences = self.absences.values().filter_map(|absence| absence.until);
        let due = due.chain(retries).chain(absences);
        due.chain(self.mends_at()).min()
    }

    /// When a broken exchange is made again: both ends had time to break with us too, and to try each other.
    fn mends_at(&self) -> Option<Instant> {
        let since = self.broken.as_ref()?.since;
        let asked = self.asked.values().filter(|asked| asked.newcomer.is_none());
        let answers = asked.map(|asked| asked.due).max();
        Some((since + PEER_LOST_GRACE).max(answers.unwrap_or(since)))
    }
}

fn pause(first: Duration, count: u32, longest: Duration) -> Duration {
    (first * 2u32.pow(count.min(16))).min(longest)
}

impl Cluster {
    /// Has a newcomer and those who are here try each other.
    pub(super) fn probe_newcomer(
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

    fn probe(
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

    pub(super) fn probed(
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

    fn tell_failures(
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

    fn address_of(&self, id: WorkerId) -> &str {
        self.members.get(id).map_or("", |worker| &worker.address)
    }

    /// Everyone who is ready.
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

    /// Those who would break every exchange of a generation. Whoever loads yet is measured by those who are ready.
    fn outsiders(&self) -> BTreeSet<WorkerId> {
        let reachability = &self.probing.reachability;
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

    /// Newcomers that must not enter a generation now.
    pub(super) fn kept_out(&self) -> BTreeSet<WorkerId> {
        let mut kept_out = self.outsiders();
        for id in self.members.ids() {
            let Some(worker) = self.members.get(id) else {
                continue;
            };
            // Whoever brings a state was a member before.
            let is_awaited = !worker.is_veteran && self.probing.is_awaited(id);
            let absence = self.probing.absences.get(&worker.name);
            let is_absent = absence.is_some_and(|absence| absence.until.is_some());
            if is_awaited || is_absent {
                kept_out.insert(id);
            }
        }
        kept_out
    }

    /// How many of those who are here may take part together.
    pub(super) fn usable_count(&self) -> usize {
        self.members.count() - self.outsiders().len()
    }

    /// Sends members away that do not fit any more, and sees to those who wait.
    pub(super) fn regard_reach(&mut self, now: Instant, commands: &mut Vec<Command>) {
        if self.stage == Stage::Ended || self.stopping.is_some() {
            return;
        }
        let outsiders = self.outsiders();
        if self.probing.broken.is_none() {
            self.tell_group(&outsiders, commands);
        }
        let returned: Vec<WorkerId> = self.probing.waiting.keys().copied().collect();
        for id in returned.into_iter().filter(|id| !outsiders.contains(id)) {
            self.probing.waiting.remove(&id);
        }
        // While it is being found out who lost whom, nobody is judged.
        let is_open = self.probing.broken.is_some();
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
        match self.stage {
            Stage::Running if is_member_gone => self.regroup(now, commands),
            Stage::Running if !is_open => self.release_state(now, commands),
            Stage::Waiting => self.reform(now, commands),
            _ => {}
        }
    }

    /// Where more could go on without those who have the newest state, and these are at fault themselves: they hand it over as a
    /// checkpoint, from which the others go on, and have to go.
    fn release_state(&mut self, now: Instant, commands: &mut Vec<Command>) {
        let reachability = &self.probing.reachability;
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

    fn tell_group(&mut self, outsiders: &BTreeSet<WorkerId>, commands: &mut Vec<Command>) {
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

    /// A member that runs loses what it has in hand: it comes back as a newcomer and is tried again.
    fn remove_member(&mut self, now: Instant, id: WorkerId, commands: &mut Vec<Command>) {
        if self.stage != Stage::Running {
            self.members.demote(id);
            self.ledger.release(id);
            return self.let_wait(now, id, commands);
        }
        let reason = self.why_outside(id);
        self.note_absence(now, id);
        self.forget(id, &reason, commands);
        commands.push(Command::Expel { worker: id, reason });
    }

    fn note_absence(&mut self, now: Instant, id: WorkerId) {
        let name = self.members.name(id).to_owned();
        let absences = &mut self.probing.absences;
        if absences.len() >= MAX_REMEMBERED && !absences.contains_key(&name) {
            let oldest = absences.iter().min_by_key(|(_, absence)| absence.count);
            if let Some(oldest) = oldest.map(|(name, _)| name.clone()) {
                absences.remove(&oldest);
            }
        }
        let absence = absences.entry(name).or_insert(Absence {
            count: 0,
            until: None,
        });
        absence.until = Some(now + pause(FIRST_ABSENCE, absence.count, LONGEST_ABSENCE));
        absence.count += 1;
    }

    /// Why a worker is refused when it comes back: it was sent away too often.
    pub(super) fn is_too_often_absent(&self, name: &str) -> Option<String> {
        let absence = self.probing.absences.get(name)?;
        (absence.count > MAX_ABSENCES).then(|| {
            format!(
                "it was sent away {} times in a row because other workers could not exchange with it; see to its network, \
                 then start it again",
                absence.count
            )
        })
    }

    fn let_wait(&mut self, now: Instant, id: WorkerId, commands: &mut Vec<Command>) {
        let Some(waiting) = self.probing.waiting.get(&id) else {
            let retry_at = now + FIRST_RETRY;
            self.probing
                .waiting
                .insert(id, Waiting { tries: 1, retry_at });
            let reason = self.why_outside(id);
            let aside = v1::Aside { reason };
            commands.push(Command::SendAside { worker: id, aside });
            return;
        };
        let tries = waiting.tries;
        let is_tried = tries > MAX_TRIES && !self.probing.is_awaited(id);
        if is_tried && self.probing.reachability.is_at_fault(id) {
            let reason = format!("{} (tried {tries} times)", self.why_outside(id));
            self.forget(id, &reason, commands);
            commands.push(Command::Refuse { worker: id, reason });
        }
    }

    /// One of those who are here and take no part, for a reminder.
    pub(super) fn tell_outsider(&self, commands: &mut Vec<Command>) {
        if let Some(id) = self.outsiders().first() {
            let (name, reason) = (self.members.name(*id), self.why_outside(*id));
            let text = format!("worker {name} is here but takes no part: {reason}");
            commands.push(Command::Emit(RunEvent::Notice(text)));
        }
    }

    /// Names the address and what to do.
    fn why_outside(&self, id: WorkerId) -> String {
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

    /// What is due by the clock: answers that did not come, tries again, an exchange to be made again.
    pub(super) fn tick_probes(&mut self, now: Instant, commands: &mut Vec<Command>) {
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

    /// An exchange of this generation broke, and a member says because of whom. Two that lost each other leave it open which of
    /// them is cut off, so the others try too.
    pub(super) fn peer_lost(
        &mut self,
        now: Instant,
        id: WorkerId,
        lost: &v1::PeerLost,
        commands: &mut Vec<Command>,
    ) {
        if self.stage != Stage::Running || lost.generation != self.generation {
            return;
        }
        let Some(&accused) = self.members.ranks().get(lost.rank as usize) else {
            let reason = "it blames a peer that does not exist".to_owned();
            return self.expel(now, id, reason, commands);
        };
        let broken = self.probing.broken.get_or_insert_with(|| Broken {
            since: now,
            accusations: Vec::new(),
            tried: BTreeSet::new(),
        });
        let is_known = broken.accusations.iter().any(|(by, ..)| *by == id);
        if accused == id || is_known {
            return;
        }
        let reason: String = lost.reason.chars().take(MAX_REASON_CHARS).collect();
        broken.accusations.push((id, accused, reason));
        if broken.tried.is_superset(&BTreeSet::from([id, accused]))
            || broken.tried.len() >= 2 * MAX_PROBED
        {
            return;
        }
        // Members first: it is their exchange.
        let mut others = self.members.ranks().to_vec();
        let newcomers = self.members.ids().into_iter();
        others.extend(newcomers.filter(|one| self.members.rank_of(*one).is_none()));
        others.retain(|one| *one != id && *one != accused);
        let step = others.len().div_ceil(MAX_PROBED - 2).max(1);
        let mut circle = BTreeSet::from([id, accused]);
        circle.extend(others.into_iter().step_by(step));
        broken.tried.extend(circle.iter().copied());
        for from in &circle {
            let to: Vec<WorkerId> = circle.iter().copied().filter(|to| to != from).collect();
            self.probe(now, *from, &to, None, commands);
        }
    }

    /// A follower lost its source, which may be out of its reach.
    pub(super) fn try_source(
        &mut self,
        now: Instant,
        id: WorkerId,
        source: WorkerId,
        commands: &mut Vec<Command>,
    ) {
        self.try_each_other(now, id, &[source], Some(id), commands);
    }

    fn mend_if_due(&mut self, now: Instant, commands: &mut Vec<Command>) {
        if self.probing.mends_at().is_some_and(|at| at <= now)
            && let Some(broken) = self.probing.broken.take()
        {
            self.mend(now, &broken.accusations, commands);
        }
    }

    /// An exchange broke although its members reach each other: it is made anew, but not for ever.
    fn mend(
        &mut self,
        now: Instant,
        accusations: &[(WorkerId, WorkerId, String)],
        commands: &mut Vec<Command>,
    ) {
        let mut news = BTreeSet::new();
        for (by, of, reason) in accusations {
            let is_here = |id: &WorkerId| self.members.rank_of(*id).is_some();
            if !is_here(by) || !is_here(of) {
                continue;
            }
            let pair = (*by.min(of), *by.max(of));
            if news.insert(pair) {
                let breaks = self.probing.breaks.entry(pair).or_default();
                *breaks += 1;
                if *breaks >= MAX_BREAKS {
                    let reason = format!("their exchange broke {breaks} times in a row: {reason}");
                    self.probing.reachability.fail(*by, *of, &reason);
                    self.probing.reachability.fail(*of, *by, &reason);
                }
            }
        }
        if let Some((by, of, reason)) = accusations.first()
            && !news.is_empty()
        {
            let text = format!(
                "the exchange broke: worker {} says of worker {} at {}: {reason}; it is made again",
                self.members.name(*by),
                self.members.name(*of),
                self.address_of(*of)
            );
            commands.push(Command::Emit(RunEvent::Notice(text)));
        }
        let generation = self.generation;
        self.regard_reach(now, commands);
        if self.stage == Stage::Running && self.generation == generation && !self.member_lost {
            self.reform(now, commands);
        }
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
