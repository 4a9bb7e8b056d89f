//! Probing: tries out who reaches whom, and keeps those out of generations who would break every exchange.
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

/// Most workers that a newcomer is asked to reach, and that are asked to reach it.
pub const MAX_PROBED: usize = 16;
/// Deadline of the answer to a probe. A worker takes no longer than 3 s for it.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Pause before a worker that does not fit is tried again; each time twice that, up to the longest.
const FIRST_RETRY: Duration = Duration::from_secs(2);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// Longest such pause while nothing is computed, because too few workers are left.
const LONGEST_RETRY_IDLE: Duration = Duration::from_secs(5);

/// The probes under way, what is known of who reaches whom, and the workers that wait because of it.
#[derive(Debug, Default)]
pub struct Probing {
    reachability: Reachability,
    /// Number of probes so far: each has a number of its own.
    count: u64,
    /// Probes by number that are not answered yet.
    asked: BTreeMap<u64, Asked>,
    /// Rounds of probes that are not over, by the worker that they are about: a newcomer, or one that is tried again.
    awaited: BTreeMap<WorkerId, Round>,
    /// Whether something is known that nobody was judged by yet.
    has_news: bool,
    /// Pairs that were newly found to fail, of which the user was not told yet.
    new_failures: Vec<(WorkerId, WorkerId)>,
    /// Workers that do not fit and are no members.
    waiting: BTreeMap<WorkerId, Waiting>,
    /// The exchange that broke in this generation, while it is found out why.
    broken: Option<Broken>,
    /// By pair (lower number first), how many exchanges broke between the two since the last settled step.
    breaks: BTreeMap<(WorkerId, WorkerId), u32>,
    /// Workers that were sent away because of their connections; by name, because whoever comes back has another number.
    absences: BTreeMap<String, Absence>,
    /// Names of the workers that are left out, as the user was told last.
    told_group: BTreeSet<String>,
    /// Failures that the user was told of lately, and since when.
    told_pairs: Option<(Instant, BTreeSet<String>)>,
}

/// A round of probes to one worker and by it. What they say counts when all are answered: until then a pair that fails both ways
/// would look like the fault of one end.
#[derive(Debug, Default)]
struct Round {
    /// Number of probes that are not answered yet.
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
    /// The worker that the probe is about, which joined or is tried again. None: an exchange broke.
    newcomer: Option<WorkerId>,
    due: Instant,
}

#[derive(Debug)]
struct Waiting {
    since: Instant,
    /// How often all workers with whom it fails were tried.
    tries: u32,
    /// Workers with whom it fails that were tried in the current turn.
    tried: BTreeSet<WorkerId>,
    retry_at: Instant,
}

#[derive(Clone, Copy, Debug)]
struct Absence {
    count: u32,
    /// When it may take part again; None once that is past.
    until: Option<Instant>,
}

/// An exchange that broke although both ends still talk to us.
#[derive(Debug)]
struct Broken {
    since: Instant,
    accusations: Vec<(WorkerId, WorkerId, String)>,
    /// Workers that were asked to try each other.
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

    /// Ends probes that were not answered in time.
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
    fn is_awaited(&self, worker: WorkerId) -> bool {
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
    fn mends_at(&self) -> Option<Instant> {
        let since = self.broken.as_ref()?.since;
        let asked = self.asked.values().filter(|asked| asked.newcomer.is_none());
        let answers = asked.map(|asked| asked.due).max();
        Some((since + PEER_LOST_GRACE).max(answers.unwrap_or(since)))
    }
}

/// The pause after `count` earlier ones: each is twice as long as the one before, up to `longest`.
fn pause(first: Duration, count: u32, longest: Duration) -> Duration {
    (first * 2u32.pow(count.min(16))).min(longest)
}
