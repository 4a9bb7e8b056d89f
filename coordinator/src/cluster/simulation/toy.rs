//! One toy worker: what it was told, what it holds, and what it has yet to say. It does nothing by itself.

use std::collections::{BTreeSet, VecDeque};
use std::time::Instant;

use common::wire::PlanKind;
use proto::v1;

use super::super::{Command, Event, WorkerId};
use super::feeds::Feeds;

/// In a worker's queue.
#[derive(Debug)]
pub enum Task {
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
pub type Exchange = (u64, u64, u64);

pub struct Toy {
    pub id: WorkerId,
    /// Of its session.
    pub term: u64,
    /// Its session broke: it goes on with what it was told, and joins again when this is over.
    pub away_until: Option<Instant>,
    /// It came back with its state.
    pub rejoined_with_state: bool,
    /// What it remembers of its own updates.
    pub updates: Vec<v1::Update>,
    pub ready: bool,
    /// Updates seen.
    pub step: u64,
    pub accumulator: BTreeSet<u32>,
    pub down: VecDeque<Command>,
    pub up: VecDeque<Event>,
    pub tasks: VecDeque<Task>,
    pub generation: Option<v1::Generation>,
    /// Waits for the state of the generation's source.
    pub receiving: bool,
    /// Has put its accumulator into this exchange and waits for the others.
    pub exchanging: Option<Exchange>,
    pub saves: Vec<u64>,
    /// A slot in hand that it was asked to give back.
    pub abandons: Option<u32>,
    /// Stopped until then: says, hears and does nothing.
    pub hangs_until: Option<Instant>,
    /// Was stopped once.
    pub hung: bool,
    pub heartbeat_at: Instant,
    pub feeds: Feeds,
}

impl Toy {
    /// Newly started.
    pub fn new(id: WorkerId, term: u64, now: Instant) -> Self {
        Self {
            id,
            term,
            away_until: None,
            rejoined_with_state: false,
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
            heartbeat_at: now,
            feeds: Feeds::default(),
        }
    }

    pub fn generation_number(&self) -> u64 {
        self.generation.as_ref().map_or(0, |g| g.generation)
    }

    pub fn enter(&mut self, generation: v1::Generation) {
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
    pub fn give_back(&mut self, withdraw: &v1::Withdraw) {
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

    pub fn say_withdrawn(&mut self, step: u64, kind: PlanKind, slots: Vec<u32>) {
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

    pub fn say_entered(&mut self, generation: u64) {
        let entered = v1::Entered {
            generation,
            step: self.step,
            held: self.held(),
        };
        let worker = self.id;
        self.up.push_back(Event::WorkerEntered { worker, entered });
    }

    pub fn held(&self) -> Vec<v1::HeldSlot> {
        let of_slot = |slot: &u32| held(*slot, self.step);
        self.accumulator.iter().map(of_slot).collect()
    }

    pub fn compute(&mut self, step: u64, kind: PlanKind, slot: u32) {
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

pub fn held(slot: u32, step: u64) -> v1::HeldSlot {
    v1::HeldSlot {
        slot,
        loss_sum: f64::from(slot) + step as f64,
        trained_tokens: 1,
        ..Default::default()
    }
}
