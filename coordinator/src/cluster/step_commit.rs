//! From the exchange to the settled step: the first report commits it, and when all have reported and agree it is
//! settled. A replica can be behind but never different, so one report is enough to go on from.

mod record;

use std::collections::BTreeMap;
use std::time::Instant;

use proto::v1;

use super::command::Command;
use super::event::WorkerId;
use super::ledger::Ledger;
use super::membership::short;
use super::recovery::PreviousTerms;
use super::schedule::{RunSchedule, Work};
use super::{Cluster, Stage};

/// Number of weight digests that are kept, to compare steps that are computed again or that a worker comes back with.
const MAX_DIGESTS: usize = 64;
/// Weight of the newest step in the moving mean of step times.
const PACE_WEIGHT: f64 = 0.1;

/// A step between its exchange and the last report of it.
#[derive(Debug)]
pub struct PendingCommit {
    /// The step's own ledger: needed again where the exchange breaks.
    pub ledger: Ledger,
    /// Reports that came so far; the first one committed the step.
    pub reports: BTreeMap<WorkerId, v1::StepReport>,
    /// When its members were told to exchange. None where this coordinator did not order the exchange, or had given it up.
    pub ordered: Option<Instant>,
    /// Seconds from the step's beginning to its first report, where both were seen.
    pub committed_after: Option<f64>,
}

/// Statistics kept from step to step for the records: mean step time, tokens so far, digests of weights.
#[derive(Debug)]
pub struct StepStats {
    step_started: Option<Instant>,
    mean_step_seconds: Option<f64>,
    /// When too few workers were left to compute; None while there are enough.
    waiting_since: Option<Instant>,
    /// Seconds of waiting for workers before the next step on record.
    waited_seconds: f64,
    /// Tokens (without padding) of the first `recorded` steps.
    num_tokens: u64,
    /// Updates after the last step that was recorded.
    recorded: u64,
    skipped_in_a_row: u64,
    /// Digests of the weights by step: the newest settled ones whose digest was asked for.
    digests: BTreeMap<u64, String>,
}

impl StepStats {
    /// Statistics of a run after `recorded` updates. What is known of an earlier term counts where it ended there.
    pub fn new(course: &RunSchedule, recorded: u64, earlier: &PreviousTerms) -> Self {
        let is_there = earlier.recorded == recorded;
        let digest = earlier.weights_digest.clone().filter(|_| is_there);
        Self {
            step_started: None,
            mean_step_seconds: None,
            waiting_since: None,
            waited_seconds: 0.0,
            num_tokens: (0..recorded).map(|step| course.tokens(step)).sum(),
            recorded,
            skipped_in_a_row: if is_there {
                earlier.skipped_in_a_row
            } else {
                0
            },
            digests: digest
                .into_iter()
                .map(|digest| (recorded, digest))
                .collect(),
        }
    }

    /// Moving mean of the step times, in seconds; None before the first step of this term.
    pub fn mean_step_seconds(&self) -> Option<f64> {
        self.mean_step_seconds
    }

    /// Number of updates after the last step that was recorded.
    pub fn recorded(&self) -> u64 {
        self.recorded
    }

    /// Digest of the weights after `step` updates, where it is on record.
    pub fn digest_of(&self, step: u64) -> Option<&str> {
        self.digests.get(&step).map(String::as_str)
    }

    fn note_digest(&mut self, step: u64, digest: &str) {
        self.digests.insert(step, digest.to_owned());
        while self.digests.len() > MAX_DIGESTS {
            self.digests.pop_first();
        }
    }

    /// Goes on after `step` updates without the records up to there.
    pub fn skip_to(&mut self, course: &RunSchedule, step: u64) {
        let unrecorded = self.recorded..step;
        self.num_tokens += unrecorded.map(|step| course.tokens(step)).sum::<u64>();
        self.recorded = self.recorded.max(step);
    }

    /// Notes that nothing can be computed from here on, if that was not so before.
    pub fn wait(&mut self, now: Instant) {
        self.waiting_since.get_or_insert(now);
    }

    /// Restarts the clock of the current step, because a generation begins.
    pub fn restart(&mut self, now: Instant) {
        self.step_started = Some(now);
        if let Some(since) = self.waiting_since.take() {
            self.waited_seconds += now.duration_since(since).as_secs_f64();
        }
    }

    /// Seconds since the last step, or since the generation began.
    fn lap(&mut self, now: Instant) -> f64 {
        let started = self.step_started.replace(now).unwrap_or(now);
        let seconds = now.duration_since(started).as_secs_f64();
        let mean = self.mean_step_seconds.unwrap_or(seconds);
        self.mean_step_seconds = Some(mean + PACE_WEIGHT * (seconds - mean));
        seconds
    }
}

impl Cluster {
    /// Number of updates that have a record.
    pub fn recorded(&self) -> u64 {
        self.stats.recorded()
    }

    /// The digest of the weights after `step` updates will be known: its step is not settled yet.
    pub fn awaits_digest(&self, step: u64) -> bool {
        step > self.stats.recorded && self.stopping.is_none()
    }

    /// The digest of the weights after `step` updates, where it is known.
    pub fn weights_digest(&self, step: u64) -> Option<&str> {
        let of_ready = || {
            let ready = self.members.any_ready()?;
            (ready.step == step).then_some(ready.weights_digest.as_str())
        };
        let of_report = || {
            let reports = &self.pending_commit.as_ref()?.reports;
            let mut digests = reports.values().filter(|report| report.step == step);
            digests.find_map(|report| {
                Some(report.weights_digest.as_str()).filter(|digest| !digest.is_empty())
            })
        };
        let asked_for = self.saving.digest_of(step);
        let settled = asked_for.or_else(|| self.stats.digest_of(step));
        settled.or_else(of_report).or_else(of_ready)
    }

    /// Orders the exchange of a step of which every slot is held. The work after it goes out at once.
    pub(super) fn order_exchange(&mut self, now: Instant, step: u64, commands: &mut Vec<Command>) {
        for &worker in self.members.ranks() {
            let exchange = v1::Exchange {
                generation: self.generation,
                step,
            };
            commands.push(Command::SendExchange { worker, exchange });
        }
        self.request_checkpoint(now, step + 1, commands);
        let work = self.schedule.following(Work::Train(step));
        let mut ledger = self.begin(now, work, commands);
        ledger.exchanged = true;
        self.pending_commit = Some(PendingCommit {
            ledger,
            reports: BTreeMap::new(),
            ordered: Some(now),
            committed_after: None,
        });
        if self.members.ranks().len() == 1 {
            // Else its peers would say that it does not answer.
            self.await_reports(now);
        }
    }

    /// Handles a worker's report: it commits the step, counts towards its end, or is compared with what is on record.
    pub(super) fn step_reported(
        &mut self,
        now: Instant,
        id: WorkerId,
        report: v1::StepReport,
        commands: &mut Vec<Command>,
    ) {
        let Some(worker) = self.members.get_mut(id) else {
            return;
        };
        let step = report.step;
        let settling_step = self
            .pending_commit
            .as_ref()
            .map(|settling| settling.ledger.work.step() + 1);
        if settling_step == Some(step) {
            worker.seen = step;
            self.collect(now, id, report, commands);
        } else if step <= self.committed {
            worker.seen = worker.seen.max(step);
            self.compare_late(now, id, &report, commands);
        } else if step <= self.stats.recorded {
            self.roll_forward_to_held_state(now, id, step, commands);
        } else if step == self.committed + 1 && self.ledger.exchanged {
            worker.seen = step;
            self.commit_late(now, id, report, commands);
        } else {
            let reason = format!("it reported step {step}, which was not due");
            self.expel(now, id, reason, commands);
        }
    }

    /// Adds a report of the step that is being settled. The first one commits the step, the last one settles it.
    fn collect(
        &mut self,
        now: Instant,
        id: WorkerId,
        report: v1::StepReport,
        commands: &mut Vec<Command>,
    ) {
        let Some(settling) = &mut self.pending_commit else {
            return;
        };
        settling.reports.insert(id, report);
        if settling.committed_after.is_none() {
            self.committed = settling.ledger.work.step() + 1;
            settling.committed_after = Some(self.stats.lap(now));
            self.saving.note_commit(self.committed, now);
            self.await_reports(now);
        }
        if self.all_reported() {
            let agreed = self.settle(commands);
            let may_grow =
                self.stopping.is_none() && self.stage == Stage::Running && self.may_grow();
            match self.stage {
                Stage::Ended => {}
                _ if !agreed || may_grow => self.start_generation(now, commands),
                _ => self.proceed(now, commands),
            }
        } else {
            self.proceed(now, commands);
        }
    }

    fn all_reported(&self) -> bool {
        let settling = self.pending_commit.as_ref();
        let reported = |id| settling.is_some_and(|settling| settling.reports.contains_key(id));
        self.members.ranks().iter().all(reported)
    }

    /// Compares a late report, of a step that is settled: its worker finished an exchange that broke for others.
    fn compare_late(
        &mut self,
        now: Instant,
        id: WorkerId,
        report: &v1::StepReport,
        commands: &mut Vec<Command>,
    ) {
        if let Some(digest) = self.stats.digest_of(report.step)
            && !report.weights_digest.is_empty()
            && digest != report.weights_digest
        {
            let reason = disagreement(report.step, &report.weights_digest, digest);
            self.expel(now, id, reason, commands);
        }
    }

    /// Commits a step whose exchange was thought to be broken: this worker had finished it.
    fn commit_late(
        &mut self,
        now: Instant,
        id: WorkerId,
        report: v1::StepReport,
        commands: &mut Vec<Command>,
    ) {
        self.take_late(Some(now), id, report);
        self.start_generation(now, commands);
    }

    /// Marks a step as committed by a report that came when its exchange was thought to be broken. `now` ends the step's time;
    /// None where that is not known.
    pub(super) fn take_late(&mut self, now: Option<Instant>, id: WorkerId, report: v1::StepReport) {
        let work = self.schedule.following(self.ledger.work);
        let next = match self.ahead.take() {
            Some(ahead) if ahead.work == work => ahead,
            _ => Ledger::new(work, self.schedule.slots(work)),
        };
        self.committed = report.step;
        self.pending_commit = Some(PendingCommit {
            ledger: std::mem::replace(&mut self.ledger, next),
            reports: BTreeMap::from([(id, report)]),
            ordered: None,
            committed_after: now.map(|now| self.stats.lap(now)),
        });
    }

    /// Ends the settling because the generation ends: with the reports that came, or back to before the exchange where
    /// nobody who is left has finished it.
    pub(super) fn interrupt_settling(&mut self, commands: &mut Vec<Command>) {
        let Some(settling) = &self.pending_commit else {
            return;
        };
        if !settling.reports.is_empty() {
            self.settle(commands);
            return;
        }
        let Some(settling) = self.pending_commit.take() else {
            return;
        };
        self.committed = settling.ledger.work.step();
        self.ahead = Some(std::mem::replace(&mut self.ledger, settling.ledger));
    }

    /// Records the step and takes out whoever disagrees. False where somebody did.
    pub(super) fn settle(&mut self, commands: &mut Vec<Command>) -> bool {
        let Some(settling) = self.pending_commit.take() else {
            return true;
        };
        let step = settling.ledger.work.step() + 1;
        let Some(agreed) = majority(&settling.reports) else {
            let said = settling.reports.iter().map(|(id, report)| {
                let name = self.members.name(*id);
                format!("{name} has {}", short(&report.weights_digest))
            });
            let said: Vec<String> = said.collect();
            let reason = format!(
                "the workers disagree on the weights after step {step} and none is outvoted: {}; one of these machines \
                 computes wrongly",
                said.join(", ")
            );
            self.fail(reason, commands);
            return false;
        };
        let odd = settling
            .reports
            .iter()
            .filter(|(_, report)| verdict(report) != verdict(agreed));
        let mut unanimous = true;
        for (id, report) in odd {
            let reason = disagreement(step, &report.weights_digest, &agreed.weights_digest);
            self.forget(*id, &reason, commands);
            commands.push(Command::Expel {
                worker: *id,
                reason,
            });
            unanimous = false;
        }
        let members = self.members.ranks().iter();
        let names = members.map(|id| self.members.name(*id));
        self.probing.note_commit(names);
        self.record(&settling, agreed, commands);
        unanimous
    }
}

/// What reports of one step must agree on.
fn verdict(report: &v1::StepReport) -> (&str, bool) {
    (&report.weights_digest, report.skipped)
}

/// One of the reports that agree with more than half of all; None where no side has a majority.
fn majority(reports: &BTreeMap<WorkerId, v1::StepReport>) -> Option<&v1::StepReport> {
    reports.values().find(|report| {
        let votes = reports
            .values()
            .filter(|other| verdict(other) == verdict(report));
        2 * votes.count() > reports.len()
    })
}

/// Why a worker is sent away whose weights after `step` updates differ from the others'.
pub(super) fn disagreement(step: u64, own: &str, agreed: &str) -> String {
    format!(
        "its weights after step {step} are {} where the others have {}; this machine computes wrongly",
        short(own),
        short(agreed)
    )
}
