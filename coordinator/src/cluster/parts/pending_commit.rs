//! A step that is being committed: what its members report, and whether they agree.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use proto::v1;

use super::ledger::Ledger;
use crate::cluster::event::WorkerId;

/// A step between its exchange and the last report of it.
#[derive(Debug)]
pub struct PendingCommit {
    /// The step's own ledger: needed again where the exchange breaks.
    ledger: Ledger,
    /// Reports that came so far; the first one committed the step.
    reports: BTreeMap<WorkerId, v1::StepReport>,
    /// When its members were told to exchange. None where this coordinator did not order the exchange, or had given it up.
    ordered: Option<Instant>,
    /// Seconds from the step's beginning to its first report, where both were seen.
    committed_after: Option<f64>,
}

impl PendingCommit {
    /// The step of this ledger, whose members are told now to exchange.
    pub fn ordered(now: Instant, mut ledger: Ledger) -> Self {
        ledger.mark_exchanged();
        Self {
            ledger,
            reports: BTreeMap::new(),
            ordered: Some(now),
            committed_after: None,
        }
    }

    /// A step whose exchange was ordered in an earlier generation or term, as its reports say now.
    pub fn recalled(
        ledger: Ledger,
        reports: BTreeMap<WorkerId, v1::StepReport>,
        committed_after: Option<f64>,
    ) -> Self {
        Self {
            ledger,
            reports,
            ordered: None,
            committed_after,
        }
    }

    /// Number of updates after this step: what its reports say.
    pub fn step(&self) -> u64 {
        self.ledger.work().step() + 1
    }

    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Gives the exchange up: the slots are where they were before it.
    pub fn into_ledger(self) -> Ledger {
        self.ledger
    }

    /// Frees the slots of a lost worker. What it reported stays: the step is committed, though its state may be lost with it.
    pub fn release(&mut self, worker: WorkerId) {
        self.ledger.release(worker);
    }

    /// Adds a report. The first one commits the step: then `lap` says in how many seconds since its beginning. True where it did.
    pub fn report(
        &mut self,
        worker: WorkerId,
        report: v1::StepReport,
        lap: impl FnOnce() -> f64,
    ) -> bool {
        self.reports.insert(worker, report);
        if self.is_committed() {
            return false;
        }
        self.committed_after = Some(lap());
        true
    }

    /// Whether a report came in time to commit the step.
    pub fn is_committed(&self) -> bool {
        self.committed_after.is_some()
    }

    /// Seconds from the step's beginning to its first report, where both were seen.
    pub fn seconds(&self) -> Option<f64> {
        self.committed_after
    }

    pub fn has_reports(&self) -> bool {
        !self.reports.is_empty()
    }

    pub fn has_reported(&self, worker: WorkerId) -> bool {
        self.reports.contains_key(&worker)
    }

    /// All reports so far.
    pub fn reports(&self) -> &BTreeMap<WorkerId, v1::StepReport> {
        &self.reports
    }

    /// Digest of the weights after `step` updates, where a report of this step says it.
    pub fn digest_of(&self, step: u64) -> Option<&str> {
        let mut reports = self.reports.values().filter(|report| report.step == step);
        reports.find_map(|report| {
            Some(report.weights_digest.as_str()).filter(|digest| !digest.is_empty())
        })
    }

    /// When the exchange was ordered, of which no report came yet.
    pub fn unanswered_since(&self) -> Option<Instant> {
        self.ordered.filter(|_| !self.has_reports())
    }

    /// Moves the time at which the exchange was ordered: the driver did not listen for so long.
    pub fn postpone(&mut self, by: Duration) {
        if let Some(ordered) = &mut self.ordered {
            *ordered += by;
        }
    }

    /// One of the reports that agree with more than half of all; None where no side has a majority.
    pub fn agreed(&self) -> Option<&v1::StepReport> {
        self.reports.values().find(|report| {
            let reports = self.reports.values();
            let votes = reports.filter(|other| verdict(other) == verdict(report));
            2 * votes.count() > self.reports.len()
        })
    }

    /// The workers whose reports do not agree with `agreed`, and what they say.
    pub fn outvoted(
        &self,
        agreed: &v1::StepReport,
    ) -> impl Iterator<Item = (WorkerId, &v1::StepReport)> {
        let reports = self.reports.iter().map(|(id, report)| (*id, report));
        reports.filter(|(_, report)| verdict(report) != verdict(agreed))
    }
}

/// What reports of one step must agree on.
fn verdict(report: &v1::StepReport) -> (&str, bool) {
    (&report.weights_digest, report.skipped)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::schedule::Work;
    use crate::cluster::tests::course;

    fn pending(digests: &[&str]) -> PendingCommit {
        let ledger = Ledger::of(&course(6, 4), Work::Train(0));
        let report = |(id, digest): (u64, &&str)| {
            let report = v1::StepReport {
                step: 1,
                weights_digest: (*digest).to_owned(),
                ..Default::default()
            };
            (WorkerId(id), report)
        };
        let reports = (1..).zip(digests).map(report).collect();
        PendingCommit::recalled(ledger, reports, None)
    }

    #[test]
    fn who_is_outvoted_is_named_and_of_two_nobody_is() {
        let three = pending(&["a", "b", "a"]);
        let agreed = three.agreed().cloned().unwrap_or_default();
        let outvoted: Vec<WorkerId> = three.outvoted(&agreed).map(|(id, _)| id).collect();
        assert_eq!(outvoted, [WorkerId(2)]);
        assert!(pending(&["a", "b"]).agreed().is_none());
    }

    #[test]
    fn only_the_first_report_commits_the_step() {
        let mut pending = pending(&[]);
        let report = v1::StepReport::default();
        assert!(pending.report(WorkerId(1), report.clone(), || 2.0));
        assert!(!pending.report(WorkerId(2), report, || 9.0));
        assert_eq!(pending.seconds(), Some(2.0));
    }
}
