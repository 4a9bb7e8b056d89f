//! What the toy does with its orders: the worker's step (`worker/src/run/step.rs`) with arithmetic in place of training. It
//! outlives sessions: weights and accumulator stay, and go on under the next one.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::wire::{PlanKind, up};
use proto::v1;
use proto::v1::worker_message::Message as Up;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::DropGuard;
use worker::engine::Abandon;
use worker::run::leases::{Leases, SlotKey};

use crate::feed::{News, Source, Update, follow};
use crate::mesh::{Collective, MeshError, SCALARS, Start};
use crate::net::Node;
use crate::truth::{SlotResult, Weights, hex};
use crate::world::{World, count};

/// What the session passes on.
pub enum Order {
    /// A new session has begun: say what is held, and talk to this one from now on.
    Attach(Line),
    Enter(v1::Generation),
    Plan(v1::Plan),
    Lease(Lease),
    Exchange(v1::Exchange),
    Save(v1::SaveState),
    Feed(v1::Feed),
    /// What the feed brings comes among the orders.
    Follow(Source, mpsc::WeakUnboundedSender<Order>),
    Fed(u64, News),
}

/// Slots whose blocks are on their way.
pub struct Lease {
    pub generation: u64,
    pub step: u64,
    pub kind: PlanKind,
    pub slots: Vec<(u32, oneshot::Receiver<Vec<u8>>)>,
}

/// To the coordinator, as long as the session lasts.
pub struct Line {
    pub leases: Arc<Leases>,
    pub up: mpsc::Sender<v1::WorkerMessage>,
    pub uploads: mpsc::UnboundedSender<Snapshot>,
    /// Updates that the coordinator has on record.
    pub recorded: u64,
    /// Told where blocks cannot be had.
    pub given_up: mpsc::Sender<()>,
}

/// Updates that are remembered for a coordinator which lost their records.
const REMEMBERED_UPDATES: usize = 16;

#[derive(Clone, Copy, Debug)]
pub struct Snapshot {
    pub step: u64,
    pub weights: Weights,
}

/// A state with what its owner remembers of its newest updates.
#[derive(Clone, Debug)]
pub struct StateCopy {
    pub state: Snapshot,
    updates: VecDeque<v1::Update>,
}

#[derive(Default)]
struct Accumulator {
    step: u64,
    held: BTreeMap<u32, SlotResult>,
    sums: [i64; SCALARS],
    invalid: u64,
}

impl Accumulator {
    fn new(step: u64) -> Self {
        Self {
            step,
            ..Self::default()
        }
    }

    fn held(&self) -> Vec<v1::HeldSlot> {
        let held = |(slot, result): (&u32, &SlotResult)| v1::HeldSlot {
            slot: *slot,
            loss_sum: result.loss_sum,
            trained_tokens: result.trained_tokens,
            correct_tokens: 0,
            invalid_scalars: result.invalid,
        };
        self.held.iter().map(held).collect()
    }
}

/// A slot is computed in so many pieces; between two of them it can be abandoned.
const LAYERS: u64 = 4;

pub struct Engine {
    world: Arc<World>,
    node: Node,
    job_digest: String,
    state: Snapshot,
    line: Option<Line>,
    collective: Arc<Collective>,
    newest_generation: Arc<AtomicU64>,
    abandon: Abandon,
    accumulator: Accumulator,
    generation: u64,
    plan: Option<v1::Plan>,
    saves: BTreeSet<u64>,
    updates: VecDeque<v1::Update>,
    /// The attempt, and what ends the feed when it is dropped.
    following: Option<(u64, DropGuard)>,
    /// A generation that it enters with the next updates of that feed.
    entering: Option<v1::Generation>,
}

impl Engine {
    pub fn new(
        world: Arc<World>,
        node: Node,
        (job_digest, state): (String, Snapshot),
        collective: Arc<Collective>,
        newest_generation: Arc<AtomicU64>,
    ) -> Self {
        Self {
            world,
            node,
            job_digest,
            state,
            line: None,
            collective,
            newest_generation,
            abandon: Abandon::default(),
            accumulator: Accumulator::default(),
            generation: 0,
            plan: None,
            saves: BTreeSet::new(),
            updates: VecDeque::new(),
            following: None,
            entering: None,
        }
    }

    /// Obeys until nobody can give orders any more.
    pub async fn work(mut self, mut orders: mpsc::UnboundedReceiver<Order>) {
        while let Some(order) = orders.recv().await {
            self.obey(order).await;
        }
    }

    async fn obey(&mut self, order: Order) {
        match order {
            Order::Attach(line) => self.attach(line).await,
            Order::Enter(generation) => self.enter(generation).await,
            Order::Plan(plan) => self.begin(plan),
            Order::Lease(lease) => self.compute(lease).await,
            Order::Exchange(exchange) => self.exchange(exchange).await,
            Order::Save(save) => {
                self.saves.insert(save.step);
                self.save();
            }
            Order::Feed(feed) => {
                let feeds = self.collective.feeds();
                feeds.begin(feed.worker, feed.attempt, self.state_copy());
            }
            Order::Follow(source, orders) => self.follow(source, orders),
            Order::Fed(attempt, news) => self.fed(attempt, news).await,
        }
    }

    fn follow(&mut self, source: Source, orders: mpsc::WeakUnboundedSender<Order>) {
        let attempt = source.attempt;
        let tell = move |news| {
            if let Some(orders) = orders.upgrade() {
                let _ = orders.send(Order::Fed(attempt, news));
            }
        };
        let guard = follow(self.world.net.clone(), self.node, source, tell);
        self.following = Some((attempt, guard));
        self.entering = None;
    }

    async fn fed(&mut self, attempt: u64, news: News) {
        if self.following.as_ref().is_none_or(|(of, _)| *of != attempt) {
            return;
        }
        let report = match news {
            News::State(copy) => {
                self.take_over(copy);
                None
            }
            News::Update(update) => Some(self.repeat(&update)),
            News::Lost => {
                self.following = None;
                self.entering = None;
                let reason = "it broke off".to_owned();
                let lost = v1::FeedLost { attempt, reason };
                return self.send(Up::FeedLost(lost)).await;
            }
        };
        let step = self.state.step;
        self.send(Up::Synced(v1::Synced {
            attempt,
            step,
            report,
        }))
        .await;
        if let Some(generation) = self.entering.take_if(|next| next.step <= step) {
            self.enter(generation).await;
        }
    }

    /// Makes an update that the others have made.
    fn repeat(&mut self, update: &Update) -> v1::StepReport {
        let Snapshot { step, weights } = self.state;
        let model = &self.world.model;
        self.state.weights = model.apply(&weights, step, &update.sums, update.invalid);
        self.state.step += 1;
        let report = v1::StepReport {
            step: self.state.step,
            grad_norm: 1.0,
            skipped: update.invalid > 0,
            weights_digest: hex(&self.state.weights),
            ..Default::default()
        };
        self.remember(report.clone(), update.slots.clone());
        report
    }

    async fn attach(&mut self, line: Line) {
        let unrecorded = |update: &&v1::Update| {
            let step = update.report.as_ref().map(|report| report.step);
            step > Some(line.recorded)
        };
        let updates = self.updates.iter().filter(unrecorded).cloned().collect();
        self.line = Some(line);
        self.generation = 0;
        self.plan = None;
        self.saves.clear();
        self.following = None;
        self.entering = None;
        self.newest_generation.store(0, Ordering::SeqCst);
        self.send(Up::Ready(v1::Ready {
            step: self.state.step,
            layout_digest: "layout".into(),
            trainable_scalars: 1,
            weights_digest: hex(&self.state.weights),
            job_digest: self.job_digest.clone(),
            total_scalars: 1,
            updates,
        }))
        .await;
    }

    async fn enter(&mut self, generation: v1::Generation) {
        self.generation = generation.generation;
        self.plan = None;
        self.entering = None;
        if self.superseded() {
            return;
        }
        if generation.fed.contains(&generation.rank) && self.state.step < generation.step {
            self.entering = Some(generation);
            return;
        }
        self.following = None;
        if generation.behind.contains(&generation.rank) {
            match self.receive_state(&generation).await {
                Ok(copy) => {
                    self.take_over(copy);
                    self.save();
                }
                Err(error) => return self.report_failure(error).await,
            }
        } else if generation.rank == generation.source && !generation.behind.is_empty() {
            self.send_state(&generation);
        }
        let held = match self.accumulator.step == self.state.step {
            true => self.accumulator.held(),
            false => Vec::new(),
        };
        self.send(Up::Entered(v1::Entered {
            generation: self.generation,
            step: self.state.step,
            held,
        }))
        .await
    }

    fn state_copy(&self) -> StateCopy {
        StateCopy {
            state: self.state,
            updates: self.updates.clone(),
        }
    }

    fn take_over(&mut self, copy: StateCopy) {
        self.state = copy.state;
        self.updates = copy.updates;
        self.accumulator = Accumulator::default();
        self.plan = None;
    }

    async fn receive_state(&self, generation: &v1::Generation) -> Result<StateCopy, MeshError> {
        let mesh = self.collective.mesh(self.generation).await?;
        mesh.receive_state(generation.source, generation.step).await
    }

    fn send_state(&self, generation: &v1::Generation) {
        if self.state.step != generation.step {
            return;
        }
        let (behind, copy) = (generation.behind.clone(), self.state_copy());
        let (collective, number) = (self.collective.clone(), self.generation);
        tokio::spawn(async move {
            if let Ok(mesh) = collective.mesh(number).await {
                mesh.send_state(&behind, &copy).await;
            }
        });
    }

    fn begin(&mut self, plan: v1::Plan) {
        if self.is_void(plan.generation, plan.step) || plan.kind != PlanKind::Train.to_wire() {
            return;
        }
        if self.accumulator.step != plan.step || plan.clear {
            self.accumulator = Accumulator::new(plan.step);
        }
        self.plan = Some(plan);
    }

    async fn compute(&mut self, lease: Lease) {
        let train = lease.kind == PlanKind::Train;
        for (slot, blocks) in lease.slots {
            let planned = !train || self.plan.as_ref().is_some_and(|plan| slot < plan.slots);
            if self.is_void(lease.generation, lease.step) || !planned {
                return;
            }
            let Ok(data) = blocks.await else {
                return self.give_line_up();
            };
            let key = SlotKey {
                generation: lease.generation,
                kind: lease.kind,
                step: lease.step,
                slot,
            };
            let leases = self.line.as_ref().map(|line| line.leases.clone());
            let Some(leases) = leases.filter(|leases| leases.begin(key, &self.abandon)) else {
                continue;
            };
            let slot_ms = self.slot_ms(slot);
            let is_done = self.pass(slot_ms).await;
            leases.end();
            if !is_done {
                self.give_back(key).await;
                continue;
            }
            let what = (lease.kind, slot);
            let model = &self.world.model;
            let result = model.compute(&self.state.weights, lease.step, what, &data);
            if train {
                self.add(slot, result);
            }
            self.send(Up::SlotDone(v1::SlotDone {
                generation: lease.generation,
                step: lease.step,
                kind: lease.kind.to_wire(),
                slot,
                loss_sum: result.loss_sum,
                trained_tokens: result.trained_tokens,
                correct_tokens: 0,
                compute_us: 1000 * slot_ms,
                invalid_scalars: 0,
            }))
            .await;
        }
    }

    /// Spends the time of a slot. False where it was abandoned.
    async fn pass(&self, slot_ms: u64) -> bool {
        for layer in 0..LAYERS {
            let piece = slot_ms * (layer + 1) / LAYERS - slot_ms * layer / LAYERS;
            self.world.net.sleep(self.node, piece).await;
            if self.abandon.is_asked() {
                return false;
            }
        }
        true
    }

    async fn give_back(&mut self, key: SlotKey) {
        count(&self.world.counts.withdrawn, 1);
        self.send(Up::Withdrawn(v1::Withdrawn {
            generation: key.generation,
            step: key.step,
            kind: key.kind.to_wire(),
            slots: vec![key.slot],
        }))
        .await;
    }

    /// Machines differ in speed, and so does one machine from slot to slot.
    fn slot_ms(&self, slot: u32) -> u64 {
        let dice = self.world.dice;
        let key = [11, self.node.into()];
        let pace = 10 + dice.below(120, &key);
        pace + dice.below(pace, &[12, self.node.into(), self.state.step, slot.into()])
    }

    fn add(&mut self, slot: u32, result: SlotResult) {
        if self.accumulator.held.insert(slot, result).is_some() {
            let oracle = &self.world.oracle;
            oracle.violation(format!("worker {} added slot {slot} twice", self.node));
        }
        for (sum, part) in self.accumulator.sums.iter_mut().zip(result.sums) {
            *sum = sum.wrapping_add(part);
        }
        self.accumulator.invalid += result.invalid;
    }

    async fn exchange(&mut self, exchange: v1::Exchange) {
        let Some(plan) = self.plan else {
            return;
        };
        if self.is_void(exchange.generation, exchange.step) || plan.step != exchange.step {
            return;
        }
        let reduced = match self.reduce(&plan).await {
            Ok(reduced) => reduced,
            Err(error) => return self.report_failure(error).await,
        };
        let (world, step) = (self.world.clone(), self.state.step);
        let model = &world.model;
        self.state.weights = model.apply(&self.state.weights, step, &reduced.sums, reduced.invalid);
        self.state.step += 1;
        self.collective.feeds().publish(&Update {
            step,
            sums: reduced.sums.clone(),
            invalid: reduced.invalid,
            slots: reduced.slots.clone(),
        });
        world.oracle.updated(
            step,
            plan.slots,
            &reduced.slots,
            reduced.invalid,
            &self.state.weights,
        );
        self.plan = None;
        let digest = match world.computes_wrongly(self.node, self.state.step) {
            true => "f".repeat(64),
            false => hex(&self.state.weights),
        };
        let report = v1::StepReport {
            generation: exchange.generation,
            step: self.state.step,
            grad_norm: 1.0,
            skipped: reduced.invalid > 0,
            weights_digest: digest,
            ..Default::default()
        };
        self.remember(report.clone(), reduced.slots);
        self.send(Up::StepReport(report)).await;
        self.save();
    }

    async fn reduce(&self, plan: &v1::Plan) -> Result<crate::mesh::Reduced, MeshError> {
        let mesh = self.collective.mesh(self.generation).await?;
        let start = Start {
            step: plan.step,
            held: self.accumulator.held(),
            invalid: self.accumulator.invalid,
        };
        mesh.all_reduce(start, &self.accumulator.sums).await
    }

    async fn report_failure(&mut self, error: MeshError) {
        match error {
            MeshError::Superseded => {}
            MeshError::Peer { rank, reason } => {
                self.send(Up::PeerLost(v1::PeerLost {
                    generation: self.generation,
                    rank,
                    reason,
                }))
                .await
            }
        }
    }

    fn save(&mut self) {
        let step = self.state.step;
        if self.saves.remove(&step) {
            // The other side may be gone; then so is the session.
            if let Some(line) = &self.line {
                let _ = line.uploads.send(self.state);
            }
        }
        self.saves.retain(|due| *due > step);
    }

    fn is_void(&self, generation: u64, step: u64) -> bool {
        self.superseded() || generation != self.generation || step != self.state.step
    }

    fn superseded(&self) -> bool {
        self.newest_generation.load(Ordering::SeqCst) > self.generation
    }

    fn remember(&mut self, report: v1::StepReport, slots: Vec<v1::HeldSlot>) {
        while self.updates.len() >= REMEMBERED_UPDATES {
            self.updates.pop_front();
        }
        let report = Some(report);
        self.updates.push_back(v1::Update { report, slots });
    }

    /// On a broken line it is lost: the next session begins with what this worker holds.
    async fn send(&self, message: Up) {
        let node = self.node;
        self.world.net.note(|| format!("w{node} says {message:?}"));
        if let Some(line) = &self.line {
            let _ = line.up.send(up(message)).await;
        }
    }

    fn give_line_up(&self) {
        if let Some(line) = &self.line {
            let _ = line.given_up.try_send(());
        }
    }
}
