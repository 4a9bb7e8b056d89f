//! One simulated worker: a session, a heartbeat a second, and slots that take their time.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::wire::{HEARTBEAT_INTERVAL, up};
use proto::v1::coordinator_client::CoordinatorClient;
use proto::v1::coordinator_message::Message as Down;
use proto::v1::worker_message::Message as Up;
use proto::v1::{self, WorkerMessage};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::crowd::{POLL, Shared};

pub type Client = CoordinatorClient<tonic::transport::Channel>;

pub struct Worker {
    shared: Arc<Shared>,
    client: Client,
    up: mpsc::Sender<WorkerMessage>,
    blocks: String,
    step: u64,
    generation: u64,
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
        let mut worker = Self {
            shared,
            client,
            up: sender,
            blocks: String::new(),
            step: 0,
            generation: 0,
            held: BTreeSet::new(),
            trained_tokens: 0,
            following: None,
        };
        // The session is read while a slot is computed.
        let (orders, mut waiting) = mpsc::unbounded_channel();
        let reading = async move {
            loop {
                match down.message().await {
                    Ok(Some(message)) => drop(orders.send(message.message)),
                    Ok(None) => return,
                    Err(status) => return eprintln!("worker {number}: {}", status.message()),
                }
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
        for slot in lease.slots {
            if self.shared.generation.load(Ordering::SeqCst) > self.generation {
                return;
            }
            let request = v1::FetchBlocksRequest {
                digest: self.blocks.clone(),
                blocks: vec![slot.into()],
            };
            let mut chunks = match self.client.fetch_blocks(request).await {
                Ok(chunks) => chunks.into_inner(),
                Err(status) => return eprintln!("no blocks: {status}"),
            };
            while let Ok(Some(_)) = chunks.message().await {}
            self.shared.wait_until_it_computes().await;
            let slot_ms = self.shared.slot_ms.load(Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(slot_ms)).await;
            self.held.insert(slot);
            self.shared.slots.fetch_add(1, Ordering::SeqCst);
            self.send(Up::SlotDone(v1::SlotDone {
                generation: lease.generation,
                step: lease.step,
                kind: lease.kind,
                slot,
                loss_sum: 1.0,
                trained_tokens: self.trained_tokens,
                correct_tokens: 1,
                compute_us: slot_ms * 1000,
                invalid_scalars: 0,
            }))
            .await;
        }
    }

    async fn send(&self, message: Up) {
        // The session's end is noticed where it is read.
        let _ = self.up.send(up(message)).await;
    }
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
