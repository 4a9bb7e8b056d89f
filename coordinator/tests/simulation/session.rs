//! One session of a toy worker: what the coordinator says becomes orders for the engine, and slots that are wanted back
//! are given back at once.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::wire::{PlanKind, up};
use futures::StreamExt;
use proto::v1;
use proto::v1::coordinator_message::Message as Down;
use proto::v1::worker_message::Message as Up;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use worker::collective::PeerAddress;
use worker::collective::feed::Source;
use worker::rpc::blocks::PendingBlocks;
use worker::run::leases::{Leases, SlotKey};
use worker::run::orders::{Lease, Order};

use crate::bulk::fetch_blocks;
use crate::heard::Heard;
use crate::mesh::{Collective, Membership, reaches};
use crate::net::Node;
use crate::rpc::Client;
use crate::world::{World, count};

/// How a session ended.
#[derive(Debug)]
pub enum Ended {
    Finished,
    /// It was asked to stop and has nothing to hand over, or was not let go in time.
    Left,
    Refused(String),
    /// It may come back as a newcomer.
    Expelled(String),
    Lost(String),
}

impl Ended {
    pub fn of(status: &Status) -> Self {
        let reason = status.message().to_owned();
        match status.code() {
            Code::Aborted => Self::Expelled(reason),
            Code::FailedPrecondition
            | Code::InvalidArgument
            | Code::PermissionDenied
            | Code::ResourceExhausted
            | Code::Unauthenticated => Self::Refused(reason),
            _ => Self::Lost(reason),
        }
    }

    pub fn finished(finish: v1::Finish) -> Self {
        match finish {
            v1::Finish {
                resumable: true, ..
            } => Self::Lost(finish.reason),
            v1::Finish { failed: true, .. } => Self::Refused(finish.reason),
            _ => Self::Finished,
        }
    }
}

/// What the coordinator said first, and what it says from then on.
pub type Opened = (v1::Welcome, Streaming<v1::CoordinatorMessage>);

/// What the worker says from here on is noted.
pub async fn open(
    (world, node): (&Arc<World>, Node),
    client: &mut Client,
    join: v1::Join,
    up_sender: &mpsc::Sender<v1::WorkerMessage>,
    receiver: mpsc::Receiver<v1::WorkerMessage>,
) -> Result<Opened, Ended> {
    // Never full: it is the first message.
    let _ = up_sender.try_send(up(Up::Join(join)));
    let world = world.clone();
    let said = ReceiverStream::new(receiver).inspect(move |message| {
        let message = &message.message;
        if let Some(Up::Withdrawn(withdrawn)) = message {
            count(&world.counts.withdrawn, withdrawn.slots.len() as u64);
        }
        if !matches!(message, Some(Up::Heartbeat(_))) {
            world.net.note(|| format!("w{node} says {message:?}"));
        }
    });
    let opened = client.session(said).await;
    let mut down = opened.map_err(|status| Ended::of(&status))?.into_inner();
    let first = down.message().await.map_err(|status| Ended::of(&status))?;
    match first.and_then(|first| first.message) {
        Some(Down::Welcome(welcome)) => Ok((welcome, down)),
        Some(Down::Finish(finish)) => Err(Ended::finished(finish)),
        other => Err(Ended::Lost(format!("{other:?} where Welcome was due"))),
    }
}

pub struct Session {
    pub world: Arc<World>,
    pub node: Node,
    pub client: Client,
    pub collective: Arc<Collective>,
    pub heard: Heard,
    pub term: u64,
    pub leases: Arc<Leases>,
    pub up: mpsc::Sender<v1::WorkerMessage>,
    /// Ended with the session.
    pub tasks: JoinSet<()>,
}

impl Session {
    /// Passes orders on until the session ends.
    pub async fn forward(
        &mut self,
        mut down: Streaming<v1::CoordinatorMessage>,
        orders: mpsc::Sender<Order>,
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
                    self.heard.newest_generation.store(number, Ordering::SeqCst);
                    self.leases.clear();
                    self.collective.enter(membership(&generation, self.term));
                    Order::Enter(generation)
                }
                Some(Down::Probe(probe)) => {
                    self.probe(probe);
                    continue;
                }
                Some(Down::Aside(_)) => {
                    count(&self.world.counts.set_aside, 1);
                    continue;
                }
                Some(Down::Plan(plan)) => Order::Plan(plan),
                Some(Down::Lease(lease)) => Order::Lease(self.prefetch(lease, &blocks_digest)),
                Some(Down::Withdraw(withdraw)) => {
                    self.give_back(withdraw).await;
                    continue;
                }
                Some(Down::Exchange(exchange)) => Order::Exchange(exchange),
                Some(Down::SaveState(save)) => Order::Save(save),
                Some(Down::Feed(feed)) => Order::Feed {
                    run_id: [0; 32],
                    feed,
                },
                Some(Down::Follow(follow)) => {
                    let member = follow.source.unwrap_or_default();
                    Order::Follow(Source {
                        run_id: [0; 32],
                        worker: follow.worker,
                        attempt: follow.attempt,
                        peer: PeerAddress {
                            name: member.name,
                            address: member.address,
                        },
                    })
                }
                Some(Down::Finish(finish)) => return Ended::finished(finish),
                other => return Ended::Refused(format!("{other:?} was not due")),
            };
            // A closed channel means that the engine has ended, which is noticed elsewhere.
            let _ = orders.send(order).await;
        }
    }

    fn probe(&mut self, probe: v1::Probe) {
        let (world, node, up_sender) = (self.world.clone(), self.node, self.up.clone());
        self.tasks.spawn(async move {
            let trying = probe.members.iter().map(|member| async {
                let reached = reaches(&world.net, node, node_of(member)).await;
                (!reached).then(|| v1::Unreached {
                    worker: member.worker,
                    reason: "it does not answer".to_owned(),
                })
            });
            let tried = futures::future::join_all(trying).await;
            let unreached = tried.into_iter().flatten().collect();
            let number = probe.number;
            let probed = up(Up::Probed(v1::Probed { number, unreached }));
            // Where it cannot be said, the session is over.
            let _ = up_sender.send(probed).await;
        });
    }

    async fn give_back(&self, withdraw: v1::Withdraw) {
        if let Ok(Some(withdrawn)) = self.leases.give_back(withdraw) {
            // Where it cannot be said, the session is over.
            let _ = self.up.send(up(Up::Withdrawn(withdrawn))).await;
        }
    }

    fn prefetch(&mut self, lease: v1::Lease, digest: &str) -> Lease {
        let kind = PlanKind::from_wire(lease.kind).unwrap_or(PlanKind::Eval);
        let (generation, step) = (lease.generation, lease.step);
        let key = |slot: &u32| SlotKey {
            generation,
            kind,
            step,
            slot: *slot,
        };
        self.leases.add(lease.slots.iter().map(key));
        let mut slots = Vec::new();
        for slot in lease.slots {
            if kind == PlanKind::Train {
                self.heard.leased(step, slot, generation);
            }
            let (sender, receiver) = oneshot::channel();
            let request = v1::FetchBlocksRequest {
                digest: digest.to_owned(),
                blocks: self.world.model.blocks(kind, lease.step, slot),
            };
            let client = self.client.clone();
            self.tasks.spawn(async move {
                // A failed fetch drops the sender.
                if let Ok(blocks) = fetch_blocks(client, request).await {
                    let _ = sender.send(Ok(blocks));
                }
            });
            slots.push((slot, PendingBlocks::new(receiver)));
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
    node_at(&member.address)
}

pub fn node_at(address: &str) -> Node {
    let port = address.rsplit_once(':').map(|(_, port)| port);
    port.and_then(|port| port.parse().ok()).unwrap_or_default()
}

fn membership(generation: &v1::Generation, term: u64) -> Membership {
    Membership {
        id: (term, generation.generation),
        rank: generation.rank,
        members: generation.members.iter().map(node_of).collect(),
        silence_ms: generation.deadline_ms,
    }
}
