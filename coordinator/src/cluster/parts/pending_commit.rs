//! A step that is being committed: what its members report, and whether they agree.

use std::collections::BTreeMap;
use std::time::Instant;

use proto::v1;

use super::ledger::Ledger;
use crate::cluster::event::WorkerId;

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

/// What reports of one step must agree on.
pub(in crate::cluster) fn verdict(report: &v1::StepReport) -> (&str, bool) {
    (&report.weights_digest, report.skipped)
}

/// One of the reports that agree with more than half of all; None where no side has a majority.
pub(in crate::cluster) fn majority(
    reports: &BTreeMap<WorkerId, v1::StepReport>,
) -> Option<&v1::StepReport> {
    reports.values().find(|report| {
        let votes = reports
            .values()
            .filter(|other| verdict(other) == verdict(report));
        2 * votes.count() > reports.len()
    })
}
