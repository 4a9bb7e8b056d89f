//! A toy worker: a process that joins, gets what the run starts from, works, and comes back when its session is lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::files::snapshot::OPTIMIZER;
use common::wire::{HEARTBEAT_INTERVAL, PlanKind, up};
use proto::v1;
use proto::v1::coordinator_message::Message as Down;
use proto::v1::upload_chunk::Chunk;
use proto::v1::worker_message::Message as Up;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::engine::{Engine, EngineEnd, Lease, Order, Snapshot};
use crate::feed::Source;
use crate::mesh::{Collective, Membership};
use crate::net::Node;
use crate::net::link::End;
use crate::rpc::{Client, Packet, client};
use crate::truth::hex;
use crate::world::World;

const WELCOME_MS: u64 = 30_000;
const OUTGOING: usize = 64;
/// For what is still on its way up when the run is over.
const UPLOAD_MS: u64 = 120_000;
pub const WEIGHTS: &str = "model.safetensors";

/// How a session ended.
#[derive(Debug)]
enum Ended {
    Finished,
    Refused(String),
    Lost(String),
}

impl Ended {
    fn of(status: &Status) -> Self {
        let reason = status.message().to_owned();
        match status.code() {
            Code::FailedPrecondition
            | Code::InvalidArgument
            | Code::PermissionDenied
            | Code::ResourceExhausted
            | Code::Unauthenticated => Self::Refused(reason),
            _ => Self::Lost(reason),
        }
    }
}

/// The life of one process. Its tasks end with it.
pub async fn live(world: Arc<World>, node: Node, mut calls: mpsc::UnboundedReceiver<End<Packet>>) {
    let mut losses = 0;
    loop {
        let ended = attend(&world, node, &mut calls).await;
        world
            .net
            .note(|| format!("w{node} session ended: {ended:?}"));
        match ended {
            Ended::Finished => return,
            Ended::Refused(reason) => {
                let text = format!("worker {node} was refused: {reason}");
                return world.oracle.violation(text);
            }
            Ended::Lost(_reason) => {
                losses += 1;
                let pause = 250 << losses.min(4);
                let jitter = world.dice.below(pause, &[21, node.into(), losses]);
                world.net.sleep(node, pause / 2 + jitter).await;
            }
        }
    }
}

/// One session from Join to its end.
async fn attend(
    world: &Arc<World>,
    node: Node,
    calls: &mut mpsc::UnboundedReceiver<End<Packet>>,
) -> Ended {
    let mut client = client(&world.net, node);
    let collective = Arc::new(Collective::new(world.net.clone(), node));
    let (sender, receiver) = mpsc::channel(OUTGOING);
    let opening = tokio::select! {
        biased;
        opened = open(&mut client, node, &sender, receiver) => opened,
        () = world.net.sleep(node, WELCOME_MS) => Err(Ended::Lost("no answer to Join".into())),
    };
    let (welcome, down) = match opening {
        Ok(opened) => opened,
        Err(ended) => return ended,
    };
    let mut session = Session {
        world: world.clone(),
        node,
        client,
        collective: collective.clone(),
        newest_generation: Arc::default(),
        tasks: JoinSet::new(),
    };
    let (orders, waiting_orders) = mpsc::unbounded_channel();
    let (uploads, waiting_uploads) = mpsc::unbounded_channel();
    let (worker, blocks) = (welcome.worker, welcome.blocks.clone().unwrap_or_default());
    let upload_client = session.client.clone();
    let (done, uploaded) = oneshot::channel();
    session.tasks.spawn({
        let world = world.clone();
        async move {
            upload_all(&world, node, upload_client, worker, waiting_uploads).await;
            let _ = done.send(());
        }
    });
    let engine = session.prepare_and_work(welcome, (sender.clone(), uploads), waiting_orders);
    let forwarder = session.forward(down, orders, blocks.digest);
    let mut engine = Box::pin(engine);
    let ended = tokio::select! {
        biased;
        ended = forwarder => ended,
        ended = &mut engine => ended,
        () = heartbeats(world, node, &sender) => Ended::Lost("the connection broke".into()),
        () = take_calls(&collective, calls) => Ended::Lost("the machine is off".into()),
    };
    if let Ended::Finished = ended {
        // Ends the uploads' queue; what is in it is still handed over.
        drop(engine);
        let _ = tokio::select! {
            biased;
            uploaded = uploaded => uploaded,
            () = world.net.sleep(node, UPLOAD_MS) => Ok(()),
        };
    }
    ended
}

async fn open(
    client: &mut Client,
    node: Node,
    up_sender: &mpsc::Sender<v1::WorkerMessage>,
    receiver: mpsc::Receiver<v1::WorkerMessage>,
) -> Result<(v1::Welcome, Streaming<v1::CoordinatorMessage>), Ended> {
    let join = v1::Join {
        version: common::VERSION.to_owned(),
        name: format!("w{node}"),
        exchange_port: node,
        exchange_host: "10.0.0.1".into(),
        numerics_class: "toy".into(),
        threads: 1,
        device: "cpu".into(),
        job_digest: String::new(),
        run: String::new(),
    };
    // Never full: it is the first message.
    let _ = up_sender.try_send(up(Up::Join(join)));
    let opened = client.session(ReceiverStream::new(receiver)).await;
    let mut down = opened.map_err(|status| Ended::of(&status))?.into_inner();
    let first = down.message().await.map_err(|status| Ended::of(&status))?;
    match first.and_then(|first| first.message) {
        Some(Down::Welcome(welcome)) => Ok((welcome, down)),
        Some(Down::Finish(_)) => Err(Ended::Finished),
        other => Err(Ended::Lost(format!("{other:?} where Welcome was due"))),
    }
}

async fn heartbeats(world: &World, node: Node, sender: &mpsc::Sender<v1::WorkerMessage>) {
    let interval = HEARTBEAT_INTERVAL.as_millis() as u64;
    loop {
        world.net.sleep(node, interval).await;
        let heartbeat = up(Up::Heartbeat(v1::Heartbeat {}));
        if sender.send(heartbeat).await.is_err() {
            return;
        }
    }
}

async fn take_calls(collective: &Collective, calls: &mut mpsc::UnboundedReceiver<End<Packet>>) {
    while let Some(call) = calls.recv().await {
        collective.called(call);
    }
}

struct Session {
    world: Arc<World>,
    node: Node,
    client: Client,
    collective: Arc<Collective>,
    newest_generation: Arc<AtomicU64>,
    /// Ended with the session.
    tasks: JoinSet<()>,
}

impl Session {
    /// Gets the state and works until that ends.
    fn prepare_and_work(
        &self,
        welcome: v1::Welcome,
        ways: (
            mpsc::Sender<v1::WorkerMessage>,
            mpsc::UnboundedSender<Snapshot>,
        ),
        orders: mpsc::UnboundedReceiver<Order>,
    ) -> impl Future<Output = Ended> + use<> {
        let (world, node, client) = (self.world.clone(), self.node, self.client.clone());
        let collective = self.collective.clone();
        let newest_generation = self.newest_generation.clone();
        async move {
            let state = match fetch_state(&world, client, &welcome).await {
                Ok(state) => state,
                Err(status) => return Ended::of(&status),
            };
            let loading = world
                .dice
                .below(1500, &[22, node.into(), world.net.now_ms()]);
            world.net.sleep(node, loading).await;
            let ready = Up::Ready(v1::Ready {
                step: state.step,
                layout_digest: "layout".into(),
                trainable_scalars: 1,
                weights_digest: hex(&state.weights),
                job_digest: welcome.job_digest.clone(),
                total_scalars: 1,
                updates: Vec::new(),
            });
            if ways.0.send(up(ready)).await.is_err() {
                return Ended::Lost("the connection broke".into());
            }
            let engine = Engine::new(world, node, state, ways, collective, newest_generation);
            match engine.work(orders).await {
                // The session knows why.
                EngineEnd::SessionOver => std::future::pending().await,
                EngineEnd::NoBlocks => Ended::Lost("a fetch of blocks broke".into()),
            }
        }
    }

    /// Passes orders on until the session ends.
    async fn forward(
        &mut self,
        mut down: Streaming<v1::CoordinatorMessage>,
        orders: mpsc::UnboundedSender<Order>,
        blocks_digest: String,
    ) -> Ended {
        loop {
            let message = match down.message().await {
                Ok(Some(message)) => message.message,
                Ok(None) => return Ended::Lost("it closed the session".into()),
                Err(status) => return Ended::of(&status),
            };
            let node = self.node;
            self.world.net.note(|| format!("w{node} hears {message:?}"));
            let order = match message {
                Some(Down::Generation(generation)) => {
                    let number = generation.generation;
                    self.newest_generation.store(number, Ordering::SeqCst);
                    self.collective.enter(membership(&generation));
                    Order::Enter(generation)
                }
                Some(Down::Plan(plan)) => Order::Plan(plan),
                Some(Down::Lease(lease)) => Order::Lease(self.prefetch(lease, &blocks_digest)),
                Some(Down::Exchange(exchange)) => Order::Exchange(exchange),
                Some(Down::SaveState(save)) => Order::Save(save),
                Some(Down::Feed(feed)) => Order::Feed(feed),
                Some(Down::Follow(follow)) => Order::Follow(
                    Source {
                        node: follow.source.as_ref().map(node_of).unwrap_or_default(),
                        worker: follow.worker,
                        attempt: follow.attempt,
                    },
                    orders.downgrade(),
                ),
                Some(Down::Finish(finish)) if finish.failed => {
                    return Ended::Refused(finish.reason);
                }
                Some(Down::Finish(_)) => return Ended::Finished,
                other => return Ended::Refused(format!("{other:?} was not due")),
            };
            // A closed channel means that the engine has ended, which is noticed elsewhere.
            let _ = orders.send(order);
        }
    }

    fn prefetch(&mut self, lease: v1::Lease, digest: &str) -> Lease {
        let kind = PlanKind::from_wire(lease.kind).unwrap_or(PlanKind::Eval);
        let mut slots = Vec::new();
        for slot in lease.slots {
            let (sender, receiver) = oneshot::channel();
            let request = v1::FetchBlocksRequest {
                digest: digest.to_owned(),
                blocks: self.world.model.blocks(kind, lease.step, slot),
            };
            let client = self.client.clone();
            self.tasks.spawn(async move {
                // A failed fetch drops the sender.
                if let Ok(data) = fetch_blocks(client, request).await {
                    let _ = sender.send(data);
                }
            });
            slots.push((slot, receiver));
        }
        Lease {
            generation: lease.generation,
            step: lease.step,
            kind,
            slots,
        }
    }
}

/// Members are known by their port.
fn node_of(member: &v1::Member) -> Node {
    let port = member.address.rsplit_once(':').map(|(_, port)| port);
    port.and_then(|port| port.parse().ok()).unwrap_or_default()
}

fn membership(generation: &v1::Generation) -> Membership {
    Membership {
        generation: generation.generation,
        rank: generation.rank,
        members: generation.members.iter().map(node_of).collect(),
        silence_ms: generation.deadline_ms,
    }
}

async fn fetch_blocks(
    mut client: Client,
    request: v1::FetchBlocksRequest,
) -> Result<Vec<u8>, Status> {
    let expected = request.blocks.clone();
    let mut chunks = client.fetch_blocks(request).await?.into_inner();
    let mut data = Vec::new();
    let mut received = Vec::new();
    while let Some(chunk) = chunks.message().await? {
        received.push(chunk.block);
        data.extend_from_slice(&chunk.data);
    }
    match received == expected {
        true => Ok(data),
        false => Err(Status::data_loss("other blocks than those asked for")),
    }
}

/// The checkpoint that Welcome names.
async fn fetch_state(
    world: &World,
    mut client: Client,
    welcome: &v1::Welcome,
) -> Result<Snapshot, Status> {
    let (mut step, mut weights) = (welcome.start_step, world.model.initial());
    if step > 0 {
        let file = welcome.state_files.iter().find(|file| file.path == WEIGHTS);
        let digest = file.map(|file| file.digest.clone()).unwrap_or_default();
        let request = v1::FetchFileRequest { digest, offset: 0 };
        let mut chunks = client.fetch_file(request).await?.into_inner();
        let mut data = Vec::new();
        while let Some(chunk) = chunks.message().await? {
            data.extend_from_slice(&chunk.data);
        }
        (step, weights) = decode(&data).ok_or_else(|| Status::data_loss("no checkpoint"))?;
    }
    Ok(Snapshot { step, weights })
}

pub fn encode(state: &Snapshot) -> Vec<u8> {
    [&state.step.to_le_bytes()[..], &state.weights].concat()
}

pub fn decode(bytes: &[u8]) -> Option<(u64, [u8; 32])> {
    let (step, weights) = bytes.split_first_chunk()?;
    Some((u64::from_le_bytes(*step), weights.try_into().ok()?))
}

/// Hands states over, one after the other, until no more can come.
async fn upload_all(
    world: &World,
    node: Node,
    mut client: Client,
    worker: u64,
    mut waiting: mpsc::UnboundedReceiver<Snapshot>,
) {
    while let Some(state) = waiting.recv().await {
        let file = |path: &str, size: usize, digest: blake3::Hash| {
            Chunk::File(v1::FileEntry {
                path: path.into(),
                size: size as u64,
                digest: digest.to_hex().to_string(),
            })
        };
        let weights = encode(&state);
        let chunks = [
            Chunk::Header(v1::UploadHeader {
                worker,
                step: state.step,
                weights_digest: hex(&state.weights),
            }),
            file(WEIGHTS, weights.len(), blake3::hash(&weights)),
            Chunk::Data(weights[..9].to_vec().into()),
            Chunk::Data(weights[9..].to_vec().into()),
            file(OPTIMIZER, 1, blake3::hash(b"o")),
            Chunk::Data(b"o"[..].into()),
        ];
        let chunks = chunks.map(|chunk| v1::UploadChunk { chunk: Some(chunk) });
        let sent = client.upload_state(futures::stream::iter(chunks)).await;
        world.net.note(|| {
            let result = sent.map(drop).map_err(|status| status.message().to_owned());
            format!("w{node} uploaded {}: {result:?}", state.step)
        });
    }
}
