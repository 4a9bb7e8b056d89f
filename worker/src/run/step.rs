//! The step, readable top to bottom: what the engine thread does between Welcome and the end.
//!
//! In: orders, in the order in which the coordinator gave them. Out: messages to it. The [`Trainer`] computes, the
//! [`Collective`] sums, and this decides nothing but what is void: whatever does not fit to the generation and to the
//! updates that the weights have seen is dropped, because the coordinator plans it again.

mod feeding;
mod handover;
mod summing;

use std::collections::{BTreeSet, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use common::data::block::Block;
use common::failpoint;
use common::files::{FileError, Snapshot, WeightsFormat};
use common::job::JobSpec;
use common::wire::{PlanKind, up};
use proto::v1;
use proto::v1::worker_message::Message as Up;
use thiserror::Error;
use tokio::sync::mpsc;

use super::orders::{CoordinatorLink, Lease, Order};
use crate::ComputeDevice;
use crate::collective::feed::Follower;
use crate::collective::{Collective, CollectiveError};
use crate::engine::slot;
use crate::engine::slot::HeldSlots;
use crate::engine::{EngineError, Trainer, TrainerOptions};
use crate::rpc::blocks::BlocksError;
use crate::rpc::fetch::Folder;
use crate::rpc::upload::{State, weights_format};
use crate::run::leases::SlotKey;
use crate::status::{Doing, Status};

/// Updates that a worker remembers with their slots. A coordinator that is killed has written down all but the last few.
const REMEMBERED_UPDATES: usize = 16;
/// Most slots of all remembered updates but the newest: they must fit into one message.
const REMEMBERED_SLOTS: usize = 64 << 10;

/// Why the engine's thread ended with an error.
#[derive(Debug, Error)]
pub enum RunError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    State(#[from] FileError),
    #[error(transparent)]
    Blocks(#[from] BlocksError),
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Nccl(crate::collective::nccl::NcclError),
    #[error("the checkpoint says step {found} but the coordinator step {expected}")]
    StartStep { found: u64, expected: u64 },
}

/// What the run starts from.
pub struct Start {
    pub job: Arc<JobSpec>,
    pub job_digest: String,
    pub threads: usize,
    pub device: ComputeDevice,
    pub model: Folder,
    /// Updates that the state has seen.
    pub start_step: u64,
    /// The adapter to start from at step 0, the checkpoint at any later step.
    pub state: Option<Folder>,
    pub status: Status,
}

/// What the engine thread shares with the rest of the worker.
pub struct EngineChannels {
    pub orders: mpsc::Receiver<Order>,
    /// Sends orders for what arrives by other ways than the session. Does not keep the channel of orders open.
    pub wake: mpsc::WeakSender<Order>,
    pub collective: Arc<Collective>,
    pub newest_generation: Arc<AtomicU64>,
    /// Set from outside to end the thread after the slot in hand.
    pub stop: Arc<AtomicBool>,
    /// Set by this thread once the model is loaded and orders are obeyed.
    pub ready: Arc<AtomicBool>,
    /// Number of updates made, counted by this thread.
    pub updates: Arc<AtomicU64>,
}

/// Loads the model and works until told to stop.
pub fn run(start: Start, channels: EngineChannels) -> Result<(), RunError> {
    let status = start.status.clone();
    status.set(Doing::Loading);
    let trainer = load(&start)?;
    status.reached(trainer.step());
    let mut run = Run {
        format: weights_format(&start.job, start.model.path(), &trainer.layout())?,
        trainer,
        job_digest: start.job_digest.clone(),
        channels,
        link: None,
        generation: 0,
        plan: None,
        saves: BTreeSet::new(),
        updates: VecDeque::new(),
        following: None,
        entering: None,
        spare_mean: Vec::new(),
        status,
    };
    // What was fetched for the start alone is of no more use.
    drop(start);
    run.channels.ready.store(true, Ordering::SeqCst);
    loop {
        run.rest();
        let Some(order) = run.channels.orders.blocking_recv() else {
            break;
        };
        if run.stopped() {
            break;
        }
        run.obey(order)?;
    }
    Ok(())
}

fn load(start: &Start) -> Result<Trainer, RunError> {
    let state_dir = start.state.as_ref().map(Folder::path);
    let from_checkpoint = start.start_step > 0;
    let mut trainer = Trainer::load(TrainerOptions {
        job: start.job.clone(),
        model_dir: start.model.path().to_owned(),
        adapter_dir: state_dir.filter(|_| !from_checkpoint).map(Path::to_owned),
        threads: start.threads,
        device: start.device.clone(),
    })?;
    if let Some(dir) = state_dir.filter(|_| from_checkpoint) {
        let snapshot = Snapshot::read_files(dir, &trainer.layout())?;
        if snapshot.step != start.start_step {
            return Err(RunError::StartStep {
                found: snapshot.step,
                expected: start.start_step,
            });
        }
        trainer.restore(&snapshot)?;
    }
    Ok(trainer)
}

struct Run {
    trainer: Trainer,
    /// Format of the weights in the states that are uploaded.
    format: WeightsFormat,
    job_digest: String,
    channels: EngineChannels,
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
    following: Option<Follower>,
    /// The generation that this worker enters with the next updates of the feed.
    entering: Option<v1::Generation>,
    /// Memory of the last mean gradient, used again for the next one.
    spare_mean: Vec<f32>,
    /// What the terminal shows of this worker.
    status: Status,
}

impl Run {
    /// Shows that nothing is to be done until the next order.
    fn rest(&self) {
        self.status.reached(self.trainer.step());
        self.status.set(match self.generation {
            0 => Doing::WaitingToBegin,
            _ => Doing::WaitingForSlots,
        });
    }

    fn obey(&mut self, order: Order) -> Result<(), RunError> {
        match order {
            Order::Attach(line) => self.attach(line),
            Order::Enter(generation) => self.enter(&generation),
            Order::Plan(plan) => self.begin(plan),
            Order::Lease(lease) => self.compute(lease),
            Order::Exchange(exchange) => self.exchange(&exchange),
            Order::Save(save) => {
                self.saves.insert(save.step);
                self.save_state()
            }
            Order::Follow(source) => {
                self.follow(source);
                Ok(())
            }
            Order::Feed { run_id, feed } => self.feed(run_id, &feed),
            Order::Fed => self.fed(),
            Order::Stop => Ok(()),
        }
    }

    /// Begins to talk to a new session: says what is held. What an earlier one ordered is planned again.
    fn attach(&mut self, line: CoordinatorLink) -> Result<(), RunError> {
        let unrecorded = |update: &&v1::Update| {
            let step = update.report.as_ref().map(|report| report.step);
            step > Some(line.recorded)
        };
        let updates = self.updates.iter().filter(unrecorded).cloned().collect();
        self.link = Some(line);
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
            job_digest: self.job_digest.clone(),
            total_scalars: self.trainer.total_scalars(),
            updates,
        }));
        Ok(())
    }

    /// Enters a new generation: whoever is behind gets its state, then everyone says what it holds.
    fn enter(&mut self, generation: &v1::Generation) -> Result<(), RunError> {
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
            match self.receive_state(generation) {
                Ok((snapshot, updates)) => {
                    self.take_over(&snapshot, updates)?;
                    self.save_state()?;
                }
                Err(error) => return self.report_failure(error),
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
        }));
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

    fn compute(&mut self, lease: Lease) -> Result<(), RunError> {
        let train = lease.kind == PlanKind::Train;
        for (slot, blocks) in lease.slots {
            let planned = !train || self.plan.as_ref().is_some_and(|plan| slot < plan.slots);
            if self.is_void(lease.generation, lease.step) || !planned || self.stopped() {
                return Ok(());
            }
            let blocks = match blocks.wait() {
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
                true => self.trainer.train_slot(slot, &blocks),
                false => self.trainer.eval_slot(&blocks),
            };
            self.put_down();
            self.status.set(Doing::WaitingForSlots);
            let outcome = match computed {
                Ok(outcome) => outcome,
                Err(EngineError::Abandoned) => {
                    self.give_back(key);
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
            }));
        }
        Ok(())
    }

    /// Takes a slot in hand. Returns false where it was given back, or its session is over.
    fn take_in_hand(&self, key: SlotKey) -> bool {
        let abandon = self.trainer.abandon();
        let line = self.link.as_ref();
        line.is_some_and(|line| line.leases.begin(key, &abandon))
    }

    fn put_down(&self) {
        if let Some(line) = &self.link {
            line.leases.end();
        }
    }

    /// Tells the coordinator that the slot in hand, which it wanted back, is not in the accumulator.
    fn give_back(&mut self, key: SlotKey) {
        self.send(Up::Withdrawn(v1::Withdrawn {
            generation: key.generation,
            step: key.step,
            kind: key.kind.to_wire(),
            slots: vec![key.slot],
        }));
    }

    /// Sums over all workers, updates, reports.
    fn exchange(&mut self, exchange: &v1::Exchange) -> Result<(), RunError> {
        let Some(plan) = self.plan else {
            return Ok(());
        };
        if self.is_void(exchange.generation, exchange.step) || plan.step != exchange.step {
            return Ok(());
        }
        self.status.set(Doing::Exchanging);
        let started = Instant::now();
        let (sum, slots) = match self.sum_up(&plan) {
            Ok(sum) => sum,
            Err(RunError::Collective(error)) => return self.report_failure(error),
            Err(error) => return Err(error),
        };
        let exchanged = Instant::now();
        let outcome = self.apply(&sum, plan.learning_rate)?;
        failpoint::reached("optimizer");
        self.publish(&plan, outcome.skipped, sum, slots.clone())?;
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
            peak_memory_bytes: self.trainer.device().peak_memory_bytes(),
        };
        self.remember(report.clone(), &slots);
        self.send(Up::StepReport(report));
        self.save_state()
    }

    fn remember(&mut self, report: v1::StepReport, slots: &HeldSlots) {
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
    fn report_failure(&mut self, error: CollectiveError) -> Result<(), RunError> {
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
                }));
                Ok(())
            }
            other => Err(RunError::Collective(other)),
        }
    }

    /// Hands over the state of this step if it was asked for.
    fn save_state(&mut self) -> Result<(), RunError> {
        let step = self.trainer.step();
        if self.saves.remove(&step) {
            let state = State {
                snapshot: self.trainer.snapshot()?,
                weights_digest: self.reported_digest(step),
                format: self.format.clone(),
            };
            if let Some(line) = &self.link {
                line.uploads.start(state);
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
    fn send(&self, message: Up) {
        if let Some(open) = self.link.as_ref().and_then(|line| line.up.upgrade()) {
            let _ = open.blocking_send(up(message));
        }
    }

    fn give_link_up(&self, reason: String) {
        if let Some(line) = &self.link {
            // Where one reason waits already, or the session has ended, there is nothing to add.
            let _ = line.given_up.try_send(reason);
        }
    }
}
