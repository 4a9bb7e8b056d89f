//! The cluster against toy workers that follow the protocol, with random delays, deaths and arrivals, and with coordinators
//! that die. A toy exchange fails the test where a slot is missing or held twice; that is the property everything else
//! rests on.

mod feeds;
mod restarts;
mod toy;
mod work;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use common::rng::CounterRng;
use common::wire::HEARTBEAT_INTERVAL;

use self::restarts::Disk;
use self::toy::{Exchange, Toy};
use super::run_event::RunEvent;
use super::tests::{course, join, settings};
use super::{Cluster, Command, Event, Outcome, WorkerId};

const TOTAL_STEPS: u64 = 6;
const SLOTS: u32 = 5;
const MAX_ACTIONS: usize = 20_000;
/// Longer than the shortest deadline, shorter than the longest: some that hang come back in time.
const LONGEST_HANG_MS: u64 = 6_000;

struct World {
    seed: u64,
    rng: CounterRng,
    now: Instant,
    cluster: Cluster,
    toys: BTreeMap<WorkerId, Toy>,
    /// What members put into an exchange.
    exchanges: BTreeMap<Exchange, BTreeMap<WorkerId, BTreeSet<u32>>>,
    /// Members of each generation of each term.
    members: BTreeMap<(u64, u64), BTreeSet<WorkerId>>,
    disk: Disk,
    next_id: u64,
    stored: u64,
    committed: Vec<u64>,
    evaluated: Vec<u64>,
    deaths_left: u32,
    hangs_left: u32,
    drains_left: u32,
    /// Were told that they may go.
    let_go: Vec<WorkerId>,
    /// What the expelled still said, and how many of them come back.
    late: Vec<Event>,
    returning: u32,
    /// Newcomers that entered with their last updates on the way.
    entered_by_feed: usize,
    outcome: Option<Outcome>,
}

impl World {
    fn new(seed: u64, min_workers: usize, deaths: u32) -> Self {
        let mut settings = settings();
        settings.min_workers = min_workers;
        Self {
            seed,
            rng: CounterRng::new(seed, &[99]),
            now: Instant::now(),
            cluster: Cluster::new(settings, course(TOTAL_STEPS, SLOTS)),
            toys: BTreeMap::new(),
            exchanges: BTreeMap::new(),
            members: BTreeMap::new(),
            disk: Disk::new(min_workers),
            next_id: 1,
            stored: 0,
            committed: Vec::new(),
            evaluated: Vec::new(),
            deaths_left: deaths,
            hangs_left: deaths,
            drains_left: deaths,
            let_go: Vec::new(),
            late: Vec::new(),
            returning: 0,
            entered_by_feed: 0,
            outcome: None,
        }
    }

    fn run(mut self) -> Self {
        for _ in 0..3 {
            self.arrive();
        }
        for _ in 0..MAX_ACTIONS {
            if self.outcome.is_some() {
                return self;
            }
            self.now += Duration::from_millis(self.rng.below(20));
            self.act();
        }
        panic!("seed {}: the run does not end", self.seed);
    }

    fn act(&mut self) {
        for event in std::mem::take(&mut self.late) {
            self.handle(event);
        }
        for _ in 0..std::mem::take(&mut self.returning) {
            self.arrive();
        }
        for id in std::mem::take(&mut self.let_go) {
            self.toys.remove(&id);
            let reason = "it left".to_owned();
            self.handle(Event::WorkerLost { worker: id, reason });
            self.arrive();
        }
        self.live();
        self.come_back();
        if self.coordinator_dies() {
            return self.restart();
        }
        let ids: Vec<WorkerId> = self.toys.keys().copied().collect();
        let dice = self.rng.below(400);
        if ids.is_empty() || (dice == 0 && ids.len() < 5) {
            return self.arrive();
        }
        let id = ids[self.rng.below(ids.len() as u64) as usize];
        if self.toys[&id].hangs_until.is_some() {
            return;
        }
        if self.toys[&id].away_until.is_some() {
            // Nobody hears it, but it has something in hand.
            return self.work(id);
        }
        match dice {
            391..=394 if self.disk.breaks_left > 0 => self.lose_session(id),
            395..=399 if self.hangs_left > 0 => self.hang(id),
            391..=394 if self.drains_left > 0 && self.toys[&id].ready => {
                self.drains_left -= 1;
                let reason = "it was asked to stop".to_owned();
                self.handle(Event::WorkerDraining { worker: id, reason });
            }
            1..=6 if self.deaths_left > 0 => self.die(id),
            7..=20 => self.handle(Event::Ticked),
            21..=150 => self.deliver_up(id),
            151..=260 => self.deliver_down(id),
            _ => self.work(id),
        }
    }

    /// Heartbeats of those who can, and the end of hangs.
    fn live(&mut self) {
        let now = self.now;
        let mut heard = Vec::new();
        for (id, toy) in &mut self.toys {
            toy.hangs_until = toy.hangs_until.filter(|until| *until > now);
            let speaks = toy.hangs_until.is_none() && toy.away_until.is_none();
            if speaks && toy.heartbeat_at <= now {
                toy.heartbeat_at = now + HEARTBEAT_INTERVAL;
                heard.push(*id);
            }
        }
        for worker in heard {
            self.handle(Event::Heard { worker });
        }
    }

    fn hang(&mut self, id: WorkerId) {
        self.hangs_left -= 1;
        let hang = Duration::from_millis(self.rng.below(LONGEST_HANG_MS));
        if let Some(toy) = self.toys.get_mut(&id) {
            toy.hangs_until = Some(self.now + hang);
            toy.hung = true;
        }
    }

    /// Its session ends; what it says when it wakes up comes too late, and it comes back as a newcomer.
    fn expelled(&mut self, id: WorkerId, reason: &str) {
        let should_lease = |toy: &Toy| match reason {
            reason if reason.contains("could not be copied") => true,
            reason if reason.contains("is on disk and nobody else has it") => true,
            reason if reason.contains("engine") => toy.hung,
            _ => toy.hangs_until.is_some(),
        };
        let Some(toy) = self.toys.remove(&id).filter(should_lease) else {
            panic!("seed {}: {id:?} was expelled: {reason}", self.seed)
        };
        self.late.extend(toy.up);
        self.returning += 1;
    }

    fn arrive(&mut self) {
        let id = WorkerId(self.next_id);
        self.next_id += 1;
        let toy = Toy::new(id, self.disk.term, self.now);
        self.toys.insert(id, toy);
        self.handle(join(id));
    }

    /// What the toy sent before its death arrives up to a random message, then its connection breaks.
    fn die(&mut self, id: WorkerId) {
        self.deaths_left -= 1;
        let Some(mut toy) = self.toys.remove(&id) else {
            return;
        };
        toy.up
            .truncate(self.rng.below(toy.up.len() as u64 + 1) as usize);
        for event in toy.up {
            self.handle(event);
        }
        let reason = "killed".to_owned();
        self.handle(Event::WorkerLost { worker: id, reason });
    }

    fn handle(&mut self, event: Event) {
        let mut commands = Vec::new();
        self.cluster.handle(self.now, event, &mut commands);
        for command in commands {
            if let Command::Emit(event) = &command {
                self.disk.observe(event);
            }
            self.carry_out(command);
        }
    }

    fn carry_out(&mut self, command: Command) {
        let worker = match &command {
            Command::Welcome { worker }
            | Command::SendProbe { worker, .. }
            | Command::SendFollow { worker, .. }
            | Command::SendFeed { worker, .. }
            | Command::SendPlan { worker, .. }
            | Command::SendLease { worker, .. }
            | Command::SendNcclId { worker, .. }
            | Command::SendWithdraw { worker, .. }
            | Command::SendExchange { worker, .. }
            | Command::RequestState { worker, .. } => *worker,
            Command::SendFinish { worker, .. } => return self.let_go.push(*worker),
            Command::SendGeneration {
                worker, generation, ..
            } => {
                let members = generation.members.iter().map(|m| WorkerId(m.worker));
                let key = (self.disk.term, generation.generation);
                self.members.insert(key, members.collect());
                *worker
            }
            Command::Refuse { worker, reason } => {
                panic!("seed {}: {worker:?} was refused: {reason}", self.seed)
            }
            Command::Expel { worker, reason } => return self.expelled(*worker, reason),
            Command::Emit(RunEvent::StepCommitted(record)) => {
                assert_eq!(
                    record.loss,
                    expected_loss(record.step),
                    "seed {}",
                    self.seed
                );
                return self.committed.push(record.step);
            }
            Command::Emit(RunEvent::Evaluated(record)) => return self.evaluated.push(record.step),
            Command::SendAside { worker, .. } => panic!("seed {}: {worker:?}", self.seed),
            Command::Emit(_) => return,
            Command::End(outcome) => return self.outcome = Some(outcome.clone()),
        };
        if let Some(toy) = self.toys.get_mut(&worker) {
            toy.down.push_back(command);
        }
    }
}

/// The mean over slots of one trained token each.
fn expected_loss(step: u64) -> f64 {
    let sum: f64 = (0..SLOTS).map(|s| f64::from(s) + (step - 1) as f64).sum();
    sum / f64::from(SLOTS)
}

fn finished() -> Option<Outcome> {
    Some(Outcome::Finished {
        step: TOTAL_STEPS,
        weights_digest: format!("weights-{TOTAL_STEPS}"),
    })
}

#[test]
fn random_event_orders_never_lose_or_double_a_slot() {
    let mut entered_by_feed = 0;
    for seed in 0..1500 {
        let world = World::new(seed, 1 + (seed % 3) as usize, (seed % 7) as u32).run();
        assert_eq!(world.outcome, finished(), "seed {seed}");
        let steps: Vec<u64> = (1..=TOTAL_STEPS).collect();
        assert_eq!(world.committed, steps, "seed {seed}");
        assert_eq!(world.evaluated, [2, 4, 6], "seed {seed}");
        entered_by_feed += world.entered_by_feed;
    }
    assert!(entered_by_feed > 100, "{entered_by_feed}");
}
