//! What is known of who reaches whom, how it is being found out, and the workers that wait or are sent away because of it.

mod absences;
pub mod broken_exchanges;
mod pause;
pub mod probes;
mod set_aside;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use proto::v1;

use self::absences::Absences;
use self::broken_exchanges::{Accusation, BrokenExchanges};
use self::probes::{ProbeResult, Probes};
use self::set_aside::SetAside;
use super::reachability::Reachability;
use crate::cluster::event::WorkerId;

/// Most pairs that are told of within [`TOLD_AGAIN`]. The group that goes on is told in any case.
const MAX_TOLD: usize = 8;
const TOLD_AGAIN: Duration = Duration::from_secs(30);

/// The probes under way, what is known of who reaches whom, and the workers that wait because of it.
#[derive(Debug, Default)]
pub struct Probing {
    reachability: Reachability,
    probes: Probes,
    /// Whether something is known that nobody was judged by yet.
    has_news: bool,
    /// Pairs that were newly found to fail, of which the user was not told yet.
    new_failures: Vec<(WorkerId, WorkerId)>,
    set_aside: SetAside,
    broken: BrokenExchanges,
    absences: Absences,
    /// Names of the workers that are left out, as the user was told last.
    told_group: BTreeSet<String>,
    /// Failures that the user was told of lately, and since when.
    told_pairs: Option<(Instant, BTreeSet<String>)>,
}

impl Probing {
    /// Who reaches whom, as far as it is known.
    pub fn reachability(&self) -> &Reachability {
        &self.reachability
    }

    /// Takes a worker that is gone out of everything.
    pub fn forget(&mut self, worker: WorkerId) {
        self.set_aside.forget(worker);
        self.broken.forget(worker);
        for number in self.probes.forget(worker) {
            self.finish(number, Vec::new());
        }
        self.probes.forget_results(worker);
        self.reachability.forget(worker);
    }

    /// Notes that `from` is asked to call `to`, and returns the number of the probe. `newcomer` is whom the round is about;
    /// None where an exchange broke.
    pub fn ask(
        &mut self,
        now: Instant,
        from: WorkerId,
        to: &[WorkerId],
        newcomer: Option<WorkerId>,
    ) -> u64 {
        self.probes.ask(now, from, to, newcomer)
    }

    /// Takes in the answer of `from` to a probe. False where it was not asked.
    pub fn answer(&mut self, from: WorkerId, probed: &v1::Probed) -> bool {
        let results = self.probes.results(from, probed);
        let is_asked = results.is_some();
        if let Some(results) = results {
            self.finish(probed.number, results);
        }
        is_asked
    }

    fn finish(&mut self, number: u64, results: Vec<ProbeResult>) {
        let Some(results) = self.probes.finish(number, results) else {
            return;
        };
        self.has_news = true;
        for ProbeResult { from, to, failure } in results {
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

    /// Ends probes that were not answered in time, and absences whose time is up.
    pub fn expire(&mut self, now: Instant) {
        for number in self.probes.expired(now) {
            self.finish(number, Vec::new());
        }
        self.has_news |= self.absences.expire(now);
    }

    /// Whether something is known that nobody was judged by yet. True once.
    pub fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.has_news)
    }

    /// When the next probe, pause or judgement is due; None where nothing is.
    pub fn wakes_at(&self) -> Option<Instant> {
        let due = [
            self.probes.first_due(),
            self.set_aside.first_retry(),
            self.absences.first_end(),
            self.mends_at(),
        ];
        due.into_iter().flatten().min()
    }

    /// Whether the worker's round of probes is not over yet.
    pub fn is_awaited(&self, worker: WorkerId) -> bool {
        self.probes.is_awaited(worker)
    }

    #[cfg(test)]
    pub fn is_at_peace(&self) -> bool {
        self.reachability.is_empty() && self.set_aside.is_empty()
    }

    #[cfg(test)]
    pub fn failing_with(&self, worker: WorkerId) -> usize {
        self.reachability.partners(worker).len()
    }
}

/// Workers that do not fit: those who wait here, and those who were sent away.
impl Probing {
    /// Whether some worker is kept out of generations, or was until it was looked at last.
    pub fn keeps_out(&self) -> bool {
        !self.set_aside.is_empty()
    }

    /// Whether the worker was set aside.
    pub fn is_set_aside(&self, worker: WorkerId) -> bool {
        self.set_aside.contains(worker)
    }

    /// Sets a worker aside that does not fit. False where it is already.
    pub fn set_aside(&mut self, now: Instant, worker: WorkerId) -> bool {
        self.set_aside.add(now, worker)
    }

    /// Lets all but these workers take part again.
    pub fn keep_aside_only(&mut self, outsiders: &BTreeSet<WorkerId>) {
        self.set_aside.keep_only(outsiders);
    }

    /// How often a worker that was set aside was tried, where it is to be refused: often enough, and its own address is at fault.
    pub fn is_to_be_refused(&self, now: Instant, worker: WorkerId) -> Option<u32> {
        let tries = self.set_aside.tried_enough(now, worker)?;
        let is_at_fault = !self.is_awaited(worker) && self.reachability.is_at_fault(worker);
        is_at_fault.then_some(tries)
    }

    /// Takes out the workers that are to be tried again by now; it is news that they are.
    pub fn due_retries(&mut self, now: Instant) -> Vec<WorkerId> {
        let due = self.set_aside.due(now);
        self.has_news |= !due.is_empty();
        due
    }

    /// The workers with whom one that was set aside is to be tried now, of those with whom it fails. `is_idle`: nothing is computed.
    pub fn try_again(&mut self, now: Instant, worker: WorkerId, is_idle: bool) -> Vec<WorkerId> {
        if self.is_awaited(worker) {
            self.set_aside.put_off(now, worker);
            return Vec::new();
        }
        let partners = self.reachability.partners(worker);
        self.set_aside.try_again(now, worker, &partners, is_idle)
    }

    /// Notes that a worker of this name is sent away because of its connections.
    pub fn note_absence(&mut self, now: Instant, name: &str) {
        self.absences.note(now, name);
    }

    /// Whether a worker of this name was sent away and may not take part yet.
    pub fn is_absent(&self, name: &str) -> bool {
        self.absences.is_absent(name)
    }

    /// How often a worker of this name was sent away in a row, where that is too often to let it come back.
    pub fn too_many_absences(&self, name: &str) -> Option<u32> {
        self.absences.too_many(name)
    }
}

/// Exchanges that broke.
impl Probing {
    /// Notes who blames whom for the broken exchange. True where the two have yet to try each other.
    pub fn accuse(&mut self, now: Instant, accusation: Accusation) -> bool {
        self.broken.accuse(now, accusation)
    }

    /// Notes that these workers are asked to try each other, because an exchange broke.
    pub fn note_tried(&mut self, workers: &BTreeSet<WorkerId>) {
        self.broken.note_tried(workers);
    }

    /// Whether it is being found out why an exchange broke.
    pub fn is_exchange_broken(&self) -> bool {
        self.broken.is_open()
    }

    /// When a broken exchange is made again.
    fn mends_at(&self) -> Option<Instant> {
        self.broken.mends_at(self.probes.last_due_of_broken())
    }

    /// Takes out the broken exchange that is to be made again now. Returns who blames whom for it.
    pub fn take_broken(&mut self, now: Instant) -> Option<Vec<Accusation>> {
        let is_due = self.mends_at().is_some_and(|at| at <= now);
        is_due.then(|| self.broken.take()).flatten()
    }

    /// Counts a broken exchange of a pair. Where too many broke in a row, the two count as unable to reach each other.
    pub fn count_break(&mut self, accusation: &Accusation) {
        let Accusation { by, of, reason } = accusation;
        if let Some(breaks) = self.broken.count((*by.min(of), *by.max(of))) {
            let reason = format!("their exchange broke {breaks} times in a row: {reason}");
            self.reachability.fail(*by, *of, &reason);
            self.reachability.fail(*of, *by, &reason);
        }
    }

    /// Drops the broken exchange of the generation before, because a new one begins.
    pub fn note_generation(&mut self) {
        self.broken.drop_broken();
    }

    /// A step was settled: pairs whose exchange broke, and absences of its members, count no more.
    pub fn note_commit<'a>(&mut self, members: impl Iterator<Item = &'a str>) {
        self.broken.forgive();
        self.absences.forgive(members);
    }
}

/// What the user was told.
impl Probing {
    /// Pairs that were newly found to fail, of which the user was not told yet.
    pub fn take_new_failures(&mut self) -> Vec<(WorkerId, WorkerId)> {
        std::mem::take(&mut self.new_failures)
    }

    /// Whether the user is to be told of a failing pair: not where the same, or much else, was said a moment ago.
    pub fn takes_notice(&mut self, now: Instant, text: &str) -> bool {
        let is_recent = |(since, _): &(Instant, _)| now.duration_since(*since) < TOLD_AGAIN;
        let told = self.told_pairs.take().filter(is_recent);
        let (since, mut told) = told.unwrap_or_else(|| (now, BTreeSet::new()));
        let is_news = told.len() < MAX_TOLD && told.insert(text.to_owned());
        self.told_pairs = Some((since, told));
        is_news
    }

    /// Names of the workers that are left out, as the user was told last.
    pub fn told_group(&self) -> &BTreeSet<String> {
        &self.told_group
    }

    /// Notes that the user is told which workers are left out.
    pub fn note_told_group(&mut self, names: BTreeSet<String>) {
        self.told_group = names;
    }
}
