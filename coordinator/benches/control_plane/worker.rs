//! One simulated worker: a session, a heartbeat a second, and a worker's real step, on slots that only take their time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use common::data::block::Block;
use common::files::WeightsFormat;
use common::files::tensors::Dtype;
use common::wire::{HEARTBEAT_INTERVAL, PlanKind, up};
use futures::StreamExt;
use proto::v1::coordinator_client::CoordinatorClient;
use proto::v1::coordinator_message::Message as Down;
use proto::v1::worker_message::Message as Up;
use proto::v1::{self, WorkerMessage};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use worker::collective::PeerAddress;
use worker::collective::feed::Source;
use worker::rpc::blocks::{BlocksError, PendingBlocks};
use worker::run::leases::{Leases, SlotKey};
use worker::run::orders::{CoordinatorLink, Lease, Order};
use worker::run::step::{StateIdentity, StepChannels, StepLoop};
use worker::status::Status;

use crate::coordinator::SEQUENCE_LEN;
use crate::crowd::Shared;
use crate::toy::{ToyCollective, ToyTrainer};

const MAX_ORDERS: usize = 1024;

pub type Client = CoordinatorClient<tonic::transport::Channel>;

/// Works until the session ends.
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
    let members = Arc::<AtomicUsize>::default();
    let said = {
        let (shared, members) = (shared.clone(), members.clone());
        ReceiverStream::new(receiver).inspect(move |message| {
            if let Some(Up::Entered(entered)) = &message.message {
                shared.enter(entered.generation, members.load(Ordering::SeqCst));
            }
        })
    };
    let session = client.session(said).await;
    let mut down = session.expect("it is welcome").into_inner();
    let first = down.message().await.ok().flatten();
    let Some(Down::Welcome(welcome)) = first.and_then(|first| first.message) else {
        return eprintln!("worker {number}: it did not begin with Welcome");
    };
    shared.alive.fetch_add(1, Ordering::SeqCst);
    let (leases, newest_generation) = (Arc::<Leases>::default(), Arc::<AtomicU64>::default());
    let (orders, waiting) = mpsc::channel(MAX_ORDERS);
    let step = step(
        shared,
        welcome.job_digest,
        waiting,
        newest_generation.clone(),
    );
    let (given_up, mut without_blocks) = mpsc::channel(1);
    let link = CoordinatorLink {
        up: sender.downgrade(),
        upload: Box::new(|_| ()),
        leases: leases.clone(),
        recorded: welcome.recorded,
        given_up,
    };
    // Never full: it is the first order.
    let _ = orders.try_send(Order::Attach(link));
    let session = Session {
        client,
        blocks: welcome.blocks.unwrap_or_default().digest,
        orders,
        up: sender.clone(),
        leases,
        newest_generation,
        members,
    };
    tokio::select! {
        end = session.forward(down) => eprintln!("worker {number}: {end}"),
        end = step.work() => eprintln!("worker {number}: its step ended: {end:?}"),
        Some(reason) = without_blocks.recv() => eprintln!("worker {number}: {reason}"),
        () = heartbeats(sender, number) => {}
    }
}

fn step(
    shared: Arc<Shared>,
    job_digest: String,
    orders: mpsc::Receiver<Order>,
    newest_generation: Arc<AtomicU64>,
) -> StepLoop<ToyTrainer, ToyCollective> {
    let identity = StateIdentity {
        job_digest,
        // Nothing is ever uploaded.
        format: WeightsFormat::Model {
            config: serde_json::Value::Null,
            dtype: Dtype::F32,
            frozen: None,
        },
    };
    let channels = StepChannels {
        orders,
        newest_generation: newest_generation.clone(),
        stop: Arc::default(),
        ready: Arc::default(),
        updates: Arc::default(),
    };
    let trainer = ToyTrainer::new(shared.clone(), newest_generation);
    let collective = ToyCollective(shared);
    StepLoop::new(trainer, collective, identity, channels, Status::default())
}

/// What the coordinator says becomes orders; slots that are wanted back are given back at once.
struct Session {
    client: Client,
    blocks: String,
    orders: mpsc::Sender<Order>,
    up: mpsc::Sender<WorkerMessage>,
    leases: Arc<Leases>,
    newest_generation: Arc<AtomicU64>,
    /// Members of the newest generation.
    members: Arc<AtomicUsize>,
}

impl Session {
    /// Passes orders on until the session ends. Returns why it did.
    async fn forward(&self, mut down: tonic::Streaming<v1::CoordinatorMessage>) -> String {
        loop {
            let message = match down.message().await {
                Ok(Some(message)) => message.message,
                Ok(None) => return "the session was closed".to_owned(),
                Err(status) => return status.message().to_owned(),
            };
            let order = match message {
                Some(Down::Generation(generation)) => {
                    let number = generation.generation;
                    self.members
                        .store(generation.members.len(), Ordering::SeqCst);
                    self.newest_generation.store(number, Ordering::SeqCst);
                    self.leases.clear();
                    Order::Enter(generation)
                }
                Some(Down::Plan(plan)) => Order::Plan(plan),
                Some(Down::Lease(lease)) => Order::Lease(self.prefetch(&lease)),
                Some(Down::Exchange(exchange)) => Order::Exchange(exchange),
                Some(Down::SaveState(save)) => Order::Save(save),
                Some(Down::Follow(follow)) => Order::Follow(source(follow)),
                Some(Down::Withdraw(withdraw)) => {
                    if let Ok(Some(withdrawn)) = self.leases.give_back(withdraw) {
                        self.send(Up::Withdrawn(withdrawn)).await;
                    }
                    continue;
                }
                Some(Down::Probe(probe)) => {
                    let number = probe.number;
                    let unreached = Vec::new();
                    self.send(Up::Probed(v1::Probed { number, unreached }))
                        .await;
                    continue;
                }
                _ => continue,
            };
            // A closed channel means that the step has ended, which is noticed elsewhere.
            let _ = self.orders.send(order).await;
        }
    }

    fn prefetch(&self, lease: &v1::Lease) -> Lease {
        let kind = PlanKind::from_wire(lease.kind).unwrap_or(PlanKind::Eval);
        let (generation, step) = (lease.generation, lease.step);
        self.leases.add(lease.slots.iter().map(|slot| SlotKey {
            generation,
            kind,
            step,
            slot: *slot,
        }));
        let request = |slot: &u32| (*slot, self.fetch(*slot));
        Lease {
            generation,
            step,
            kind,
            slots: lease.slots.iter().map(request).collect(),
        }
    }

    fn fetch(&self, slot: u32) -> PendingBlocks {
        let (sender, receiver) = oneshot::channel();
        let mut client = self.client.clone();
        let request = v1::FetchBlocksRequest {
            digest: self.blocks.clone(),
            blocks: vec![slot.into()],
        };
        tokio::spawn(async move {
            // The step may have ended.
            let fetched = fetch(&mut client, request).await;
            let _ = sender.send(fetched.map_err(|reason| BlocksError::Broken { reason }));
        });
        PendingBlocks::new(receiver)
    }

    async fn send(&self, message: Up) {
        // The session's end is noticed where it is read.
        let _ = self.up.send(up(message)).await;
    }
}

async fn fetch(client: &mut Client, request: v1::FetchBlocksRequest) -> Result<Vec<Block>, String> {
    let said = |status: tonic::Status| status.message().to_owned();
    let mut chunks = client
        .fetch_blocks(request)
        .await
        .map_err(said)?
        .into_inner();
    let mut blocks = Vec::new();
    while let Some(chunk) = chunks.message().await.map_err(said)? {
        let block = Block::decode(&chunk.data, SEQUENCE_LEN);
        blocks.push(block.map_err(|error| error.to_string())?);
    }
    Ok(blocks)
}

fn source(follow: v1::Follow) -> Source {
    let member = follow.source.unwrap_or_default();
    Source {
        run_id: [0; 32],
        worker: follow.worker,
        attempt: follow.attempt,
        peer: PeerAddress {
            name: member.name,
            address: member.address,
        },
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
