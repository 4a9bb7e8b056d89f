//! One simulated worker: a session, a heartbeat a second, and slots that take their time. It gives slots back as a real one
//! does: at once what it has not begun, and the one in hand between two layers.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::wire::{HEARTBEAT_INTERVAL, PlanKind, up};
use proto::v1::coordinator_client::CoordinatorClient;
use proto::v1::coordinator_message::Message as Down;
use proto::v1::worker_message::Message as Up;
use proto::v1::{self, WorkerMessage};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use worker::engine::Abandon;
use worker::run::leases::{Leases, SlotKey};

use crate::crowd::{POLL, Shared};

/// Of a slot, at most. After each it is seen whether the slot is wanted back.
const LAYER_MS: u64 = 100;

pub type Client = CoordinatorClient<tonic::transport::Channel>;

pub struct Worker {
    shared: Arc<Shared>,
    client: Client,
    up: mpsc::Sender<WorkerMessage>,
    blocks: String,
    step: u64,
    generation: u64,
    /// The newest that was heard of.
    newest_generation: Arc<AtomicU64>,
    leases: Arc<Leases>,
    abandon: Abandon,
    held: BTreeSet<u32>,
    trained_tokens: u64,
    /// Copies a member's state: the attempt.
    following: Option<u64>,
}

impl Worker {
    pub async fn live(mut client: Client, shared: Arc<Shared>, number: usize) {
        let (sender, receiver) = mpsc::channel(64);
        let join = v1::Join {
            version: common::VERSION.to_owned(),
            name: format!("machine-{number}.example:{number}"),
            exchange_port: 10_000 + number as u32,
            numerics_class: "bench".into(),
            threads: 1,
            device: "cpu".into(),
            ..Default::default()
        };
        // Never full: it is the first message.
        let _ = sender.try_send(up(Up::Join(join)));
        let session = client.session(ReceiverStream::new(receiver)).await;
        let mut down = session.expect("it is welcome").into_inner();
        shared.alive.fetch_add(1, Ordering::SeqCst);
        let heartbeats = heartbeats(sender.clone(), number);
        let (leases, newest_generation) = (Arc::<Leases>::default(), Arc::<AtomicU64>::default());
        let mut worker = Self {
            shared,
            client,
            up: sender.clone(),
            blocks: String::new(),
            step: 0,
            generation: 0,
            newest_generation: newest_generation.clone(),
            leases: leases.clone(),
            abandon: Abandon::default(),
            held: BTreeSet::new(),
            trained_tokens: 0,
            following: None,
        };
        // The session is read while a slot is computed.
        let (orders, mut waiting) = mpsc::unbounded_channel();
        let reading = async move {
            loop {
                let message = match down.message().await {
                    Ok(Some(message)) => message.message,
                    Ok(None) => return,
                    Err(status) => return eprintln!("worker {number}: {}", status.message()),
                };
                match &message {
                    Some(Down::Generation(generation)) => {
                        newest_generation.store(generation.generation, Ordering::SeqCst);
                        leases.clear();
                    }
                    Some(Down::Lease(lease)) => {
                        let slots = lease.slots.iter();
                        leases.add(slots.filter_map(|slot| key(lease, *slot)));
                    }
                    Some(Down::Withdraw(withdraw)) => {
                        if let Ok(Some(withdrawn)) = leases.give_back(withdraw.clone()) {
                            let _ = sender.send(up(Up::Withdrawn(withdrawn))).await;
                        }
                    }
                    _ => {}
                }
                let _ = orders.send(message);
            }
        };
        let working = async {
            loop {
                let follows = worker.following.is_some();
                tokio::select! {
                    order = waiting.recv() => match order {
                        Some(order) => worker.obey(order).await,
                        None => return,
                    },
                    () = tokio::time::sleep(POLL), if follows => worker.follow().await,
                }
            }
        };
        tokio::select! {
            () = reading => {}
            () = working => {}
            () = heartbeats => {}
        }
    }

    async fn obey(&mut self, order: Option<Down>) {
        match order {
            Some(Down::Welcome(welcome)) => {
                self.blocks = welcome
                    .blocks
                    .map(|blocks| blocks.digest)
                    .unwrap_or_default();
                self.send(Up::Ready(v1::Ready {
                    layout_digest: "layout".into(),
                    trainable_scalars: 1,
                    weights_digest: digest(0),
                    job_digest: welcome.job_digest,
                    ..Default::default()
                }))
                .await;
            }
            Some(Down::Probe(probe)) => {
                let probed = v1::Probed {
                    number: probe.number,
                    unreached: Vec::new(),
                };
                self.send(Up::Probed(probed)).await;
            }
            Some(Down::Follow(follow)) => {
                self.following = Some(follow.attempt);
                self.step = follow.step;
                self.say_synced(follow.attempt).await;
            }
            Some(Down::Generation(generation)) => self.enter(generation).await,
            Some(Down::Plan(plan)) => {
                self.trained_tokens = plan.trained_tokens / u64::from(plan.slots)
            }
            Some(Down::Lease(lease)) if lease.generation == self.generation => {
                self.compute(lease).await;
            }
            Some(Down::Exchange(exchange)) if exchange.generation == self.generation => {
                self.held.clear();
                self.step += 1;
                self.shared.steps.fetch_max(self.step, Ordering::SeqCst);
                self.send(Up::StepReport(v1::StepReport {
                    generation: self.generation,
                    step: self.step,
                    weights_digest: digest(self.step),
                    ..Default::default()
                }))
                .await;
            }
            _ => {}
        }
    }

    async fn enter(&mut self, generation: v1::Generation) {
        self.generation = generation.generation;
        self.following = None;
        if [&generation.behind, &generation.fed]
            .iter()
            .any(|ranks| ranks.contains(&generation.rank))
        {
            // As if the state had come from a peer.
            self.step = generation.step;
            self.held.clear();
        }
        let held = |slot: &u32| v1::HeldSlot {
            slot: *slot,
            loss_sum: 1.0,
            trained_tokens: self.trained_tokens,
            correct_tokens: 1,
            invalid_scalars: 0,
        };
        let entered = v1::Entered {
            generation: generation.generation,
            step: self.step,
            held: self.held.iter().map(held).collect(),
        };
        self.send(Up::Entered(entered)).await;
        self.shared
            .enter(generation.generation, generation.members.len());
    }

    /// As if the updates had come from a peer.
    async fn follow(&mut self) {
        let step = self.shared.steps.load(Ordering::SeqCst);
        if let Some(attempt) = self.following.filter(|_| step > self.step) {
            self.step = step;
            self.say_synced(attempt).await;
        }
    }

    async fn say_synced(&self, attempt: u64) {
        self.send(Up::Synced(v1::Synced {
            attempt,
            step: self.step,
            report: None,
        }))
        .await;
    }

    async fn compute(&mut self, lease: v1::Lease) {
        for slot in &lease.slots {
            if self.is_superseded() || !self.fetch(*slot).await {
                return;
            }
            let Some(key) = key(&lease, *slot) else {
                return;
            };
            if !self.leases.begin(key, &self.abandon) {
                continue;
            }
            let slot_ms = self.pass().await;
            self.leases.end();
            let message = match slot_ms {
                Some(slot_ms) => self.hold(&lease, *slot, slot_ms),
                None => Up::Withdrawn(v1::Withdrawn {
                    generation: lease.generation,
                    step: lease.step,
                    kind: lease.kind,
                    slots: vec![*slot],
                }),
            };
            self.send(message).await;
        }
    }

    /// False where the blocks cannot be had.
    async fn fetch(&mut self, slot: u32) -> bool {
        let request = v1::FetchBlocksRequest {
            digest: self.blocks.clone(),
            blocks: vec![slot.into()],
        };
        let mut chunks = match self.client.fetch_blocks(request).await {
            Ok(chunks) => chunks.into_inner(),
            Err(status) => {
                eprintln!("no blocks: {status}");
                return false;
            }
        };
        while let Ok(Some(_)) = chunks.message().await {}
        true
    }

    /// Spends the time of a slot, layer by layer, and gives back how long it was. Where workers only are there, it has no
    /// end. None where it was abandoned.
    async fn pass(&self) -> Option<u64> {
        let mut passed_ms = 0;
        loop {
            let slot_ms = self.shared.slot_ms();
            let left_ms = slot_ms.map_or(LAYER_MS, |slot_ms| slot_ms.saturating_sub(passed_ms));
            if left_ms == 0 {
                return Some(passed_ms);
            }
            let layer_ms = left_ms.min(LAYER_MS);
            tokio::time::sleep(Duration::from_millis(layer_ms)).await;
            passed_ms += layer_ms;
            let is_endless = slot_ms.is_none();
            if self.abandon.is_asked() || is_endless && self.is_superseded() {
                return None;
            }
        }
    }

    /// The slot is in the accumulator.
    fn hold(&mut self, lease: &v1::Lease, slot: u32, slot_ms: u64) -> Up {
        self.held.insert(slot);
        self.shared.slots.fetch_add(1, Ordering::SeqCst);
        Up::SlotDone(v1::SlotDone {
            generation: lease.generation,
            step: lease.step,
            kind: lease.kind,
            slot,
            loss_sum: 1.0,
            trained_tokens: self.trained_tokens,
            correct_tokens: 1,
            compute_us: slot_ms * 1000,
            invalid_scalars: 0,
        })
    }

    fn is_superseded(&self) -> bool {
        self.newest_generation.load(Ordering::SeqCst) > self.generation
    }

    async fn send(&self, message: Up) {
        // The session's end is noticed where it is read.
        let _ = self.up.send(up(message)).await;
    }
}

fn key(lease: &v1::Lease, slot: u32) -> Option<SlotKey> {
    Some(SlotKey {
        generation: lease.generation,
        kind: PlanKind::from_wire(lease.kind).ok()?,
        step: lease.step,
        slot,
    })
}

/// Once a second, not all at one moment.
async fn heartbeats(up_sender: mpsc::Sender<WorkerMessage>, number: usize) {
    tokio::time::sleep(HEARTBEAT_INTERVAL * (number % 100) as u32 / 100).await;
    let mut interval = tokio::time::interval(HEARTBEAT_INTERVAL);
    loop {
        interval.tick().await;
        if up_sender
            .send(up(Up::Heartbeat(v1::Heartbeat {})))
            .await
            .is_err()
        {
            return;
        }
    }
}

fn digest(step: u64) -> String {
    blake3::hash(&step.to_le_bytes()).to_hex().to_string()
}
