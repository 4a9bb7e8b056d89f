//! Tries out who reaches whom, and keeps those out of generations who would break every exchange.
//!
//! In: who came, what probes found, and which exchanges broke. Out: probes of newcomers as they join and of pairs whose exchange
//! broke; members that do not fit are sent away, newcomers that do not fit wait and are tried again, with growing pauses, until
//! they fit or it is clear that their own address is at fault. Which group goes on is [`super::reachability`]'s to say.
//!
//! Here is the state; what is done with it is in `probes` (who is asked), `broken` (exchanges that broke), `decisions` (who takes
//! part) and `words`.

mod broken;
mod decisions;
mod probes;
mod words;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::event::WorkerId;
use super::reachability::Reachability;
use super::timers::PEER_LOST_GRACE;

/// Workers that a newcomer tries, and that try it.
pub const MAX_PROBED: usize = 16;
/// For the answer to a probe. A worker takes no longer than 3 s for it.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Before whoever does not fit is tried again; each time twice that, up to the longest.
const FIRST_RETRY: Duration = Duration::from_secs(2);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// The longest while nothing is computed, because too few are left.
const LONGEST_RETRY_IDLE: Duration = Duration::from_secs(5);

/// What is being tried, and who waits.
#[derive(Debug, Default)]
pub struct Probing {
    reachability: Reachability,
    /// Probes so far: each has a number of its own.
    count: u64,
    asked: BTreeMap<u64, Asked>,
    /// By newcomer, or whoever is tried again: the round of probes that it is in.
    awaited: BTreeMap<WorkerId, Round>,
    /// Something is known that nobody was judged by yet.
    has_news: bool,
    /// Pairs that were not known to fail, of which nothing was said yet.
    new_failures: Vec<(WorkerId, WorkerId)>,
    /// Those who do not fit and are no members.
    waiting: BTreeMap<WorkerId, Waiting>,
    broken: Option<Broken>,
    /// Exchanges that broke between two since the last committed step, lower number first.
    breaks: BTreeMap<(WorkerId, WorkerId), u32>,
    /// By name, because whoever comes back has another number.
    absences: BTreeMap<String, Absence>,
    /// By name, too.
    told_group: BTreeSet<String>,
    /// Since when, and what.
    told_pairs: Option<(Instant, BTreeSet<String>)>,
}

/// Probes of one worker and by it. What they say counts when all are answered: until then a pair that fails both ways would
/// look like the fault of one end.
#[derive(Debug, Default)]
struct Round {
    /// Not answered yet.
    open: usize,
    answers: Vec<PendingReply>,
}

/// Whether `from` reached `to`.
#[derive(Debug)]
struct PendingReply {
    from: WorkerId,
    to: WorkerId,
    failure: Option<String>,
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
    since: Instant,
    /// How often all those with whom it fails were tried.
    tries: u32,
    /// Those of them who were tried since.
    tried: BTreeSet<WorkerId>,
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

    fn ask(&mut self, asked: Asked) -> u64 {
        self.count += 1;
        if let Some(newcomer) = asked.newcomer {
            self.awaited.entry(newcomer).or_default().open += 1;
        }
        self.asked.insert(self.count, asked);
        self.count
    }

    /// Ends a probe with what was answered: nothing where no answer came, or none will.
    fn finish(&mut self, number: u64, mut answers: Vec<PendingReply>) {
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

    /// Takes out what was not answered in time.
    fn expire(&mut self, now: Instant) {
        let asked = self.asked.iter().filter(|(_, asked)| asked.due <= now);
        let over: Vec<u64> = asked.map(|(number, _)| *number).collect();
        for number in over {
            self.finish(number, Vec::new());
        }
        for absence in self.absences.values_mut() {
            self.has_news |= absence.until.take_if(|until| *until <= now).is_some();
        }
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

    #[cfg(test)]
    pub fn failing_with(&self, worker: WorkerId) -> usize {
        self.reachability.partners(worker).len()
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
