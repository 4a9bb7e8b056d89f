//! A toy worker: a process that joins, gets what the run starts from, works, and comes back when its session is lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::files::WeightsFormat;
use common::files::tensors::Dtype;
use common::wire::{HEARTBEAT_INTERVAL, up};
use proto::v1;
use proto::v1::worker_message::Message as Up;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use worker::run::orders::{CoordinatorLink, Order};
use worker::run::step::{StateIdentity, StepChannels, StepLoop};
use worker::status::Status;

use crate::bulk::{fetch_state, upload_all};
use crate::collective::ToyCollective;
use crate::heard::Heard;
use crate::mesh::Collective;
use crate::net::Node;
use crate::net::link::End;
use crate::rpc::{Client, Packet, client};
use crate::session::{Ended, Opened, Session, open};
use crate::trainer::ToyTrainer;
use crate::world::{World, count};

const WELCOME_MS: u64 = 30_000;
const OUTGOING: usize = 64;
const MAX_ORDERS: usize = 1024;
/// For what is still on its way up when the run is over.
const UPLOAD_MS: u64 = 120_000;

/// How long a worker that was asked to stop waits to be let go, and then for its last word to be heard.
const DRAINING_MS: u64 = 25_000;
const FAREWELL_MS: u64 = 3_000;

/// The life of one process, until it is asked to stop. Its tasks end with it.
pub async fn live(
    world: Arc<World>,
    node: Node,
    calls: mpsc::UnboundedReceiver<End<Packet>>,
    stop: CancellationToken,
) {
    join(world.clone(), node, calls, stop.clone()).await;
    if stop.is_cancelled() {
        world.net.kill(node);
    }
}

async fn join(
    world: Arc<World>,
    node: Node,
    mut calls: mpsc::UnboundedReceiver<End<Packet>>,
    stop: CancellationToken,
) {
    let mut life = Life {
        collective: Arc::new(Collective::new(world.net.clone(), node)),
        world: world.clone(),
        node,
        held: None,
        stop: stop.clone(),
    };
    let mut losses = 0;
    loop {
        let ended = life.attend(&mut calls).await;
        world
            .net
            .note(|| format!("w{node} session ended: {ended:?}"));
        match ended {
            Ended::Finished | Ended::Left => return,
            Ended::Refused(reason) => {
                let text = format!("worker {node} was refused: {reason}");
                return world.oracle.violation(text);
            }
            Ended::Expelled(reason) => {
                world.oracle.sent_away(node, &reason);
                life.held = None;
            }
            // What was only on its way here is no state yet.
            Ended::Lost(_reason) => drop(life.held.take_if(|held| held.task.is_none())),
        }
        losses += 1;
        let pause = 250 << losses.min(4);
        let jitter = world.dice.below(pause, &[21, node.into(), losses]);
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = world.net.sleep(node, pause / 2 + jitter) => {}
        }
    }
}

struct Life {
    world: Arc<World>,
    node: Node,
    collective: Arc<Collective>,
    held: Option<Held>,
    stop: CancellationToken,
}

/// The state of one run, and the step that works on it.
struct Held {
    job_digest: String,
    run: String,
    orders: mpsc::Sender<Order>,
    /// The step's ends of the channels, before it starts.
    channels: Option<StepChannels>,
    heard: Heard,
    /// The step obeys.
    is_ready: Arc<AtomicBool>,
    task: Option<JoinHandle<()>>,
}

impl Held {
    fn of(welcome: &v1::Welcome) -> Self {
        let (orders, waiting) = mpsc::channel(MAX_ORDERS);
        let heard = Heard::default();
        let is_ready = Arc::<AtomicBool>::default();
        let channels = StepChannels {
            orders: waiting,
            newest_generation: heard.newest_generation.clone(),
            stop: Arc::default(),
            ready: is_ready.clone(),
            updates: Arc::default(),
        };
        Self {
            job_digest: welcome.job_digest.clone(),
            run: welcome.run.clone(),
            orders,
            channels: Some(channels),
            heard,
            is_ready,
            task: None,
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl Life {
    /// One session from Join to its end.
    async fn attend(&mut self, calls: &mut mpsc::UnboundedReceiver<End<Packet>>) -> Ended {
        let (world, node) = (self.world.clone(), self.node);
        let mut client = client(&world.net, node);
        let (sender, receiver) = mpsc::channel(OUTGOING);
        let (welcome, down) = match self.open(&mut client, &sender, receiver).await {
            Ok(opened) => opened,
            Err(ended) => return ended,
        };
        let held = self.held.get_or_insert_with(|| Held::of(&welcome));
        let mut session = Session {
            world: world.clone(),
            node,
            client: client.clone(),
            collective: self.collective.clone(),
            heard: held.heard.clone(),
            term: welcome.term,
            leases: Arc::default(),
            up: sender.clone(),
            tasks: JoinSet::new(),
        };
        let (uploads, waiting_uploads) = mpsc::unbounded_channel();
        let (done, uploaded) = oneshot::channel();
        session.tasks.spawn({
            let (world, client, worker) = (world.clone(), client.clone(), welcome.worker);
            async move {
                upload_all(&world, node, client, worker, waiting_uploads).await;
                let _ = done.send(());
            }
        });
        let (given_up, mut without_blocks) = mpsc::channel(1);
        let link = CoordinatorLink {
            leases: session.leases.clone(),
            up: sender.downgrade(),
            // The other side may be gone; then so is the session.
            upload: Box::new(move |state| drop(uploads.send(state))),
            recorded: welcome.recorded,
            given_up,
        };
        let blocks_digest = welcome.blocks.clone().unwrap_or_default().digest;
        let orders = held.orders.clone();
        let is_ready = held.is_ready.clone();
        let serving = async {
            if let Err(ended) = held
                .start(&world, node, client, &welcome, &self.collective)
                .await
            {
                return ended;
            }
            held.attach(link, &self.collective).await;
            match without_blocks.recv().await {
                Some(reason) => Ended::Lost(reason),
                // The step holds the other end.
                None => std::future::pending().await,
            }
        };
        let ended = tokio::select! {
            biased;
            ended = session.forward(down, orders, blocks_digest) => ended,
            ended = serving => ended,
            () = leave(&world, node, &self.stop, &is_ready, &sender) => Ended::Left,
            () = heartbeats(&world, node, &sender) => Ended::Lost("the connection broke".into()),
            () = take_calls(&self.collective, calls) => Ended::Lost("the machine is off".into()),
        };
        if let Ended::Finished = ended {
            self.hand_over(uploaded).await;
        }
        ended
    }

    /// Up to Welcome, which must be of the run whose state is held.
    async fn open(
        &self,
        client: &mut Client,
        sender: &mpsc::Sender<v1::WorkerMessage>,
        receiver: mpsc::Receiver<v1::WorkerMessage>,
    ) -> Result<Opened, Ended> {
        let join = self.introduction();
        let net = &self.world.net;
        let opened = tokio::select! {
            biased;
            opened = open((&self.world, self.node), client, join, sender, receiver) => opened?,
            () = self.stop.cancelled() => return Err(Ended::Left),
            () = net.sleep(self.node, WELCOME_MS) => return Err(Ended::Lost("no answer to Join".into())),
        };
        let is_foreign = |held: &Held| held.run != opened.0.run;
        match self.held.as_ref().is_some_and(is_foreign) {
            true => Err(Ended::Expelled("the state is of another run".into())),
            false => Ok(opened),
        }
    }

    /// The run is over: what is still to be uploaded is.
    async fn hand_over(&mut self, uploaded: oneshot::Receiver<()>) {
        if self.stop.is_cancelled() {
            count(&self.world.counts.let_go, 1);
        }
        // Ends the uploads' queue; what is in it is still handed over.
        self.held = None;
        let _ = tokio::select! {
            biased;
            uploaded = uploaded => uploaded,
            () = self.world.net.sleep(self.node, UPLOAD_MS) => Ok(()),
        };
    }

    fn introduction(&self) -> v1::Join {
        let held = self.held.as_ref();
        v1::Join {
            version: common::VERSION.to_owned(),
            name: format!("w{}", self.node),
            exchange_port: self.node,
            exchange_host: "10.0.0.1".into(),
            numerics_class: "toy".into(),
            threads: 1,
            peak_flops: 0.0,
            device: "cpu".into(),
            job_digest: held.map_or_else(String::new, |held| held.job_digest.clone()),
            run: held.map_or_else(String::new, |held| held.run.clone()),
            gpu: None,
        }
    }
}

impl Held {
    /// Gets the state that Welcome names and starts the step on it, unless there is one.
    async fn start(
        &mut self,
        world: &Arc<World>,
        node: Node,
        client: Client,
        welcome: &v1::Welcome,
        collective: &Arc<Collective>,
    ) -> Result<(), Ended> {
        if self.task.is_some() {
            return Ok(());
        }
        let state = fetch_state(world, client, welcome).await;
        let state = state.map_err(|status| Ended::of(&status))?;
        let loading = world
            .dice
            .below(1500, &[22, node.into(), world.net.now_ms()]);
        world.net.sleep(node, loading).await;
        if let Some(channels) = self.channels.take() {
            let toy = ToyCollective {
                world: world.clone(),
                node,
                heard: self.heard.clone(),
                collective: collective.clone(),
            };
            let step = StepLoop::new(
                ToyTrainer::new((world.clone(), node, self.heard.clone()), state),
                toy,
                identity(self.job_digest.clone()),
                channels,
                Status::default(),
            );
            let world = world.clone();
            self.task = Some(tokio::spawn(async move {
                if let Err(error) = step.work().await {
                    let text = format!("the step of worker {node} ended: {error}");
                    world.oracle.violation(text);
                }
            }));
        }
        Ok(())
    }

    /// Gives the step a session to talk to. What an earlier one ordered and is not done yet is void.
    async fn attach(&self, link: CoordinatorLink, collective: &Collective) {
        self.heard
            .newest_generation
            .store(u64::MAX, Ordering::SeqCst);
        collective.close();
        // A closed channel means that the step has ended.
        let _ = self.orders.send(Order::Attach(link)).await;
    }
}

/// The toy's states have files of their own format.
fn identity(job_digest: String) -> StateIdentity {
    StateIdentity {
        job_digest,
        format: WeightsFormat::Model {
            config: serde_json::Value::Null,
            dtype: Dtype::F32,
            frozen: None,
        },
    }
}

/// Once it is asked to: says that it wants to leave and waits to be let go, which ends the session. Goes at last without
/// that, and at once where it has nothing to hand over.
async fn leave(
    world: &World,
    node: Node,
    stop: &CancellationToken,
    is_ready: &AtomicBool,
    sender: &mpsc::Sender<v1::WorkerMessage>,
) {
    stop.cancelled().await;
    let reason = "it was asked to stop".to_owned();
    if is_ready.load(Ordering::SeqCst) {
        let reason = reason.clone();
        let _ = sender.send(up(Up::Draining(v1::Draining { reason }))).await;
        world.net.sleep(node, DRAINING_MS).await;
    }
    let failed = false;
    let _ = sender
        .send(up(Up::Leaving(v1::Leaving { reason, failed })))
        .await;
    world.net.sleep(node, FAREWELL_MS).await;
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
