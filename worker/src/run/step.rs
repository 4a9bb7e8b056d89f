//! The step, readable top to bottom: what a worker does between Welcome and the end.
//!
//! In: orders, in the order in which the coordinator gave them. Out: messages to it. The trainer computes and the collective
//! sums, both behind the traits of [`backend`](super::backend), and this decides nothing but what is void: whatever does not fit
//! to the generation and to the updates that the weights have seen is dropped, because the coordinator plans it again. It knows
//! no thread and no socket: a real worker runs it on the engine's thread, and the coordinator's simulation as one task of many.

mod feeding;
mod handover;

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::data::block::Block;
use common::failpoint;
use common::files::WeightsFormat;
use common::wire::{PlanKind, up};
use proto::v1;
use proto::v1::worker_message::Message as Up;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::backend::{FollowedFeed, StepCollective, StepTrainer};
use super::error::RunError;
use super::leases::SlotKey;
use super::orders::{CoordinatorLink, Lease, Order};
use crate::collective::CollectiveError;
use crate::collective::feed::News;
use crate::engine::EngineError;
use crate::engine::slot::{self, HeldSlots};
use crate::rpc::blocks::BlocksError;
use crate::rpc::upload::State;
use crate::status::{Doing, Status};

/// Updates that a worker remembers with their slots. A coordinator that is killed has written down all but the last few.
const REMEMBERED_UPDATES: usize = 16;
/// Most slots of all remembered updates but the newest: they must fit into one message.
const REMEMBERED_SLOTS: usize = 64 << 10;

/// What the step shares with the rest of the worker.
pub struct StepChannels {
    pub orders: mpsc::Receiver<Order>,
    pub newest_generation: Arc<AtomicU64>,
    /// Set from outside to end the thread after the slot in hand.
    pub stop: Arc<AtomicBool>,
    /// Set by this thread once the model is loaded and orders are obeyed.
    pub ready: Arc<AtomicBool>,
    /// Number of updates made, counted by this thread.
    pub updates: Arc<AtomicU64>,
}

/// What a state is, beside what the trainer holds.
pub struct StateIdentity {
    pub job_digest: String,
    /// Format of the weights in the states that are uploaded.
    pub format: WeightsFormat,
}

/// The step of one worker, from its first order to its last.
pub struct StepLoop<Trainer: StepTrainer, Collective: StepCollective<Trainer>> {
    trainer: Trainer,
    collective: Collective,
    identity: StateIdentity,
    channels: StepChannels,
    /// The session with the coordinator. What is sent on a broken one is lost: the next session hears what came of it.
    link: Option<CoordinatorLink>,
    /// The generation that this worker has entered; 0 before the first.
    generation: u64,
    /// Plan of the training step in progress.
    plan: Option<v1::Plan>,
    /// Steps whose state was asked for and that are still to come.
    saves: BTreeSet<u64>,
    /// The newest updates made here, oldest first.
    updates: VecDeque<v1::Update>,
    /// The feed that leads this worker into a generation.
    following: Option<Collective::Feed>,
    /// The generation that this worker enters with the next updates of the feed.
    entering: Option<v1::Generation>,
    /// What the terminal shows of this worker.
    status: Status,
}

/// What the step does next.
enum Next {
    Obey(Order),
    Take(News),
    /// Nobody gives orders any more.
    End,
}

impl<Trainer, Collective> StepLoop<Trainer, Collective>
where
    Trainer: StepTrainer,
    Collective: StepCollective<Trainer>,
{
    /// A worker that holds a state and has no session yet.
    pub fn new(
        trainer: Trainer,
        collective: Collective,
        identity: StateIdentity,
        channels: StepChannels,
        status: Status,
    ) -> Self {
        Self {
            trainer,
            collective,
            identity,
            channels,
            link: None,
            generation: 0,
            plan: None,
            saves: BTreeSet::new(),
            updates: VecDeque::new(),
            following: None,
            entering: None,
            status,
        }
    }

    /// Obeys until told to stop, or until nobody can give orders any more.
    pub async fn work(mut self) -> Result<(), RunError> {
        self.channels.ready.store(true, Ordering::SeqCst);
        loop {
            self.rest();
            match self.next().await {
                Next::Obey(_) | Next::Take(_) if self.stopped() => return Ok(()),
                Next::Obey(order) => self.obey(order).await?,
                Next::Take(news) => self.take(news).await?,
                Next::End => return Ok(()),
            }
        }
    }

    /// Waits for an order, or for what the feed brings: both are done in turn.
    async fn next(&mut self) -> Next {
        let orders = &mut self.channels.orders;
        let next_order = async {
            let order = orders.recv().await;
            order.map_or(Next::End, Next::Obey)
        };
        let Some(feed) = &mut self.following else {
            return next_order.await;
        };
        tokio::select! {
            biased;
            next = next_order => next,
            news = feed.next() => Next::Take(news),
        }
    }

    /// Shows that nothing is to be done until the next order.
    fn rest(&self) {
        self.status.reached(self.trainer.step());
        self.status.set(match self.generation {
            0 => Doing::WaitingToBegin,
            _ => Doing::WaitingForSlots,
        });
    }

    async fn obey(&mut self, order: Order) -> Result<(), RunError> {
        match order {
            Order::Attach(link) => self.attach(link).await,
            Order::Enter(generation) => self.enter(&generation).await,
            Order::Plan(plan) => self.begin(plan),
            Order::Lease(lease) => self.compute(lease).await,
            Order::Exchange(exchange) => self.exchange(&exchange).await,
            Order::Save(save) => {
                self.saves.insert(save.step);
                self.save_state()
            }
            Order::Follow(source) => {
                self.follow(source);
                Ok(())
            }
            Order::Feed { run_id, feed } => self.feed(run_id, &feed),
            Order::Stop => Ok(()),
        }
    }

    /// Begins to talk to a new session: says what is held. What an earlier one ordered is planned again.
    async fn attach(&mut self, link: CoordinatorLink) -> Result<(), RunError> {
        let unrecorded = |update: &&v1::Update| {
            let step = update.report.as_ref().map(|report| report.step);
            step > Some(link.recorded)
        };
        let updates = self.updates.iter().filter(unrecorded).cloned().collect();
        self.link = Some(link);
        self.generation = 0;
        self.plan = None;
        self.following = None;
        self.entering = None;
        self.saves.clear();
        // The coordinator sends the next one only after it has heard what follows.
        self.channels.newest_generation.store(0, Ordering::SeqCst);
        let weights_digest = self.trainer.weights_digest()?;
        self.send(Up::Ready(v1::Ready {
            step: self.trainer.step(),
            layout_digest: self.trainer.layout().digest(),
            trainable_scalars: self.trainer.layout().scalars as u64,
            weights_digest,
            job_digest: self.identity.job_digest.clone(),
            total_scalars: self.trainer.total_scalars(),
            updates,
        }))
        .await;
        Ok(())
    }

    /// Enters a new generation: whoever is behind gets its state, then everyone says what it holds.
    pub(super) async fn enter(&mut self, generation: &v1::Generation) -> Result<(), RunError> {
        self.generation = generation.generation;
        self.status.entered(generation.members.len());
        self.plan = None;
        self.entering = None;
        if self.superseded() {
            return Ok(());
        }
        if generation.fed.contains(&generation.rank) && self.trainer.step() < generation.step {
            self.entering = Some(generation.clone());
            return Ok(());
        }
        self.conclude_feeds(generation);
        if generation.behind.contains(&generation.rank) {
            self.status.set(Doing::Copying);
            match self.receive_state(generation).await {
                Ok((snapshot, updates)) => {
                    self.take_over(&snapshot, updates)?;
                    self.save_state()?;
                }
                Err(error) => return self.report_failure(error).await,
            }
        } else if generation.rank == generation.source && !generation.behind.is_empty() {
            self.send_state(generation)?;
        }
        let is_current = self.trainer.open_step() == Some(self.trainer.step());
        let held = match is_current {
            true => slot::to_wire(self.trainer.held()),
            false => Vec::new(),
        };
        self.send(Up::Entered(v1::Entered {
            generation: self.generation,
            step: self.trainer.step(),
            held,
        }))
        .await;
        Ok(())
    }

    fn begin(&mut self, plan: v1::Plan) -> Result<(), RunError> {
        if self.is_void(plan.generation, plan.step) {
            return Ok(());
        }
        if PlanKind::from_wire(plan.kind) == Ok(PlanKind::Train) {
            let slots = plan.slots as usize;
            if plan.clear {
                self.trainer.forget_slots();
            }
            self.trainer
                .begin_step(plan.step, plan.trained_tokens, slots)?;
            self.plan = Some(plan);
        }
        Ok(())
    }

    async fn compute(&mut self, lease: Lease) -> Result<(), RunError> {
        let train = lease.kind == PlanKind::Train;
        for (slot, blocks) in lease.slots {
            let planned = !train || self.plan.as_ref().is_some_and(|plan| slot < plan.slots);
            if self.is_void(lease.generation, lease.step) || !planned || self.stopped() {
                return Ok(());
            }
            let blocks = match blocks.wait().await {
                Ok(blocks) => blocks,
                // The network's fault. The slots are leased again to whoever is in the next generation.
                Err(BlocksError::Broken { reason }) => {
                    self.give_link_up(reason);
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            };
            let key = SlotKey {
                generation: lease.generation,
                kind: lease.kind,
                step: lease.step,
                slot,
            };
            if !self.take_in_hand(key) {
                continue;
            }
            self.status.set(Doing::Computing);
            let started = Instant::now();
            let computed = match train {
                true => self.trainer.train_slot(slot, &blocks).await,
                false => self.trainer.eval_slot(&blocks).await,
            };
            self.put_down();
            self.status.set(Doing::WaitingForSlots);
            let outcome = match computed {
                Ok(outcome) => outcome,
                Err(EngineError::Abandoned) => {
                    self.give_back(key).await;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let tokens = blocks.iter().map(Block::used_len);
            self.status.slot_done(tokens.sum::<usize>() as u64);
            self.send(Up::SlotDone(v1::SlotDone {
                generation: lease.generation,
                step: lease.step,
                kind: lease.kind.to_wire(),
                slot,
                loss_sum: outcome.loss_sum,
                trained_tokens: outcome.trained_tokens,
                correct_tokens: outcome.correct_tokens,
                compute_us: started.elapsed().as_micros() as u64,
                invalid_scalars: outcome.invalid_scalars,
            }))
            .await;
        }
        Ok(())
    }

    /// Takes a slot in hand. Returns false where it was given back, or its session is over.
    fn take_in_hand(&self, key: SlotKey) -> bool {
        let abandon = self.trainer.abandon();
        let link = self.link.as_ref();
        link.is_some_and(|link| link.leases.begin(key, &abandon))
    }

    fn put_down(&self) {
        if let Some(link) = &self.link {
            link.leases.end();
        }
    }

    /// Tells the coordinator that the slot in hand, which it wanted back, is not in the accumulator.
    async fn give_back(&mut self, key: SlotKey) {
        self.send(Up::Withdrawn(v1::Withdrawn {
            generation: key.generation,
            step: key.step,
            kind: key.kind.to_wire(),
            slots: vec![key.slot],
        }))
        .await;
    }

    /// Sums over all workers, updates, reports.
    async fn exchange(&mut self, exchange: &v1::Exchange) -> Result<(), RunError> {
        let Some(plan) = self.plan else {
            return Ok(());
        };
        if self.is_void(exchange.generation, exchange.step) || plan.step != exchange.step {
            return Ok(());
        }
        self.status.set(Doing::Exchanging);
        let started = Instant::now();
        let (generation, trainer) = (self.generation, &mut self.trainer);
        let summed = self.collective.sum_up(generation, &plan, trainer).await;
        let (mean, slots) = match summed {
            Ok(summed) => summed,
            Err(RunError::Collective(error)) => return self.report_failure(error).await,
            Err(error) => return Err(error),
        };
        let exchanged = Instant::now();
        let outcome = self.trainer.apply(&mean, plan.learning_rate)?;
        failpoint::reached("optimizer");
        self.publish(&plan, outcome.skipped, mean, slots.clone())?;
        self.plan = None;
        self.channels.updates.fetch_add(1, Ordering::SeqCst);
        let optimizer_us = exchanged.elapsed().as_micros() as u64;
        let report = v1::StepReport {
            generation: exchange.generation,
            step: self.trainer.step(),
            grad_norm: outcome.grad_norm,
            skipped: outcome.skipped,
            weights_digest: match plan.digest {
                true => self.trainer.weights_digest()?,
                false => String::new(),
            },
            exchange_us: (exchanged - started).as_micros() as u64,
            optimizer_us,
            peak_memory_bytes: self.trainer.peak_memory_bytes(),
        };
        self.remember(report.clone(), &slots);
        self.send(Up::StepReport(report)).await;
        self.save_state()
    }

    pub(super) fn remember(&mut self, report: v1::StepReport, slots: &HeldSlots) {
        let slots_kept = |updates: &VecDeque<v1::Update>| -> usize {
            updates.iter().map(|update| update.slots.len()).sum()
        };
        while self.updates.len() >= REMEMBERED_UPDATES
            || slots_kept(&self.updates) > REMEMBERED_SLOTS
        {
            self.updates.pop_front();
        }
        self.updates.push_back(v1::Update {
            report: Some(report),
            slots: slot::to_wire(slots),
        });
    }

    /// Reports a failed exchange. It costs nothing: the accumulator is as it was, and a new generation follows.
    async fn report_failure(&mut self, error: CollectiveError) -> Result<(), RunError> {
        match error {
            CollectiveError::Superseded => Ok(()),
            CollectiveError::Peer {
                rank, ref reason, ..
            } => {
                tracing::warn!("{error}");
                self.send(Up::PeerLost(v1::PeerLost {
                    generation: self.generation,
                    rank,
                    reason: reason.clone(),
                }))
                .await;
                Ok(())
            }
            other => Err(RunError::Collective(other)),
        }
    }

    /// Hands over the state of this step if it was asked for.
    pub(super) fn save_state(&mut self) -> Result<(), RunError> {
        let step = self.trainer.step();
        if self.saves.remove(&step) {
            let state = State {
                snapshot: self.trainer.snapshot()?,
                weights_digest: self.reported_digest(step),
                format: self.identity.format.clone(),
            };
            if let Some(link) = &self.link {
                (link.upload)(state);
            }
        }
        while let Some(missed) = self.saves.first().copied().filter(|first| *first < step) {
            tracing::warn!("the state after step {missed} was asked for too late");
            self.saves.remove(&missed);
        }
        Ok(())
    }

    /// Digest of the weights after `step` updates, where it was reported.
    fn reported_digest(&self, step: u64) -> Option<String> {
        let report = self.updates.back()?.report.as_ref()?;
        let is_known = report.step == step && !report.weights_digest.is_empty();
        is_known.then(|| report.weights_digest.clone())
    }

    fn is_void(&self, generation: u64, step: u64) -> bool {
        self.superseded() || generation != self.generation || step != self.trainer.step()
    }

    /// Returns whether a newer generation waits among the orders.
    fn superseded(&self) -> bool {
        self.channels.newest_generation.load(Ordering::SeqCst) > self.generation
    }

    fn stopped(&self) -> bool {
        self.channels.stop.load(Ordering::SeqCst)
    }

    /// Sends a message to the coordinator. Without a session it is lost: the next one begins with what this worker holds.
    pub(super) async fn send(&self, message: Up) {
        if let Some(open) = self.link.as_ref().and_then(|link| link.up.upgrade()) {
            let _ = open.send(up(message)).await;
        }
    }

    fn give_link_up(&self, reason: String) {
        if let Some(link) = &self.link {
            // Where one reason waits already, or the session has ended, there is nothing to add.
            let _ = link.given_up.try_send(reason);
        }
    }
}
