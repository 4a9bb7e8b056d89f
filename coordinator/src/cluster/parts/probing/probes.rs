//! The probes that are under way: who was asked to call whom, and which rounds of them are not over.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use proto::v1;

use crate::cluster::event::WorkerId;

/// Most workers that a newcomer is asked to reach, and that are asked to reach it.
pub const MAX_PROBED: usize = 16;
/// Deadline of the answer to a probe. A worker takes no longer than 3 s for it.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Whether `from` reached `to`.
#[derive(Debug)]
pub struct ProbeResult {
    pub from: WorkerId,
    pub to: WorkerId,
    /// Why it did not; None where it did.
    pub failure: Option<String>,
}

#[derive(Debug)]
struct Asked {
    from: WorkerId,
    to: Vec<WorkerId>,
    /// The worker that the probe is about, which joined or is tried again. None: an exchange broke.
    newcomer: Option<WorkerId>,
    due: Instant,
}

/// A round of probes to one worker and by it. What they say counts when all are answered: until then a pair that fails both ways
/// would look like the fault of one end.
#[derive(Debug, Default)]
struct Round {
    /// Number of probes that are not answered yet.
    open: usize,
    results: Vec<ProbeResult>,
}

/// The probes under way.
#[derive(Debug, Default)]
pub struct Probes {
    /// Number of probes so far: each has a number of its own.
    count: u64,
    /// Probes by number that are not answered yet.
    asked: BTreeMap<u64, Asked>,
    /// Rounds of probes that are not over, by the worker that they are about: a newcomer, or one that is tried again.
    rounds: BTreeMap<WorkerId, Round>,
}

impl Probes {
    /// Notes that `from` is asked to call `to`, and returns the number of the probe. `newcomer` is whom the round is about;
    /// None where an exchange broke.
    pub fn ask(
        &mut self,
        now: Instant,
        from: WorkerId,
        to: &[WorkerId],
        newcomer: Option<WorkerId>,
    ) -> u64 {
        self.count += 1;
        if let Some(newcomer) = newcomer {
            self.rounds.entry(newcomer).or_default().open += 1;
        }
        let asked = Asked {
            from,
            to: to.to_vec(),
            newcomer,
            due: now + ANSWER_LIMIT,
        };
        self.asked.insert(self.count, asked);
        self.count
    }

    /// Whether the worker's round of probes is not over yet.
    pub fn is_awaited(&self, worker: WorkerId) -> bool {
        self.rounds.contains_key(&worker)
    }

    /// What the answer of `from` says of those whom it was asked to call. None where it was not asked.
    pub fn results(&self, from: WorkerId, probed: &v1::Probed) -> Option<Vec<ProbeResult>> {
        let asked = self.asked.get(&probed.number);
        let asked = asked.filter(|asked| asked.from == from)?;
        let result = |to: &WorkerId| {
            let unreached = probed.unreached.iter().find(|one| one.worker == to.0);
            ProbeResult {
                from,
                to: *to,
                failure: unreached.map(|unreached| unreached.reason.clone()),
            }
        };
        Some(asked.to.iter().map(result).collect())
    }

    /// Ends a probe with its results: none where no answer came, or none will. Returns the results that count from now on; None while
    /// its round is not over.
    pub fn finish(
        &mut self,
        number: u64,
        mut results: Vec<ProbeResult>,
    ) -> Option<Vec<ProbeResult>> {
        let newcomer = self.asked.remove(&number)?.newcomer;
        let Some((newcomer, mut round)) = newcomer.and_then(|id| self.rounds.remove_entry(&id))
        else {
            return Some(results);
        };
        round.open -= 1;
        round.results.append(&mut results);
        if round.open == 0 {
            return Some(round.results);
        }
        self.rounds.insert(newcomer, round);
        None
    }

    /// Takes a worker that is gone out of all probes. Returns those that are over with it, which the caller finishes.
    pub fn forget(&mut self, worker: WorkerId) -> Vec<u64> {
        self.rounds.remove(&worker);
        let is_over = |(number, asked): (&u64, &mut Asked)| {
            asked.to.retain(|to| *to != worker);
            (asked.from == worker || asked.to.is_empty()).then_some(*number)
        };
        self.asked.iter_mut().filter_map(is_over).collect()
    }

    /// Drops what open rounds have found of a worker that is gone.
    pub fn forget_results(&mut self, worker: WorkerId) {
        for round in self.rounds.values_mut() {
            let results = &mut round.results;
            results.retain(|result| result.from != worker && result.to != worker);
        }
    }

    /// Probes that were not answered in time, which the caller finishes.
    pub fn expired(&self, now: Instant) -> Vec<u64> {
        let asked = self.asked.iter().filter(|(_, asked)| asked.due <= now);
        asked.map(|(number, _)| *number).collect()
    }

    /// When the first answer is due.
    pub fn first_due(&self) -> Option<Instant> {
        self.asked.values().map(|asked| asked.due).min()
    }

    /// When the last answer is due of those that a broken exchange led to.
    pub fn last_due_of_broken(&self) -> Option<Instant> {
        let asked = self.asked.values().filter(|asked| asked.newcomer.is_none());
        asked.map(|asked| asked.due).max()
    }
}
