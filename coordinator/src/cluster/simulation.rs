//! The cluster against toy workers that follow the protocol, with random delays, deaths and arrivals, and with coordinators
//! that die. A toy exchange fails the test where a slot is missing or held twice; that is the property everything else
//! rests on.

mod feeds;
mod restarts;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use common::rng::CounterRng;
use common::wire::{HEARTBEAT_INTERVAL, PlanKind};
use proto::v1;

use self::feeds::Feeds;
use self::restarts::Disk;
use super::tests::{course, join, ready, settings};
use super::{Cluster, Command, Event, Outcome, WorkerId};
use crate::events::RunEvent;

const TOTAL_STEPS: u64 = 6;
const SLOTS: u32 = 5;
const MAX_ACTIONS: usize = 20_000;
/// Longer than the shortest deadline, shorter than the longest: some that hang come back in time.
const LONGEST_HANG_MS: u64 = 6_000;

/// In a worker's queue.
#[derive(Debug)]
enum Task {
    Slot {
        step: u64,
        kind: PlanKind,
        slot: u32,
    },
    Exchange {
        generation: u64,
        step: u64,
    },
}

/// Term, generation and step.
type Exchange = (u64, u64, u64);

struct Toy {
    id: WorkerId,
    /// Of its session.
    term: u64,
    /// Its session broke: it goes on with what it was told, and joins again when this is over.
    away_until: Option<Instant>,
    /// It came back with its state.
    is_veteran: bool,
    /// What it remembers of its own updates.
    updates: Vec<v1::Update>,
    ready: bool,
    /// Updates seen.
    step: u64,
    accumulator: BTreeSet<u32>,
    down: VecDeque<Command>,
    up: VecDeque<Event>,
    tasks: VecDeque<Task>,
    generation: Option<v1::Generation>,
    /// Waits for the state of the generation's source.
    receiving: bool,
    /// Has put its accumulator into this exchange and waits for the others.
    exchanging: Option<Exchange>,
    saves: Vec<u64>,
    /// A slot in hand that it was asked to give back.
    abandons: Option<u32>,
    /// Stopped until then: says, hears and does nothing.
    hangs_until: Option<Instant>,
    /// Was stopped once.
    hung: bool,
    heartbeat_at: Instant,
    feeds: Feeds,
}

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
        let deserves = |toy: &Toy| match reason {
            reason if reason.contains("could not be copied") => true,
            reason if reason.contains("is on disk and nobody else has it") => true,
            reason if reason.contains("engine") => toy.hung,
            _ => toy.hangs_until.is_some(),
        };
        let Some(toy) = self.toys.remove(&id).filter(deserves) else {
            panic!("seed {}: {id:?} was expelled: {reason}", self.seed)
        };
        self.late.extend(toy.up);
        self.returning += 1;
    }

    fn arrive(&mut self) {
        let id = WorkerId(self.next_id);
        self.next_id += 1;
        let toy = Toy {
            id,
            term: self.disk.term,
            away_until: None,
            is_veteran: false,
            updates: Vec::new(),
            ready: false,
            step: 0,
            accumulator: BTreeSet::new(),
            down: VecDeque::new(),
            up: VecDeque::new(),
            tasks: VecDeque::new(),
            generation: None,
            receiving: false,
            exchanging: None,
            saves: Vec::new(),
            abandons: None,
            hangs_until: None,
            hung: false,
            heartbeat_at: self.now,
            feeds: Feeds::default(),
        };
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
            | Command::SendFollow { worker, .. }
            | Command::SendFeed { worker, .. }
            | Command::SendPlan { worker, .. }
            | Command::SendLease { worker, .. }
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
            Command::Emit(_) => return,
            Command::End(outcome) => return self.outcome = Some(outcome.clone()),
        };
        if let Some(toy) = self.toys.get_mut(&worker) {
            toy.down.push_back(command);
        }
    }

    fn deliver_up(&mut self, id: WorkerId) {
        let event = self.toys.get_mut(&id).and_then(|toy| toy.up.pop_front());
        if let Some(event) = event {
            self.handle(event);
        }
    }

    fn deliver_down(&mut self, id: WorkerId) {
        let stored = self.stored;
        let Some(toy) = self.toys.get_mut(&id) else {
            return;
        };
        match toy.down.pop_front() {
            Some(Command::Welcome { .. }) if toy.is_veteran => {}
            Some(Command::Welcome { .. }) => toy.step = stored,
            Some(Command::SendGeneration {
                rank, generation, ..
            }) => toy.enter(v1::Generation {
                rank,
                ..(*generation).clone()
            }),
            Some(Command::SendFollow { follow, .. }) => toy.feeds.follow(follow),
            Some(Command::SendFeed { feed, .. }) => toy.feeds.begin(feed, toy.step),
            Some(Command::SendPlan { plan, .. }) => {
                assert!(plan.step <= toy.step + 1, "a plan from the future");
                if plan.clear && plan.generation == toy.generation_number() {
                    toy.accumulator.clear();
                }
            }
            Some(Command::SendLease { lease, .. }) => {
                let current = toy.generation.as_ref().map(|g| g.generation);
                if current == Some(lease.generation) {
                    let kind = PlanKind::from_wire(lease.kind).unwrap_or(PlanKind::Eval);
                    let step = lease.step;
                    let task = |slot| Task::Slot { step, kind, slot };
                    toy.tasks.extend(lease.slots.into_iter().map(task));
                }
            }
            Some(Command::SendWithdraw { withdraw, .. }) => toy.give_back(&withdraw),
            Some(Command::SendExchange { exchange, .. }) => {
                let v1::Exchange { generation, step } = exchange;
                if toy.generation.as_ref().map(|g| g.generation) == Some(generation) {
                    toy.tasks.push_back(Task::Exchange { generation, step });
                }
            }
            Some(Command::RequestState { step, .. }) => toy.saves.push(step),
            _ => {}
        }
    }

    fn work(&mut self, id: WorkerId) {
        self.receive_state(id);
        self.follow(id);
        self.save(id);
        let Some(toy) = self.toys.get_mut(&id) else {
            return;
        };
        if !toy.ready {
            if toy.down.is_empty() {
                toy.ready = true;
                let mut event = ready(id, toy.step);
                if let Event::WorkerReady { ready, .. } = &mut event {
                    ready.updates.clone_from(&toy.updates);
                }
                toy.up.push_back(event);
            }
            return;
        }
        if toy.receiving {
            return;
        }
        if let Some(exchange) = toy.exchanging {
            return self.finish_exchange(id, exchange);
        }
        match toy.tasks.pop_front() {
            Some(Task::Slot { step, kind, slot }) => {
                // It may be too late to abandon it.
                let abandons = toy.abandons.take() == Some(slot) && self.rng.below(2) == 0;
                match abandons {
                    true => toy.say_withdrawn(step, kind, vec![slot]),
                    false => toy.compute(step, kind, slot),
                }
            }
            Some(Task::Exchange { generation, step }) => {
                assert_eq!(toy.step, step, "an exchange of another step");
                let exchange = (toy.term, generation, step);
                toy.exchanging = Some(exchange);
                let own = toy.accumulator.clone();
                self.exchanges.entry(exchange).or_default().insert(id, own);
            }
            None => {}
        }
    }

    /// Completes at this worker once all members have put in, whether or not the others still live.
    fn finish_exchange(&mut self, id: WorkerId, exchange: Exchange) {
        let parts = &self.exchanges[&exchange];
        if self.members[&(exchange.0, exchange.1)]
            .iter()
            .any(|m| !parts.contains_key(m))
        {
            return;
        }
        let mut all: Vec<u32> = parts.values().flatten().copied().collect();
        all.sort();
        let every: Vec<u32> = (0..SLOTS).collect();
        assert_eq!(all, every, "seed {}: exchange {exchange:?}", self.seed);
        if let Some(toy) = self.toys.get_mut(&id) {
            let slots = every.iter().map(|slot| held(*slot, toy.step)).collect();
            toy.step += 1;
            toy.accumulator.clear();
            toy.exchanging = None;
            toy.feeds.publish(toy.step);
            let report = v1::StepReport {
                generation: exchange.1,
                step: toy.step,
                weights_digest: format!("weights-{}", toy.step),
                ..Default::default()
            };
            toy.updates.push(v1::Update {
                report: Some(report.clone()),
                slots,
            });
            toy.up.push_back(Event::StepReported { worker: id, report });
        }
    }

    fn receive_state(&mut self, id: WorkerId) {
        let Some(toy) = self.toys.get(&id).filter(|toy| toy.receiving) else {
            return;
        };
        let Some(generation) = toy.generation.clone() else {
            return;
        };
        let source = WorkerId(generation.members[generation.source as usize].worker);
        let gives = self.toys.get(&source).is_some_and(|source| {
            source.step == generation.step && source.generation_number() == generation.generation
        });
        if gives && let Some(toy) = self.toys.get_mut(&id) {
            toy.step = generation.step;
            toy.accumulator.clear();
            toy.feeds.end();
            toy.receiving = false;
            toy.say_entered(generation.generation);
        }
    }

    fn save(&mut self, id: WorkerId) {
        let Some(toy) = self.toys.get_mut(&id) else {
            return;
        };
        // Where a step's report is lost but its state is not, the step's record is lost too.
        let unreported = |event: &Event| matches!(event, Event::StepReported { .. });
        // Without a session nobody takes it.
        if toy.up.iter().any(unreported) || toy.away_until.is_some() {
            return;
        }
        let Some(position) = toy.saves.iter().position(|step| *step == toy.step) else {
            return;
        };
        if !self.disk.may_store(toy.step, &self.committed) {
            return;
        }
        let step = toy.saves.remove(position);
        self.stored = self.stored.max(step);
        let path = format!("checkpoint-{step}").into();
        self.handle(Event::StateStored {
            step,
            path,
            weights_digest: format!("weights-{step}"),
        });
    }
}

impl Toy {
    fn generation_number(&self) -> u64 {
        self.generation.as_ref().map_or(0, |g| g.generation)
    }

    fn enter(&mut self, generation: v1::Generation) {
        self.exchanging = None;
        self.abandons = None;
        // The slot in hand is finished, what has not begun is dropped.
        if let Some(Task::Slot { step, kind, slot }) = self.tasks.pop_front() {
            self.compute(step, kind, slot);
        }
        self.tasks.clear();
        self.receiving = generation.behind.contains(&generation.rank);
        let number = generation.generation;
        let is_fed = generation.fed.contains(&generation.rank) && self.step < generation.step;
        self.feeds
            .enter(is_fed.then_some((number, generation.step)));
        self.generation = Some(generation);
        if !self.receiving && !is_fed {
            self.say_entered(number);
        }
    }

    /// The first task may have begun: it is abandoned when its turn comes, or is done before. The others are given back
    /// at once.
    fn give_back(&mut self, withdraw: &v1::Withdraw) {
        let kind = PlanKind::from_wire(withdraw.kind).unwrap_or(PlanKind::Eval);
        let is_current = withdraw.generation == self.generation_number();
        let mut back = Vec::new();
        for slot in &withdraw.slots {
            let wanted = |task: &Task| {
                let wanted = (withdraw.step, kind, *slot);
                matches!(task, Task::Slot { step, kind, slot } if (*step, *kind, *slot) == wanted)
            };
            match self.tasks.iter().position(wanted) {
                Some(0) if is_current && self.exchanging.is_none() => {
                    self.abandons = Some(*slot);
                }
                Some(position) if is_current => {
                    self.tasks.remove(position);
                    back.push(*slot);
                }
                _ => {}
            }
        }
        if !back.is_empty() {
            self.say_withdrawn(withdraw.step, kind, back);
        }
    }

    fn say_withdrawn(&mut self, step: u64, kind: PlanKind, slots: Vec<u32>) {
        let withdrawn = v1::Withdrawn {
            generation: self.generation_number(),
            step,
            kind: kind.to_wire(),
            slots,
        };
        let worker = self.id;
        self.up
            .push_back(Event::SlotsWithdrawn { worker, withdrawn });
    }

    fn say_entered(&mut self, generation: u64) {
        let entered = v1::Entered {
            generation,
            step: self.step,
            held: self.held(),
        };
        let worker = self.id;
        self.up.push_back(Event::WorkerEntered { worker, entered });
    }

    fn held(&self) -> Vec<v1::HeldSlot> {
        let of_slot = |slot: &u32| held(*slot, self.step);
        self.accumulator.iter().map(of_slot).collect()
    }

    fn compute(&mut self, step: u64, kind: PlanKind, slot: u32) {
        if step != self.step {
            return;
        }
        if kind == PlanKind::Train {
            assert!(self.accumulator.insert(slot), "a slot twice at one worker");
        }
        let done = v1::SlotDone {
            generation: self.generation_number(),
            step,
            kind: kind.to_wire(),
            slot,
            loss_sum: f64::from(slot) + step as f64,
            trained_tokens: 1,
            correct_tokens: 0,
            compute_us: 1,
            invalid_scalars: 0,
        };
        let worker = self.id;
        self.up.push_back(Event::SlotDone { worker, done });
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

fn held(slot: u32, step: u64) -> v1::HeldSlot {
    v1::HeldSlot {
        slot,
        loss_sum: f64::from(slot) + step as f64,
        trained_tokens: 1,
        ..Default::default()
    }
}
