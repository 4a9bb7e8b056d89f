//! Who reaches whom, and the largest group of workers that all reach each other.
//!
//! In: what workers said of each other's addresses. Out: who is left out of a generation, and whose fault that is. An exchange
//! needs every pair, both ways. What nobody has said anything of is taken to work.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use crate::cluster::event::WorkerId;

/// Characters kept of a worker's reason why it did not reach another.
const MAX_REASON_CHARS: usize = 200;
/// Bound of the search: after so many sets of workers to leave out, the best one so far is taken.
const MAX_LOOKS: usize = 2000;

/// Most workers with the newest state of which each is tried as the one that takes part.
const MAX_KEPT: usize = 16;

/// Which worker cannot reach which other, as far as it is known.
#[derive(Clone, Debug, Default)]
pub struct Reachability {
    /// Reasons by pair: who failed to reach whom.
    failures: BTreeMap<(WorkerId, WorkerId), String>,
}

/// A worker that might take part.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    pub id: WorkerId,
    pub is_member: bool,
    /// Whether it has the newest state that anybody has: one of these takes part in any case.
    pub is_newest: bool,
}

impl Reachability {
    /// Notes that `from` does not reach `to`. False where that was known.
    pub fn fail(&mut self, from: WorkerId, to: WorkerId, reason: &str) -> bool {
        let reason = reason.chars().take(MAX_REASON_CHARS).collect();
        let before = self.failures.insert((from, to), reason);
        before.is_none()
    }

    /// Notes that `from` reaches `to`. True where it did not before.
    pub fn succeed(&mut self, from: WorkerId, to: WorkerId) -> bool {
        self.failures.remove(&(from, to)).is_some()
    }

    pub fn forget(&mut self, worker: WorkerId) {
        self.failures
            .retain(|(from, to), _| *from != worker && *to != worker);
    }

    pub fn is_empty(&self) -> bool {
        self.failures.is_empty()
    }

    /// Why `from` does not reach `to`; None where no failure is known.
    pub fn failure(&self, from: WorkerId, to: WorkerId) -> Option<&str> {
        self.failures.get(&(from, to)).map(String::as_str)
    }

    #[cfg(test)]
    fn is_broken(&self, a: WorkerId, b: WorkerId) -> bool {
        self.failures.contains_key(&(a, b)) || self.failures.contains_key(&(b, a))
    }

    /// All workers that this one does not reach or is not reached by.
    pub fn partners(&self, worker: WorkerId) -> BTreeSet<WorkerId> {
        let pairs = self.failures.keys();
        let other = |(from, to): &(WorkerId, WorkerId)| match worker {
            worker if worker == *from => Some(*to),
            worker if worker == *to => Some(*from),
            _ => None,
        };
        pairs.filter_map(other).collect()
    }

    /// Whether the worker's own address is what fails: somebody does not reach it, although it reaches them.
    pub fn is_at_fault(&self, worker: WorkerId) -> bool {
        let into = self.failures.keys().filter(|(_, to)| *to == worker);
        let mut one_way = into.filter(|(from, to)| !self.failures.contains_key(&(*to, *from)));
        one_way.next().is_some()
    }

    /// The failure that says best why the worker is left out: who did not reach whom and why. One to reach it, if there is one.
    pub fn reason_of(&self, worker: WorkerId) -> Option<(WorkerId, WorkerId, &str)> {
        let mut into = self.failures.iter().filter(|((_, to), _)| *to == worker);
        let mut from = self
            .failures
            .iter()
            .filter(|((from, _), _)| *from == worker);
        let ((from, to), reason) = into.next().or_else(|| from.next())?;
        Some((*from, *to, reason))
    }

    /// The workers that must be left out so that all others reach each other: as few as can be found; of as few, rather those at
    /// fault, then those who are no members, then those who came last.
    pub fn outsiders(&self, candidates: &[Candidate]) -> BTreeSet<WorkerId> {
        let present: BTreeSet<WorkerId> = candidates.iter().map(|one| one.id).collect();
        let partners = |one: &Candidate| -> BTreeSet<WorkerId> {
            let mut partners = self.partners(one.id);
            partners.retain(|partner| present.contains(partner));
            partners
        };
        let conflicts: BTreeMap<WorkerId, BTreeSet<WorkerId>> = candidates
            .iter()
            .map(|one| (one.id, partners(one)))
            .filter(|(_, partners)| !partners.is_empty())
            .collect();
        if conflicts.is_empty() {
            return BTreeSet::new();
        }
        let cost = |one: &Candidate| {
            let blameless = u8::from(!self.is_at_fault(one.id));
            (
                one.id,
                (blameless, u8::from(one.is_member), Reverse(one.id)),
            )
        };
        let mut search = Search {
            conflicts: &conflicts,
            costs: candidates.iter().map(cost).collect(),
            best: None,
            looks: 0,
        };
        let newest: Vec<WorkerId> = candidates
            .iter()
            .filter(|one| one.is_newest)
            .map(|one| one.id)
            .collect();
        search.look(BTreeSet::new(), BTreeSet::new());
        let keeps_one = |(_, out): &(Total, BTreeSet<WorkerId>)| {
            newest.is_empty() || newest.iter().any(|id| !out.contains(id))
        };
        if !search.best.as_ref().is_some_and(keeps_one) {
            search.best = None;
            for kept in newest.iter().take(MAX_KEPT) {
                search.looks = 0;
                search.look(conflicts[kept].clone(), BTreeSet::from([*kept]));
            }
        }
        search
            .best
            .map(|(_, outsiders)| outsiders)
            .unwrap_or_default()
    }
}

/// Cost of leaving a worker out: not at fault (0 or 1), a member (0 or 1), and its number, later ones cheaper.
type Cost = (u8, u8, Reverse<WorkerId>);
/// Cost of a set of workers left out: how many, then what each of them costs, the dearest first.
type Total = (usize, Vec<Cost>);

/// Search for the smallest set that has one of every pair that does not work: a minimum vertex cover, by branching on the worker
/// with the most conflicts, within a bound.
struct Search<'a> {
    conflicts: &'a BTreeMap<WorkerId, BTreeSet<WorkerId>>,
    costs: BTreeMap<WorkerId, Cost>,
    best: Option<(Total, BTreeSet<WorkerId>)>,
    looks: usize,
}

impl Search<'_> {
    fn look(&mut self, out: BTreeSet<WorkerId>, kept: BTreeSet<WorkerId>) {
        self.looks += 1;
        let bound = out.len() + self.pairs_apart(&out);
        let is_worse = self.best.as_ref().is_some_and(|((len, _), _)| bound > *len);
        if is_worse || (self.best.is_some() && self.looks > MAX_LOOKS) {
            return;
        }
        let Some((worker, partners)) = self.most_conflicting(&out) else {
            let mut costs: Vec<Cost> = out.iter().map(|id| self.costs[id]).collect();
            costs.sort_unstable_by(|a, b| b.cmp(a));
            let total = (out.len(), costs);
            if self.best.as_ref().is_none_or(|(best, _)| total < *best) {
                self.best = Some((total, out));
            }
            return;
        };
        // The first way down always leaves out the one with the most conflicts: a good answer, and soon there.
        if !kept.contains(&worker) {
            let mut without = out.clone();
            without.insert(worker);
            self.look(without, kept.clone());
        }
        if kept.is_disjoint(&partners) {
            let mut out = out;
            out.extend(partners);
            let mut kept = kept;
            kept.insert(worker);
            self.look(out, kept);
        }
    }

    fn left<'a>(
        &'a self,
        worker: WorkerId,
        out: &'a BTreeSet<WorkerId>,
    ) -> impl Iterator<Item = WorkerId> + 'a {
        let partners = self.conflicts[&worker].iter().copied();
        partners.filter(move |partner| !out.contains(partner))
    }

    /// The worker with the most conflicts among those who are not out, and those it is in conflict with.
    fn most_conflicting(&self, out: &BTreeSet<WorkerId>) -> Option<(WorkerId, BTreeSet<WorkerId>)> {
        let inside = self.conflicts.keys().filter(|id| !out.contains(id));
        let counted = inside.map(|id| (self.left(*id, out).count(), Reverse(self.costs[id]), *id));
        let (count, _, worker) = counted.max()?;
        (count > 0).then(|| (worker, self.left(worker, out).collect()))
    }

    /// Number of pairs in conflict that share nobody: of each, one more must be left out.
    fn pairs_apart(&self, out: &BTreeSet<WorkerId>) -> usize {
        let mut taken = BTreeSet::new();
        for id in self.conflicts.keys().filter(|id| !out.contains(id)) {
            if taken.contains(id) {
                continue;
            }
            if let Some(partner) = self.left(*id, out).find(|other| !taken.contains(other)) {
                taken.extend([*id, partner]);
            }
        }
        taken.len() / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(numbers: &[u64]) -> BTreeSet<WorkerId> {
        numbers.iter().copied().map(WorkerId).collect()
    }

    fn candidates(count: u64, newest: &[u64]) -> Vec<Candidate> {
        let candidate = |number| Candidate {
            id: WorkerId(number),
            is_member: true,
            is_newest: newest.contains(&number),
        };
        (1..=count).map(candidate).collect()
    }

    /// Neither reaches the other.
    fn cut(reachability: &mut Reachability, a: u64, b: u64) {
        reachability.fail(WorkerId(a), WorkerId(b), "timed out");
        reachability.fail(WorkerId(b), WorkerId(a), "timed out");
    }

    #[test]
    fn nobody_is_left_out_where_all_reach_each_other() {
        let reachability = Reachability::default();
        assert_eq!(reachability.outsiders(&candidates(3, &[1])), ids(&[]));
    }

    #[test]
    fn of_two_the_one_whose_address_fails_is_left_out_whoever_came_first() {
        for (from, to) in [(1, 2), (2, 1)] {
            let mut reachability = Reachability::default();
            reachability.fail(WorkerId(from), WorkerId(to), "no such host");
            assert_eq!(reachability.outsiders(&candidates(2, &[1, 2])), ids(&[to]));
            assert!(reachability.is_at_fault(WorkerId(to)));
            assert!(!reachability.is_at_fault(WorkerId(from)));
        }
    }

    #[test]
    fn where_both_fail_nobody_is_at_fault_and_the_last_one_is_left_out() {
        let mut reachability = Reachability::default();
        cut(&mut reachability, 1, 2);
        assert_eq!(reachability.outsiders(&candidates(2, &[1, 2])), ids(&[2]));
        assert!(!reachability.is_at_fault(WorkerId(1)) && !reachability.is_at_fault(WorkerId(2)));
    }

    #[test]
    fn one_that_nobody_reaches_is_left_out_and_not_those_who_say_so() {
        let mut reachability = Reachability::default();
        for other in [2, 3, 4] {
            reachability.fail(WorkerId(other), WorkerId(1), "refused");
        }
        assert_eq!(reachability.outsiders(&candidates(4, &[1, 2])), ids(&[1]));
    }

    #[test]
    fn of_two_halves_the_larger_one_goes_on() {
        let mut reachability = Reachability::default();
        for (a, b) in [(1, 3), (1, 4), (1, 5), (2, 3), (2, 4), (2, 5)] {
            cut(&mut reachability, a, b);
        }
        let all = candidates(5, &[1, 2, 3, 4, 5]);
        assert_eq!(reachability.outsiders(&all), ids(&[1, 2]));
        // Unless only the smaller one has what the run has come to.
        assert_eq!(
            reachability.outsiders(&candidates(5, &[2])),
            ids(&[3, 4, 5])
        );
    }

    #[test]
    fn a_member_is_not_left_out_for_a_newcomer() {
        let mut reachability = Reachability::default();
        cut(&mut reachability, 1, 2);
        let mut both = candidates(2, &[]);
        both[0].is_member = false;
        assert_eq!(reachability.outsiders(&both), ids(&[1]));
    }

    #[test]
    fn a_ring_of_five_keeps_two() {
        let mut reachability = Reachability::default();
        for (a, b) in [(1, 2), (2, 3), (3, 4), (4, 5), (5, 1)] {
            cut(&mut reachability, a, b);
        }
        let outsiders = reachability.outsiders(&candidates(5, &[1, 2, 3, 4, 5]));
        assert_eq!(outsiders.len(), 3);
        let kept: Vec<u64> = (1..=5)
            .filter(|id| !outsiders.contains(&WorkerId(*id)))
            .collect();
        assert!(!reachability.is_broken(WorkerId(kept[0]), WorkerId(kept[1])));
    }

    #[test]
    fn a_thousand_workers_in_two_halves_are_parted_within_the_bound() {
        let mut reachability = Reachability::default();
        for a in 1..=60 {
            for b in 61..=121 {
                cut(&mut reachability, a, b);
            }
        }
        let outsiders = reachability.outsiders(&candidates(1000, &[]));
        assert_eq!(outsiders, (1..=60).map(WorkerId).collect());
    }

    #[test]
    fn whoever_is_gone_or_reached_again_counts_no_more() {
        let mut reachability = Reachability::default();
        cut(&mut reachability, 1, 2);
        reachability.succeed(WorkerId(1), WorkerId(2));
        assert!(reachability.is_broken(WorkerId(1), WorkerId(2)));
        reachability.succeed(WorkerId(2), WorkerId(1));
        assert!(reachability.is_empty());
        cut(&mut reachability, 1, 2);
        reachability.forget(WorkerId(1));
        assert!(reachability.is_empty());
    }
}
