//! gRPC: messages become events for the driver, and what it queues for a worker becomes messages. Bulk calls (blocks,
//! files, state) are answered here, from the [`Transfers`].
//!
//! It decides nothing about the run. Everything a peer sends is bounded: message size, calls at a time, names, sizes.

use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use common::text;
use common::wire::{MAX_BLOCKS_PER_FETCH, MAX_FILES, TOKEN_KEY, token_matches};
use futures::{Stream, StreamExt};
use proto::v1::coordinator_server::Coordinator;
use proto::v1::{self, worker_message::Message as Up};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::cluster::{Event, MAX_PROBED, WorkerId};
use crate::driver::control_loop::{Input, Outgoing};
use crate::driver::transfers::Transfers;
use crate::driver::uploads;
use crate::rpc::files;

/// Longest time from the opening of a session to its Join.
const JOIN_DEADLINE: Duration = Duration::from_secs(10);
/// Messages queued for one worker. A worker that lets them pile up further is stuck, and lost.
const OUTBOX: usize = 1024;
/// Longest name, numerics class and other text by which a worker calls something.
const MAX_NAME_BYTES: usize = 256;
/// Longest identifier of an NCCL communicator; NCCL's have 128 bytes.
const MAX_NCCL_ID_BYTES: usize = 256;

/// The gRPC service of the run: answers every call of a worker.
#[derive(Clone)]
pub struct Service {
    inputs: mpsc::Sender<Input>,
    shelf: Arc<Transfers>,
    token: Option<Arc<str>>,
}

impl Service {
    pub fn new(inputs: mpsc::Sender<Input>, shelf: Arc<Transfers>, token: Option<String>) -> Self {
        Self {
            inputs,
            shelf,
            token: token.map(Into::into),
        }
    }

    fn admit<T>(&self, request: &Request<T>) -> Result<(), Status> {
        admit(self.token.as_deref(), request)
    }

    async fn tell(&self, input: Input) -> Result<(), Status> {
        let over = |_| Status::unavailable("the run is over");
        self.inputs.send(input).await.map_err(over)
    }
}

/// Lets a call pass that shows the token, where there is one.
pub fn admit<T>(token: Option<&str>, request: &Request<T>) -> Result<(), Status> {
    let Some(token) = token else {
        return Ok(());
    };
    let presented = request.metadata().get(TOKEN_KEY);
    let presented = presented.map_or(&[][..], |value| value.as_bytes());
    if token_matches(presented, token) {
        Ok(())
    } else {
        Err(Status::unauthenticated(
            "the token is missing or wrong; give the worker the coordinator's --token-file",
        ))
    }
}

/// The stream of messages that answers a call.
pub type Downstream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Coordinator for Service {
    type SessionStream = Downstream<v1::CoordinatorMessage>;
    type FetchBlocksStream = Downstream<v1::BlockChunk>;
    type FetchFileStream = Downstream<v1::FileChunk>;

    async fn session(
        &self,
        request: Request<Streaming<v1::WorkerMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        self.admit(&request)?;
        let peer = request.remote_addr();
        let mut messages = request.into_inner();
        let first = tokio::time::timeout(JOIN_DEADLINE, messages.message())
            .await
            .map_err(|_| Status::deadline_exceeded("the session did not begin with a Join"))??;
        let Some(Up::Join(mut join)) = first.and_then(|message| message.message) else {
            return Err(Status::invalid_argument(
                "the session did not begin with a Join",
            ));
        };
        let gpu = join.gpu.clone().unwrap_or_default();
        let names = [
            &join.name,
            &join.numerics_class,
            &join.device,
            &join.version,
            &join.exchange_host,
            &join.job_digest,
            &join.run,
            &gpu.uuid,
            &gpu.nccl_fault,
        ];
        if names.iter().any(|name| name.len() > MAX_NAME_BYTES) {
            return Err(Status::invalid_argument("a name in Join is too long"));
        }
        for told in [&mut join.name, &mut join.device, &mut join.version] {
            *told = text::reason(told);
        }
        let address = exchange_address(&join, peer)?;
        let (name, reached_at) = (join.name.clone(), address.clone());
        let (outbox, queue) = mpsc::channel(OUTBOX);
        let closed = CancellationToken::new();
        let (answer, worker) = oneshot::channel();
        self.tell(Input::Opened {
            join,
            address,
            outbox,
            closed: closed.clone(),
            answer,
        })
        .await?;
        let over = |_| Status::unavailable("the run is over");
        let worker = worker.await.map_err(over)??;
        let holder = v1::Member {
            worker: worker.0,
            name,
            address: reached_at,
        };
        let (shelf, inputs) = (self.shelf.clone(), self.inputs.clone());
        tokio::spawn(async move {
            read_session(&holder, &shelf, messages, inputs, closed).await;
        });
        let messages = ReceiverStream::new(queue).map(Outgoing::into_message);
        Ok(Response::new(Box::pin(messages)))
    }

    async fn fetch_blocks(
        &self,
        request: Request<v1::FetchBlocksRequest>,
    ) -> Result<Response<Self::FetchBlocksStream>, Status> {
        self.admit(&request)?;
        let v1::FetchBlocksRequest { digest, blocks } = request.into_inner();
        let own = self.shelf.blocks.digest();
        if digest != own {
            return Err(Status::failed_precondition(format!(
                "the blocks asked for are {digest} but this run's are {own}"
            )));
        }
        if blocks.len() > MAX_BLOCKS_PER_FETCH {
            return Err(Status::invalid_argument(format!(
                "{} blocks in one request, at most {MAX_BLOCKS_PER_FETCH} are allowed",
                blocks.len()
            )));
        }
        let shelf = self.shelf.clone();
        let chunks = blocks.into_iter().map(move |block| {
            let data = shelf.blocks.block_bytes(block).ok_or_else(|| {
                Status::out_of_range(format!("there is no block {block} in this run"))
            })?;
            let data = data.to_vec().into();
            Ok(v1::BlockChunk { block, data })
        });
        Ok(Response::new(Box::pin(futures::stream::iter(chunks))))
    }

    async fn fetch_file(
        &self,
        request: Request<v1::FetchFileRequest>,
    ) -> Result<Response<Self::FetchFileStream>, Status> {
        self.admit(&request)?;
        let peer = request.remote_addr();
        let is_local = peer.is_some_and(|peer| peer.ip().is_loopback());
        let request = request.into_inner();
        let chunks = files::send(self.shelf.clone(), request, is_local).await?;
        Ok(Response::new(chunks))
    }

    async fn upload_state(
        &self,
        request: Request<Streaming<v1::UploadChunk>>,
    ) -> Result<Response<v1::UploadReply>, Status> {
        self.admit(&request)?;
        let mut chunks = request.into_inner();
        let header = uploads::read_header(&mut chunks).await?;
        let worker = WorkerId(header.worker);
        let expected = self
            .shelf
            .claim(worker, header.step)
            .ok_or_else(|| Status::failed_precondition("that state was not asked for"))?;
        let step = header.step;
        match uploads::receive(header, expected, &mut chunks).await {
            Ok(received) => {
                self.tell(Input::Uploaded(received)).await?;
                Ok(Response::new(v1::UploadReply {}))
            }
            Err(status) => {
                let reason = status.message().to_owned();
                let disk = status.code() == uploads::DISK_FAILED;
                let event = Event::StateFailed {
                    worker,
                    step,
                    reason,
                    disk,
                };
                self.tell(Input::Happened(event)).await?;
                Err(status)
            }
        }
    }
}

/// Address at which peers reach a worker's exchange: the host that the worker names, else the one it calls from.
fn exchange_address(join: &v1::Join, peer: Option<SocketAddr>) -> Result<String, Status> {
    let port = u16::try_from(join.exchange_port)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| Status::invalid_argument("exchange_port is not a port"))?;
    if !join.exchange_host.is_empty() {
        return Ok(match join.exchange_host.parse::<IpAddr>() {
            Ok(ip) => SocketAddr::new(ip, port).to_string(),
            Err(_) => format!("{}:{port}", join.exchange_host),
        });
    }
    let peer = peer.ok_or_else(|| Status::internal("the caller has no address"))?;
    Ok(SocketAddr::new(peer.ip(), port).to_string())
}

/// Turns one worker's messages into events until the session ends, from whichever side. Which files it passes on, the shelf
/// hears alone.
async fn read_session(
    sender: &v1::Member,
    shelf: &Transfers,
    mut messages: Streaming<v1::WorkerMessage>,
    inputs: mpsc::Sender<Input>,
    closed: CancellationToken,
) {
    let worker = WorkerId(sender.worker);
    loop {
        let message = tokio::select! {
            biased;
            () = closed.cancelled() => return,
            // The run is over. A worker that says nothing more must not keep its connection open.
            () = inputs.closed() => return,
            message = messages.message() => message,
        };
        let event = match message {
            Ok(Some(v1::WorkerMessage {
                message: Some(Up::Holds(v1::Holds { digests })),
            })) if digests.len() <= MAX_FILES => {
                shelf.hold(sender, &digests);
                Event::Heard { worker }
            }
            Ok(Some(message)) => event(worker, message.message),
            Ok(None) => lost(worker, "it closed the session".to_owned()),
            Err(status) => {
                tracing::debug!("session of worker {}: {status}", worker.0);
                lost(worker, "its connection broke".to_owned())
            }
        };
        let over = matches!(event, Event::WorkerLost { .. });
        if inputs.send(Input::Happened(event)).await.is_err() || over {
            return;
        }
    }
}

fn lost(worker: WorkerId, reason: String) -> Event {
    Event::WorkerLost { worker, reason }
}

fn event(worker: WorkerId, message: Option<Up>) -> Event {
    match message {
        Some(Up::Ready(ready)) => Event::WorkerReady { worker, ready },
        Some(Up::Entered(entered)) => Event::WorkerEntered { worker, entered },
        Some(Up::SlotDone(done)) => Event::SlotDone { worker, done },
        Some(Up::Withdrawn(withdrawn)) => Event::SlotsWithdrawn { worker, withdrawn },
        Some(Up::StepReport(report)) => Event::StepReported { worker, report },
        Some(Up::Synced(synced)) => Event::WorkerSynced { worker, synced },
        Some(Up::FeedLost(mut lost)) => {
            lost.reason = text::reason(&lost.reason);
            Event::FeedLost { worker, lost }
        }
        Some(Up::NcclId(nccl_id)) if nccl_id.id.len() > MAX_NCCL_ID_BYTES => lost(
            worker,
            "it sent an identifier for NCCL that is too long".to_owned(),
        ),
        Some(Up::NcclId(nccl_id)) => Event::NcclIdentified { worker, nccl_id },
        Some(Up::NcclLost(mut lost)) => {
            lost.reason = text::reason(&lost.reason);
            Event::NcclLost { worker, lost }
        }
        Some(Up::Probed(probed)) if probed.unreached.len() > MAX_PROBED => {
            lost(worker, "it was not asked about so many workers".to_owned())
        }
        Some(Up::Probed(mut probed)) => {
            for unreached in &mut probed.unreached {
                unreached.reason = text::reason(&unreached.reason);
            }
            Event::Probed { worker, probed }
        }
        Some(Up::PeerLost(mut lost)) => {
            lost.reason = text::reason(&lost.reason);
            Event::PeerLost { worker, lost }
        }
        Some(Up::Draining(draining)) => Event::WorkerDraining {
            worker,
            reason: text::reason(&draining.reason),
        },
        Some(Up::Leaving(leaving)) => lost(worker, text::reason(&leaving.reason)),
        Some(Up::Heartbeat(_)) => Event::Heard { worker },
        Some(Up::Holds(_)) => lost(
            worker,
            "it says to hold more files than a run has".to_owned(),
        ),
        Some(Up::Join(_)) => lost(worker, "it joined twice in one session".to_owned()),
        None => lost(worker, "it sent an empty message".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_of_megabytes_is_one_visible_line() {
        let reason = format!("\x1b[2Jgone\n{}", "x".repeat(15_000_000));
        let of = |message| match event(WorkerId(1), Some(message)) {
            Event::WorkerLost { reason, .. } | Event::WorkerDraining { reason, .. } => reason,
            Event::PeerLost { lost, .. } => lost.reason,
            Event::NcclLost { lost, .. } => lost.reason,
            Event::FeedLost { lost, .. } => lost.reason,
            other => panic!("{other:?}"),
        };
        let told = [
            of(Up::Leaving(v1::Leaving {
                reason: reason.clone(),
                failed: false,
            })),
            of(Up::Draining(v1::Draining {
                reason: reason.clone(),
            })),
            of(Up::PeerLost(v1::PeerLost {
                reason: reason.clone(),
                ..v1::PeerLost::default()
            })),
            of(Up::NcclLost(v1::NcclLost {
                reason: reason.clone(),
                ..v1::NcclLost::default()
            })),
            of(Up::FeedLost(v1::FeedLost {
                reason: reason.clone(),
                ..v1::FeedLost::default()
            })),
        ];
        for told in told {
            assert!(told.starts_with("␛[2Jgone xxx"), "{told}");
            assert!(told.len() < 1000 && !told.chars().any(char::is_control));
        }
    }
}
