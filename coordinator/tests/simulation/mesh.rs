//! The toy exchange: the protocol of the worker's collective over simulated connections. Each member sums a part of the
//! vector and sends the others the finished part, so a connection that breaks in the middle leaves some with the result
//! and some without. Sums are integers, as in the real one.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use futures::future::try_join_all;
use proto::v1;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use worker::collective::CollectiveError;
use worker::collective::feed::Update;
use worker::collective::state::StateCopy;

use crate::feed::Feeds;
use crate::net::link::{End, Receiver, Sender};
use crate::net::{Broken, Kind, Node};
use crate::rpc::{Network, Packet};

/// Scalars of the toy's gradient.
pub const SCALARS: usize = 8;
const HELLO_MS: u64 = 5_000;
const PROBE_MS: u64 = 3_000;

#[derive(Clone, Debug)]
pub enum PeerFrame {
    Hello {
        id: MeshId,
        from: u32,
    },
    Answer,
    Start(Start),
    Part(Vec<i64>),
    Finished(Vec<i64>),
    State(StateCopy),
    /// Opens a feed: what the follower has already.
    Follow {
        worker: u64,
        attempt: u64,
        has: Option<u64>,
    },
    Update(Update),
    /// Who is there? Answered with the same.
    Probe,
}

/// Term and generation: what was before is turned away.
pub type MeshId = (u64, u64);

/// What a member brings.
#[derive(Clone, Debug)]
pub struct Start {
    pub step: u64,
    pub held: Vec<v1::HeldSlot>,
    pub invalid: u64,
}

fn blame<T>(rank: u32, reason: &str) -> Result<T, CollectiveError> {
    let reason = reason.to_owned();
    let name = format!("rank {rank}");
    Err(CollectiveError::Peer { rank, name, reason })
}

/// Who takes part, as seen by one member.
#[derive(Clone)]
pub struct Membership {
    pub id: MeshId,
    pub rank: u32,
    pub members: Vec<Node>,
    /// How long a peer may say nothing.
    pub silence_ms: u64,
}

type Formed = Option<Result<Arc<Mesh>, CollectiveError>>;

struct Current {
    id: MeshId,
    fence: CancellationToken,
    formed: watch::Receiver<Formed>,
}

/// A worker's end of all exchanges. Dropped, it ends the one in progress.
pub struct Collective {
    net: Network,
    node: Node,
    current: Mutex<Option<Current>>,
    callers: Arc<Callers>,
    feeds: Arc<Feeds>,
    /// Closed when this is dropped.
    feeding: CancellationToken,
}

#[derive(Default)]
struct Callers {
    waiting: Mutex<Waiting>,
    arrived: Notify,
}

/// Calls whose generation has yet to begin here.
#[derive(Default)]
struct Waiting {
    /// Callers of older ones are turned away.
    newest: MeshId,
    /// By generation and rank.
    ends: BTreeMap<(MeshId, u32), End<Packet>>,
}

impl Collective {
    pub fn new(net: Network, node: Node) -> Self {
        Self {
            net,
            node,
            current: Mutex::new(None),
            callers: Arc::default(),
            feeds: Arc::default(),
            feeding: CancellationToken::new(),
        }
    }

    pub fn feeds(&self) -> &Feeds {
        &self.feeds
    }

    /// Takes a peer's call.
    pub fn called(&self, mut call: End<Packet>) {
        let (net, node, callers) = (self.net.clone(), self.node, self.callers.clone());
        let (feeds, feeding) = (self.feeds.clone(), self.feeding.clone());
        tokio::spawn(async move {
            let hello = tokio::select! {
                biased;
                hello = call.receiver.receive() => hello,
                () = net.sleep(node, HELLO_MS) => return,
            };
            if let Ok(Packet::Peer(PeerFrame::Follow {
                worker,
                attempt,
                has,
            })) = hello
            {
                tokio::select! {
                    biased;
                    () = feeding.cancelled() => {}
                    () = feeds.serve(&net, node, call, (worker, attempt, has)) => {}
                }
                return;
            }
            if let Ok(Packet::Peer(PeerFrame::Probe)) = hello {
                return call.sender.send(Packet::Peer(PeerFrame::Probe));
            }
            if let Ok(Packet::Peer(PeerFrame::Hello { id, from })) = hello {
                let mut waiting = lock(&callers.waiting);
                if id >= waiting.newest {
                    waiting.ends.insert((id, from), call);
                    callers.arrived.notify_waiters();
                }
            }
        });
    }

    /// Ends the generation before at once and begins to connect the new one.
    pub fn enter(&self, membership: Membership) {
        let (result, formed) = watch::channel(None);
        let fence = CancellationToken::new();
        let id = membership.id;
        let current = Current {
            id,
            fence: fence.clone(),
            formed,
        };
        if let Some(previous) = lock(&self.current).replace(current) {
            previous.fence.cancel();
        }
        {
            let mut waiting = lock(&self.callers.waiting);
            waiting.newest = waiting.newest.max(id);
            waiting.ends.retain(|key, _| key.0 >= id);
        }
        let (net, node, callers) = (self.net.clone(), self.node, self.callers.clone());
        tokio::spawn(async move {
            let forming = form(&net, node, &membership, &callers);
            let peers = tokio::select! {
                biased;
                () = fence.cancelled() => Err(CollectiveError::Superseded),
                peers = forming => peers,
            };
            let mesh = peers.map(|peers| {
                Arc::new(Mesh {
                    net: net.clone(),
                    node,
                    membership,
                    fence,
                    peers,
                })
            });
            let _ = result.send(Some(mesh));
        });
    }

    pub async fn mesh(&self, generation: u64) -> Result<Arc<Mesh>, CollectiveError> {
        let mut formed = match &*lock(&self.current) {
            Some(current) if current.id.1 == generation => current.formed.clone(),
            _ => return Err(CollectiveError::Superseded),
        };
        match formed.wait_for(Option::is_some).await {
            Ok(formed) => formed.clone().unwrap_or(Err(CollectiveError::Superseded)),
            Err(_) => Err(CollectiveError::Superseded),
        }
    }
}

impl Collective {
    /// Ends the current generation at once.
    pub fn close(&self) {
        if let Some(current) = lock(&self.current).take() {
            current.fence.cancel();
        }
    }
}

impl Drop for Collective {
    fn drop(&mut self) {
        self.feeding.cancel();
        self.close();
    }
}

/// Whether that machine's worker answers.
pub async fn reaches(net: &Network, node: Node, peer: Node) -> bool {
    let mut end = net.connect(node, peer, Kind::Peer);
    end.sender.send(Packet::Peer(PeerFrame::Probe));
    tokio::select! {
        biased;
        answer = end.receiver.receive() => matches!(answer, Ok(Packet::Peer(PeerFrame::Probe))),
        () = net.sleep(node, PROBE_MS) => false,
    }
}

struct Peer {
    sender: Sender<Packet>,
    receiver: tokio::sync::Mutex<Receiver<Packet>>,
}

/// The higher rank calls the lower.
async fn form(
    net: &Network,
    node: Node,
    membership: &Membership,
    callers: &Callers,
) -> Result<Vec<Option<Peer>>, CollectiveError> {
    let connecting = (0..membership.members.len() as u32).map(|rank| async move {
        let end = match rank.cmp(&membership.rank) {
            std::cmp::Ordering::Less => call(net, node, membership, rank),
            std::cmp::Ordering::Equal => return Ok(None),
            std::cmp::Ordering::Greater => {
                return tokio::select! {
                    biased;
                    end = answer(callers, membership.id, rank) => Ok(Some(end)),
                    () = net.sleep(node, membership.silence_ms) => blame(rank, "did not connect in time"),
                };
            }
        };
        tokio::select! {
            biased;
            end = end => Ok(Some(end)),
            () = net.sleep(node, membership.silence_ms) => blame(rank, "cannot be reached"),
        }
    });
    let ends = try_join_all(connecting).await?;
    let peer = |end: Option<End<Packet>>| {
        end.map(|end| Peer {
            sender: end.sender,
            receiver: tokio::sync::Mutex::new(end.receiver),
        })
    };
    Ok(ends.into_iter().map(peer).collect())
}

async fn call(net: &Network, node: Node, membership: &Membership, rank: u32) -> End<Packet> {
    let mut pause = 20;
    loop {
        let peer = membership.members[rank as usize];
        let mut end = net.connect(node, peer, Kind::Peer);
        end.sender.send(Packet::Peer(PeerFrame::Hello {
            id: membership.id,
            from: membership.rank,
        }));
        if let Ok(Packet::Peer(PeerFrame::Answer)) = end.receiver.receive().await {
            return end;
        }
        net.sleep(node, pause).await;
        pause = (pause * 2).min(500);
    }
}

async fn answer(callers: &Callers, id: MeshId, rank: u32) -> End<Packet> {
    loop {
        let arrived = callers.arrived.notified();
        let call = lock(&callers.waiting).ends.remove(&(id, rank));
        if let Some(call) = call {
            call.sender.send(Packet::Peer(PeerFrame::Answer));
            return call;
        }
        arrived.await;
    }
}

/// The connected members of one generation.
pub struct Mesh {
    net: Network,
    node: Node,
    membership: Membership,
    fence: CancellationToken,
    peers: Vec<Option<Peer>>,
}

/// The sum over all members.
pub struct Reduced {
    pub sums: Vec<i64>,
    pub invalid: u64,
    /// What the members held together.
    pub slots: Vec<v1::HeldSlot>,
}

impl Mesh {
    pub async fn all_reduce(&self, start: Start, sums: &[i64]) -> Result<Reduced, CollectiveError> {
        let exchange = Exchange {
            mesh: self,
            start,
            sums,
            own: Mutex::new((vec![0; self.chunk(self.membership.rank).len()], 0)),
            finished: watch::channel(None).0,
        };
        self.fenced(exchange.run()).await
    }

    pub async fn send_state(&self, ranks: &[u32], state: &StateCopy) {
        for rank in ranks {
            let frame = PeerFrame::State(state.clone());
            if let Some(Some(peer)) = self.peers.get(*rank as usize) {
                peer.sender.send(Packet::Peer(frame));
            }
        }
    }

    pub async fn receive_state(&self, rank: u32, step: u64) -> Result<StateCopy, CollectiveError> {
        self.fenced(async {
            match self.receive(rank).await? {
                PeerFrame::State(state) if state.snapshot.step == step => Ok(state),
                frame => blame(rank, &format!("sent {frame:?} where a state was due")),
            }
        })
        .await
    }

    /// A failure of one part ends the generation for all parts.
    async fn fenced<T>(
        &self,
        work: impl Future<Output = Result<T, CollectiveError>>,
    ) -> Result<T, CollectiveError> {
        tokio::select! {
            biased;
            () = self.fence.cancelled() => Err(CollectiveError::Superseded),
            result = work => result.inspect_err(|_| self.fence.cancel()),
        }
    }

    async fn receive(&self, rank: u32) -> Result<PeerFrame, CollectiveError> {
        let Some(Some(peer)) = self.peers.get(rank as usize) else {
            return blame(rank, "is not a peer");
        };
        let mut receiver = peer.receiver.lock().await;
        let packet = tokio::select! {
            biased;
            packet = receiver.receive() => packet,
            () = self.net.sleep(self.node, self.membership.silence_ms) => return blame(rank, "fell silent"),
        };
        match packet {
            Ok(Packet::Peer(frame)) => Ok(frame),
            Ok(_) => blame(rank, "sent something else"),
            Err(Broken) => blame(rank, "closed the connection"),
        }
    }

    fn size(&self) -> usize {
        self.membership.members.len()
    }

    fn chunk(&self, rank: u32) -> Range<usize> {
        let cut = |rank: usize| SCALARS * rank / self.size();
        cut(rank as usize)..cut(rank as usize + 1)
    }
}

struct Exchange<'a> {
    mesh: &'a Mesh,
    start: Start,
    sums: &'a [i64],
    /// Our own chunk, and how many have contributed to it.
    own: Mutex<(Vec<i64>, usize)>,
    finished: watch::Sender<Option<Vec<i64>>>,
}

impl Exchange<'_> {
    async fn run(&self) -> Result<Reduced, CollectiveError> {
        let rank = self.mesh.membership.rank;
        self.contribute(&self.sums[self.mesh.chunk(rank)]);
        let others = || (0..self.mesh.size() as u32).filter(|peer| *peer != rank);
        let sending = try_join_all(others().map(|peer| self.send_to(peer)));
        let receiving = try_join_all(others().map(|peer| self.receive_from(peer)));
        let (_, received) = tokio::try_join!(sending, receiving)?;

        let mut sums = vec![0; SCALARS];
        let own = self.wait_for_own().await?;
        sums[self.mesh.chunk(rank)].copy_from_slice(&own);
        let mut invalid = self.start.invalid;
        let mut slots = self.start.held.clone();
        for (peer, start, chunk) in received {
            sums[self.mesh.chunk(peer)].copy_from_slice(&chunk);
            invalid += start.invalid;
            slots.extend(start.held);
        }
        Ok(Reduced {
            sums,
            invalid,
            slots,
        })
    }

    async fn send_to(&self, rank: u32) -> Result<(), CollectiveError> {
        let Some(Some(peer)) = self.mesh.peers.get(rank as usize) else {
            return blame(rank, "is not a peer");
        };
        let send = |frame| peer.sender.send(Packet::Peer(frame));
        send(PeerFrame::Start(self.start.clone()));
        send(PeerFrame::Part(self.sums[self.mesh.chunk(rank)].to_vec()));
        send(PeerFrame::Finished(self.wait_for_own().await?));
        Ok(())
    }

    async fn receive_from(&self, rank: u32) -> Result<(u32, Start, Vec<i64>), CollectiveError> {
        let start = match self.mesh.receive(rank).await? {
            PeerFrame::Start(start) if start.step == self.start.step => start,
            frame => return blame(rank, &format!("sent {frame:?} where a start was due")),
        };
        match self.mesh.receive(rank).await? {
            PeerFrame::Part(part) => self.contribute(&part),
            frame => return blame(rank, &format!("sent {frame:?} where a part was due")),
        }
        match self.mesh.receive(rank).await? {
            PeerFrame::Finished(chunk) => Ok((rank, start, chunk)),
            frame => blame(rank, &format!("sent {frame:?} where a sum was due")),
        }
    }

    fn contribute(&self, part: &[i64]) {
        let mut own = lock(&self.own);
        for (sum, part) in own.0.iter_mut().zip(part) {
            *sum = sum.wrapping_add(*part);
        }
        own.1 += 1;
        if own.1 == self.mesh.size() {
            self.finished.send_replace(Some(own.0.clone()));
        }
    }

    async fn wait_for_own(&self) -> Result<Vec<i64>, CollectiveError> {
        let mut finished = self.finished.subscribe();
        match finished.wait_for(Option::is_some).await {
            Ok(chunk) => Ok(chunk.clone().unwrap_or_default()),
            Err(_) => Err(CollectiveError::Superseded),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
