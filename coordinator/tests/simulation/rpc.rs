//! gRPC over the simulated network: the generated client on one side and the generated server around the real service
//! on the other. Every message is encoded, framed, checked and decoded as on a real connection; only HTTP/2 is not there.

use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use common::wire::MAX_MESSAGE_BYTES;
use coordinator::rpc::service::Service;
use http_body::{Body, Frame};
use proto::v1::coordinator_client::CoordinatorClient;
use proto::v1::coordinator_server::CoordinatorServer;
use tonic::codegen::{BoxFuture, Bytes, http};

use crate::mesh::PeerFrame;
use crate::net::link::{End, Receiver, Sender};
use crate::net::{Broken, COORDINATOR, Kind, Net, Node, Payload};

/// What travels on a simulated connection.
pub enum Packet {
    Request(Box<http::request::Parts>),
    Response(Box<http::response::Parts>),
    Data(Bytes),
    Trailers(Box<http::HeaderMap>),
    /// The body ends without trailers.
    End,
    Peer(PeerFrame),
}

impl Payload for Packet {
    fn describe(&self) -> String {
        match self {
            Self::Request(head) => head.uri.path().to_owned(),
            Self::Data(bytes) => format!("{} bytes", bytes.len()),
            // Their text may hold the order of a hash map.
            Self::Response(_) | Self::Trailers(_) | Self::End => String::new(),
            Self::Peer(frame) => format!("{frame:?}"),
        }
    }
}

pub type Network = Net<Packet>;
pub type Client = CoordinatorClient<Channel>;

pub fn client(net: &Network, from: Node) -> Client {
    let net = net.clone();
    CoordinatorClient::new(Channel { net, from })
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

/// Answers calls as a real server does, each on a task of its own.
pub async fn serve(service: Service, mut calls: tokio::sync::mpsc::UnboundedReceiver<End<Packet>>) {
    let service = CoordinatorServer::new(service)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let mut answering = tokio::task::JoinSet::new();
    while let Some(call) = calls.recv().await {
        answering.spawn(answer(service.clone(), call));
    }
}

async fn answer(mut service: CoordinatorServer<Service>, call: End<Packet>) {
    let mut receiver = call.receiver;
    let Ok(Packet::Request(head)) = receiver.receive().await else {
        return;
    };
    let body = PipeBody::new(receiver);
    let request = http::Request::from_parts(*head, body);
    let Ok(response) = tonic::codegen::Service::call(&mut service, request).await;
    let (head, body) = response.into_parts();
    call.sender.send(Packet::Response(Box::new(head)));
    pump(body, call.sender).await;
}

/// A worker's way to the coordinator.
#[derive(Clone)]
pub struct Channel {
    net: Network,
    from: Node,
}

impl tonic::codegen::Service<http::Request<tonic::body::Body>> for Channel {
    type Response = http::Response<PipeBody>;
    type Error = Broken;
    type Future = BoxFuture<Self::Response, Broken>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        let End {
            sender,
            mut receiver,
        } = self.net.connect(self.from, COORDINATOR, Kind::Call);
        let (head, body) = request.into_parts();
        // As an HTTP/2 stream: a caller that takes no answer asks no more either.
        receiver.close_both_on_drop();
        sender.send(Packet::Request(Box::new(head)));
        tokio::spawn(pump(body, sender));
        Box::pin(async move {
            match receiver.receive().await? {
                Packet::Response(head) => {
                    Ok(http::Response::from_parts(*head, PipeBody::new(receiver)))
                }
                _ => Err(Broken),
            }
        })
    }
}

/// Sends a body piece by piece until it ends or nobody takes it any more.
async fn pump<B>(body: B, sender: Sender<Packet>)
where
    B: Body<Data = Bytes>,
{
    let mut body = pin!(body);
    loop {
        let piece = std::future::poll_fn(|context| {
            if sender.is_over(context) {
                return Poll::Ready(None);
            }
            match sender.poll_ready(context) {
                Poll::Ready(Ok(())) => body.as_mut().poll_frame(context).map(Some),
                Poll::Ready(Err(Broken)) => Poll::Ready(None),
                Poll::Pending => Poll::Pending,
            }
        });
        let packet = match piece.await {
            Some(Some(Ok(frame))) => match frame.into_data() {
                Ok(data) => Packet::Data(data),
                Err(frame) => match frame.into_trailers() {
                    Ok(trailers) => Packet::Trailers(Box::new(trailers)),
                    Err(_) => continue,
                },
            },
            Some(None) => {
                sender.send(Packet::End);
                // Half closed: the other direction goes on until it ends by itself.
                return std::future::poll_fn(|context| match sender.is_over(context) {
                    true => Poll::Ready(()),
                    false => Poll::Pending,
                })
                .await;
            }
            None | Some(Some(Err(_))) => return,
        };
        sender.send(packet);
    }
}

/// What arrives, as the body of a request or response.
pub struct PipeBody {
    receiver: Receiver<Packet>,
    over: bool,
}

impl PipeBody {
    fn new(receiver: Receiver<Packet>) -> Self {
        let over = false;
        Self { receiver, over }
    }
}

impl Body for PipeBody {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        if self.over {
            return Poll::Ready(None);
        }
        self.receiver.poll_receive(context).map(|packet| {
            self.over = !matches!(packet, Ok(Packet::Data(_)));
            match packet {
                Ok(Packet::Data(data)) => Some(Ok(Frame::data(data))),
                Ok(Packet::Trailers(trailers)) => Some(Ok(Frame::trailers(*trailers))),
                Ok(_) => None,
                Err(Broken) => Some(Err(Broken)),
            }
        })
    }
}
