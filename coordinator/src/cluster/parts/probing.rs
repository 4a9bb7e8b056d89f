//! The probes under way, what is known of who reaches whom, and the workers that wait because of it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::reachability::Reachability;
use crate::cluster::event::WorkerId;

/// Time after a broken exchange in which the blamed peer's connection to the coordinator may break too, before it is judged.
pub const PEER_LOST_GRACE: Duration = Duration::from_millis(500);
/// Most workers that a newcomer is asked to reach, and that are asked to reach it.
pub const MAX_PROBED: usize = 16;
/// Deadline of the answer to a probe. A worker takes no longer than 3 s for it.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Pause before a worker that does not fit is tried again; each time twice that, up to the longest.
pub(in crate::cluster) const FIRST_RETRY: Duration = Duration::from_secs(2);
pub(in crate::cluster) const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// Longest such pause while nothing is computed, because too few workers are left.
pub(in crate::cluster) const LONGEST_RETRY_IDLE: Duration = Duration::from_secs(5);

/// The probes under way, what is known of who reaches whom, and the workers that wait because of it.
#[derive(Debug, Default)]
pub struct Probing {
    pub(in crate::cluster) reachability: Reachability,
    /// Number of probes so far: each has a number of its own.
    pub(in crate::cluster) count: u64,
    /// Probes by number that are not answered yet.
    pub(in crate::cluster) asked: BTreeMap<u64, Asked>,
    /// Rounds of probes that are not over, by the worker that they are about: a newcomer, or one that is tried again.
    pub(in crate::cluster) awaited: BTreeMap<WorkerId, Round>,
    /// Whether something is known that nobody was judged by yet.
    pub(in crate::cluster) has_news: bool,
    /// Pairs that were newly found to fail, of which the user was not told yet.
    pub(in crate::cluster) new_failures: Vec<(WorkerId, WorkerId)>,
    /// Workers that do not fit and are no members.
    pub(in crate::cluster) waiting: BTreeMap<WorkerId, Waiting>,
    /// The exchange that broke in this generation, while it is found out why.
    pub(in crate::cluster) broken: Option<Broken>,
    /// By pair (lower number first), how many exchanges broke between the two since the last settled step.
    pub(in crate::cluster) breaks: BTreeMap<(WorkerId, WorkerId), u32>,
    /// Workers that were sent away because of their connections; by name, because whoever comes back has another number.
    pub(in crate::cluster) absences: BTreeMap<String, Absence>,
    /// Names of the workers that are left out, as the user was told last.
    pub(in crate::cluster) told_group: BTreeSet<String>,
    /// Failures that the user was told of lately, and since when.
    pub(in crate::cluster) told_pairs: Option<(Instant, BTreeSet<String>)>,
}

/// A round of probes to one worker and by it. What they say counts when all are answered: until then a pair that fails both ways
/// would look like the fault of one end.
#[derive(Debug, Default)]
pub(in crate::cluster) struct Round {
    /// Number of probes that are not answered yet.
    pub(in crate::cluster) open: usize,
    pub(in crate::cluster) answers: Vec<PendingReply>,
}

/// Whether `from` reached `to`.
#[derive(Debug)]
pub(in crate::cluster) struct PendingReply {
    pub(in crate::cluster) from: WorkerId,
    pub(in crate::cluster) to: WorkerId,
    pub(in crate::cluster) failure: Option<String>,
}

#[derive(Debug)]
pub(in crate::cluster) struct Asked {
    pub(in crate::cluster) from: WorkerId,
    pub(in crate::cluster) to: Vec<WorkerId>,
    /// The worker that the probe is about, which joined or is tried again. None: an exchange broke.
    pub(in crate::cluster) newcomer: Option<WorkerId>,
    pub(in crate::cluster) due: Instant,
}

#[derive(Debug)]
pub(in crate::cluster) struct Waiting {
    pub(in crate::cluster) since: Instant,
    /// How often all workers with whom it fails were tried.
    pub(in crate::cluster) tries: u32,
    /// Workers with whom it fails that were tried in the current turn.
    pub(in crate::cluster) tried: BTreeSet<WorkerId>,
    pub(in crate::cluster) retry_at: Instant,
}

#[derive(Clone, Copy, Debug)]
pub(in crate::cluster) struct Absence {
    pub(in crate::cluster) count: u32,
    /// When it may take part again; None once that is past.
    pub(in crate::cluster) until: Option<Instant>,
}

/// An exchange that broke although both ends still talk to us.
#[derive(Debug)]
pub(in crate::cluster) struct Broken {
    pub(in crate::cluster) since: Instant,
    pub(in crate::cluster) accusations: Vec<(WorkerId, WorkerId, String)>,
    /// Workers that were asked to try each other.
    pub(in crate::cluster) tried: BTreeSet<WorkerId>,
}

impl Probing {
    pub fn forget(&mut self, worker: WorkerId) {
        self.waiting.remove(&worker);
        self.awaited.remove(&worker);
        self.breaks.retain(|(a, b), _| *a != worker && *b != worker);
        let concerns = |(number, asked): (&u64, &mut Asked)| {
            asked.to.retain(|to| *to != worker);
            (asked.from == worker || asked.to.is_empty()).then_some(*number)
        };
        let over: Vec<u64> = self.asked.iter_mut().filter_map(concerns).collect();
        for number in over {
            self.finish(number, Vec::new());
        }
        for round in self.awaited.values_mut() {
            let concerns = |answer: &PendingReply| answer.from == worker || answer.to == worker;
            round.answers.retain(|answer| !concerns(answer));
        }
        self.reachability.forget(worker);
    }

    pub(in crate::cluster) fn ask(&mut self, asked: Asked) -> u64 {
        self.count += 1;
        if let Some(newcomer) = asked.newcomer {
            self.awaited.entry(newcomer).or_default().open += 1;
        }
        self.asked.insert(self.count, asked);
        self.count
    }

    /// Ends a probe with what was answered: nothing where no answer came, or none will.
    pub(in crate::cluster) fn finish(&mut self, number: u64, mut answers: Vec<PendingReply>) {
        let Some(asked) = self.asked.remove(&number) else {
            return;
        };
        if let Some(newcomer) = asked.newcomer
            && let Some(mut round) = self.awaited.remove(&newcomer)
        {
            round.open -= 1;
            round.answers.append(&mut answers);
            if round.open > 0 {
                self.awaited.insert(newcomer, round);
                return;
            }
            answers = round.answers;
        }
        self.has_news = true;
        for PendingReply { from, to, failure } in answers {
            match failure {
                Some(reason) if self.reachability.fail(from, to, &reason) => {
                    self.new_failures.push((from, to));
                }
                Some(_) => {}
                None => {
                    self.reachability.succeed(from, to);
                }
            }
        }
    }

    /// Ends probes that were not answered in time.
    pub(in crate::cluster) fn expire(&mut self, now: Instant) {
        let asked = self.asked.iter().filter(|(_, asked)| asked.due <= now);
        let over: Vec<u64> = asked.map(|(number, _)| *number).collect();
        for number in over {
            self.finish(number, Vec::new());
        }
        for absence in self.absences.values_mut() {
            self.has_news |= absence.until.take_if(|until| *until <= now).is_some();
        }
    }

    /// Whether some worker is kept out of generations, or was until it was looked at last.
    pub fn keeps_out(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Drops the broken exchange of the generation before, because a new one begins.
    pub fn note_generation(&mut self) {
        self.broken = None;
    }

    /// A step was settled: pairs whose exchange broke, and absences of its members, count no more.
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

    #[cfg(test)]
    pub fn failing_with(&self, worker: WorkerId) -> usize {
        self.reachability.partners(worker).len()
    }

    /// Whether the worker's round of probes is not over yet.
    pub(in crate::cluster) fn is_awaited(&self, worker: WorkerId) -> bool {
        self.awaited.contains_key(&worker)
    }

    /// When the next probe, pause or judgement is due; None where nothing is.
    pub fn wakes_at(&self) -> Option<Instant> {
        let due = self.asked.values().map(|asked| asked.due);
        let retries = self.waiting.values().map(|waiting| waiting.retry_at);
        let absences = self.absences.values().filter_map(|absence| absence.until);
        let due = due.chain(retries).chain(absences);
        due.chain(self.mends_at()).min()
    }

    /// When a broken exchange is made again: by then both ends had time to lose the coordinator too, and to try each other.
    pub(in crate::cluster) fn mends_at(&self) -> Option<Instant> {
        let since = self.broken.as_ref()?.since;
        let asked = self.asked.values().filter(|asked| asked.newcomer.is_none());
        let answers = asked.map(|asked| asked.due).max();
        Some((since + PEER_LOST_GRACE).max(answers.unwrap_or(since)))
    }
}

/// The pause after `count` earlier ones: each is twice as long as the one before, up to `longest`.
pub(in crate::cluster) fn pause(first: Duration, count: u32, longest: Duration) -> Duration {
    (first * 2u32.pow(count.min(16))).min(longest)
}
