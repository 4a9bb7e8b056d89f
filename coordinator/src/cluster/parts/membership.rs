//! Who is connected, who is a member of the current generation, and who was asked to stop.

mod checks;

use std::collections::{BTreeMap, BTreeSet};

pub use common::text::short_digest as short;
use proto::v1;

use crate::cluster::event::WorkerId;

/// One connected worker.
#[derive(Clone, Debug)]
pub struct Worker {
    pub name: String,
    /// Address (`HOST:PORT`) at which peers reach its exchange.
    pub address: String,
    pub numerics_class: String,
    /// Peak of its bfloat16 matrix products, in operations per second. None: not known.
    pub peak_flops: Option<f64>,
    /// The GPU that it computes on; None on a processor.
    pub gpu: Option<v1::Gpu>,
    /// What it said when it had loaded model and state; None while it loads.
    pub ready: Option<v1::Ready>,
    /// Updates its weights are known to have seen.
    pub seen: u64,
    /// It has entered the current generation, and said what its accumulator holds.
    pub entered: bool,
    /// It joined with a state of this run.
    pub rejoined_with_state: bool,
    /// It has not yet said what it brought in its accumulator.
    pub held_slots_unknown: bool,
    /// Its accumulator holds slots that cannot be counted, so its next plan tells it to empty it.
    pub must_clear: bool,
}

/// A worker that was asked to stop.
#[derive(Clone, Debug)]
pub struct Draining {
    pub reason: String,
    /// Whether it was asked for the committed state, as nobody else has it.
    was_asked: bool,
    /// Whether it is not to come back, because others cannot reach it.
    pub is_at_fault: bool,
}

/// All connected workers, and those of them that form the current generation.
#[derive(Clone, Debug, Default)]
pub struct Membership {
    workers: BTreeMap<WorkerId, Worker>,
    /// Members of the generation by rank, as far as they are still here.
    ranks: Vec<WorkerId>,
    /// Connected workers that were asked to stop.
    draining: BTreeMap<WorkerId, Draining>,
}

impl Membership {
    /// Adds a newcomer that passed its checks.
    pub fn add(&mut self, id: WorkerId, join: v1::Join, address: String) {
        let worker = Worker {
            rejoined_with_state: !join.job_digest.is_empty(),
            held_slots_unknown: !join.job_digest.is_empty(),
            must_clear: false,
            name: join.name,
            address,
            numerics_class: join.numerics_class,
            peak_flops: Some(join.peak_flops).filter(|peak| peak.is_finite() && *peak > 0.0),
            gpu: join.gpu,
            ready: None,
            seen: 0,
            entered: false,
        };
        self.workers.insert(id, worker);
    }

    pub fn remove(&mut self, id: WorkerId) -> Option<Worker> {
        self.ranks.retain(|member| *member != id);
        self.draining.remove(&id);
        self.workers.remove(&id)
    }

    pub fn get(&self, id: WorkerId) -> Option<&Worker> {
        self.workers.get(&id)
    }

    #[cfg(test)]
    pub fn get_mut(&mut self, id: WorkerId) -> Option<&mut Worker> {
        self.workers.get_mut(&id)
    }

    /// Notes what a worker has loaded.
    pub fn note_ready(&mut self, id: WorkerId, ready: v1::Ready) {
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.seen = ready.step;
            worker.ready = Some(ready);
        }
    }

    /// Notes that a worker's weights have seen `step` updates.
    pub fn note_seen(&mut self, id: WorkerId, step: u64) {
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.seen = step;
        }
    }

    /// Notes that a member has entered the current generation with weights that have seen `step` updates.
    pub fn note_entered(&mut self, id: WorkerId, step: u64) {
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.seen = step;
            worker.entered = true;
        }
    }

    /// Notes that a worker said what its accumulator holds. Where that cannot be counted, the worker has to empty it.
    pub fn note_held_slots(&mut self, id: WorkerId, counts: bool) {
        if let Some(worker) = self.workers.get_mut(&id) {
            worker.must_clear = !counts;
            worker.held_slots_unknown = false;
        }
    }

    /// Whether the worker has to be told to empty its accumulator. True once.
    pub fn take_must_clear(&mut self, id: WorkerId) -> bool {
        let worker = self.workers.get_mut(&id);
        worker.is_some_and(|worker| std::mem::take(&mut worker.must_clear))
    }

    /// Notes that a worker was asked to stop. False where that is known, or it is not here.
    pub fn drain(&mut self, id: WorkerId, reason: String) -> bool {
        if self.get(id).is_none() || self.is_draining(id) {
            return false;
        }
        let draining = Draining {
            reason,
            was_asked: false,
            is_at_fault: false,
        };
        self.draining.insert(id, draining);
        true
    }

    /// Notes that a worker which was asked to stop is not to come back, because others cannot reach it.
    pub fn blame_draining(&mut self, id: WorkerId) {
        if let Some(draining) = self.draining.get_mut(&id) {
            draining.is_at_fault = true;
        }
    }

    /// Whether the worker was asked to stop.
    pub fn is_draining(&self, id: WorkerId) -> bool {
        self.draining.contains_key(&id)
    }

    /// All workers that were asked to stop.
    pub fn draining(&self) -> Vec<WorkerId> {
        self.draining.keys().copied().collect()
    }

    /// Whether a worker that was asked to stop has yet to be asked for its state. True once.
    pub fn asks_for_state(&mut self, id: WorkerId) -> bool {
        let draining = self.draining.get_mut(&id);
        draining.is_some_and(|draining| !std::mem::replace(&mut draining.was_asked, true))
    }

    /// Takes out a worker that was asked to stop and may go.
    pub fn end_draining(&mut self, id: WorkerId) -> Option<Draining> {
        self.draining.remove(&id)
    }

    /// The connected worker whose exchange is reached at this address.
    pub fn at_address(&self, address: &str) -> Option<WorkerId> {
        let there = |(_, worker): &(&WorkerId, &Worker)| worker.address == address;
        self.workers.iter().find(there).map(|(id, _)| *id)
    }

    /// Name of a worker, for people.
    pub fn name(&self, id: WorkerId) -> &str {
        self.get(id).map_or("unknown", |worker| &worker.name)
    }

    pub fn ids(&self) -> Vec<WorkerId> {
        self.workers.keys().copied().collect()
    }

    pub fn count(&self) -> usize {
        self.workers.len()
    }

    /// Number of workers that have loaded model and state.
    pub fn ready_count(&self) -> usize {
        let ready = |worker: &&Worker| worker.ready.is_some();
        self.workers.values().filter(ready).count()
    }

    /// What some ready worker said of itself: all have loaded the same layout.
    pub fn any_ready(&self) -> Option<&v1::Ready> {
        self.workers
            .values()
            .find_map(|worker| worker.ready.as_ref())
    }

    /// Members of the current generation that are still here, by rank.
    pub fn ranks(&self) -> &[WorkerId] {
        &self.ranks
    }

    /// Rank of a worker in the current generation; None where it is no member.
    pub fn rank_of(&self, id: WorkerId) -> Option<u32> {
        let rank = self.ranks.iter().position(|member| *member == id)?;
        Some(rank as u32)
    }

    /// Whether some member that has seen `step` updates may hold slots that are not known yet.
    pub fn is_one_unheard(&self, step: u64) -> bool {
        let unheard = |worker: &Worker| worker.held_slots_unknown && worker.seen == step;
        let mut members = self.ranks.iter().filter_map(|id| self.get(*id));
        members.any(unheard)
    }

    /// Whether every member has entered the current generation.
    pub fn all_entered(&self) -> bool {
        let entered = |id: &WorkerId| self.get(*id).is_some_and(|worker| worker.entered);
        self.ranks.iter().all(entered)
    }

    /// The first member, else the first ready worker, that has seen exactly `step` updates.
    pub fn first_at(&self, step: u64) -> Option<WorkerId> {
        let at = |id: &WorkerId| {
            self.get(*id)
                .is_some_and(|worker| worker.ready.is_some() && worker.seen == step)
        };
        let member = self.ranks.iter().copied().find(at);
        member.or_else(|| self.workers.keys().copied().find(at))
    }

    /// Number of ready workers that joined with a state and have seen more than `step` updates.
    pub fn veterans_beyond(&self, step: u64) -> usize {
        self.veterans().filter(|worker| worker.seen > step).count()
    }

    /// Whether some worker joined with a state and has yet to say of which step.
    pub fn is_one_returning(&self) -> bool {
        let returns = |worker: &Worker| worker.rejoined_with_state && worker.ready.is_none();
        self.workers.values().any(returns)
    }

    /// The most updates that any ready worker has seen that joined with a state.
    pub fn newest_veteran(&self) -> Option<u64> {
        self.veterans().map(|worker| worker.seen).max()
    }

    fn veterans(&self) -> impl Iterator<Item = &Worker> {
        let workers = self.workers.values();
        workers.filter(|worker| worker.rejoined_with_state && worker.ready.is_some())
    }

    /// What a worker remembers of its update that led to `step`.
    pub fn update_of(&self, id: WorkerId, step: u64) -> Option<&v1::Update> {
        let leads_there = |update: &&v1::Update| {
            let report = update.report.as_ref();
            report.is_some_and(|report| report.step == step)
        };
        let ready = self.get(id)?.ready.as_ref()?;
        ready.updates.iter().find(leads_there)
    }

    /// The most optimizer updates that any member has seen.
    pub fn newest(&self) -> Option<u64> {
        let seen = |id: &WorkerId| self.get(*id).map(|worker| worker.seen);
        self.ranks.iter().filter_map(seen).max()
    }

    /// The most updates that a ready worker has seen, where all of them have seen more than `step`.
    pub fn all_beyond(&self, step: u64) -> Option<u64> {
        let ready = self
            .workers
            .values()
            .filter(|worker| worker.ready.is_some());
        let (mut least, mut most) = (None::<u64>, None::<u64>);
        for worker in ready {
            least = Some(least.map_or(worker.seen, |least| least.min(worker.seen)));
            most = most.max(Some(worker.seen));
        }
        most.filter(|_| least.is_some_and(|least| least > step))
    }

    /// Chooses the members of the next generation: those who stay keep their order, then come the entrants, first those
    /// who have seen most and then by number, up to `max_workers`. Whoever is not chosen waits, and so does who has seen
    /// more than `step` updates.
    pub fn elect(&mut self, max_workers: Option<usize>, step: u64, entrants: &BTreeSet<WorkerId>) {
        let mut others = Vec::new();
        for (id, worker) in &mut self.workers {
            worker.entered = false;
            if worker.seen <= step && entrants.contains(id) {
                others.push((worker.seen, *id));
            }
        }
        // Stable: equals stay in the order of their numbers.
        others.sort_by_key(|(seen, _)| std::cmp::Reverse(*seen));
        self.ranks.extend(others.into_iter().map(|(_, id)| id));
        self.ranks.truncate(max_workers.unwrap_or(usize::MAX));
    }

    /// Makes a member wait again. False where it was none.
    pub fn demote(&mut self, id: WorkerId) -> bool {
        let was_member = self.rank_of(id).is_some();
        self.ranks.retain(|member| *member != id);
        was_member
    }

    /// The generation as its members are told of it, but for each one's rank. Some member has seen `step` updates; its
    /// state comes from one that stays, where there is one.
    pub fn generation(
        &self,
        generation: u64,
        step: u64,
        is_fed: impl Fn(WorkerId) -> bool,
        stays: impl Fn(WorkerId) -> bool,
    ) -> v1::Generation {
        let member = |id: &WorkerId| {
            let worker = self.get(*id)?;
            Some(v1::Member {
                worker: id.0,
                name: worker.name.clone(),
                address: worker.address.clone(),
            })
        };
        let seen = |rank: &u32| {
            let id = self.ranks[*rank as usize];
            self.get(id).map_or(0, |worker| worker.seen)
        };
        let is_fed = |rank: &u32| is_fed(self.ranks[*rank as usize]);
        let all = 0..self.ranks.len() as u32;
        let (fed, behind) = all
            .clone()
            .filter(|rank| seen(rank) < step)
            .partition(is_fed);
        let stays = |rank: &u32| stays(self.ranks[*rank as usize]);
        let mut sources = all.filter(|rank| seen(rank) == step);
        let first = sources.next();
        let source = first.filter(stays).or_else(|| sources.find(stays));
        v1::Generation {
            generation,
            members: self.ranks.iter().filter_map(member).collect(),
            rank: 0,
            step,
            behind,
            fed,
            source: source.or(first).unwrap_or(0),
            ..v1::Generation::default()
        }
    }
}
