//! The gRPC server around the [`Reception`]: limits, keep-alive and windows of every connection. It accepts from the first
//! second of the process to the end of the run.

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use common::progress::Progress;
use common::wire::MAX_MESSAGE_BYTES;
use proto::health::health_server::HealthServer;
use proto::v1::coordinator_server::CoordinatorServer;
use tokio_util::sync::CancellationToken;

use crate::rpc::connections;
use crate::rpc::reception::Reception;
use crate::rpc::service::Service;

/// Interval of the HTTP/2 keep-alive pings on a silent connection.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// A connection is given up when a ping stays unanswered so long; a busy machine may take a while.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_CONNECTIONS: usize = 8192;
const MAX_CALLS_PER_CONNECTION: usize = 256;
/// Largest request of a health check, which holds the name of a service.
const MAX_HEALTH_BYTES: usize = 4 << 10;
/// How long the last messages may take on their way out when the server closes.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Largest HTTP/2 frame that is received: with the usual 16 KiB a checkpoint would be thousands of small writes and reads. A
/// message that waits behind one waits 2 ms at 1 Gbit/s.
const FRAME_BYTES: u32 = 256 << 10;

/// A handle on the running server.
#[derive(Clone)]
pub struct Server {
    reception: Reception,
    address: SocketAddr,
    closing: CancellationToken,
    /// Cancelled when no connection is left.
    closed: CancellationToken,
}

impl Server {
    /// Starts the server, which tells every caller how far the preparation is until [`Self::open`]. Needs a tokio runtime.
    pub fn begin(
        listener: TcpListener,
        token: Option<String>,
        preparation: Progress,
    ) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let address = listener.local_addr()?;
        let reception = Reception::new(token, preparation);
        let (closing, closed) = (CancellationToken::new(), CancellationToken::new());
        let serving = serve(reception.clone(), listener, closing.clone());
        let ending = closed.clone().drop_guard();
        tokio::spawn(async move {
            let _ending = ending;
            if let Err(error) = serving.await {
                tracing::error!("workers cannot be served any more: {error}");
            }
        });
        Ok(Self {
            reception,
            address,
            closing,
            closed,
        })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The token that callers must show, if any.
    pub fn token(&self) -> Option<&str> {
        self.reception.token()
    }

    /// Lets the service of the run answer calls from now on.
    pub fn open(&self, service: Service) {
        self.reception.open(service);
    }

    /// Closes the server because there will be no run. Whoever waits for it is told why first.
    pub async fn turn_away(&self, reason: &str) {
        self.reception.end(reason);
        self.reception.await_callers().await;
        self.close(reason).await;
    }

    /// Closes the server after what is on its way out, as far as that is taken in time. Whoever calls until then is told why.
    /// Returns whether every connection is closed.
    pub async fn close(&self, reason: &str) -> bool {
        self.reception.end(reason);
        self.closing.cancel();
        let closed = self.closed.cancelled();
        tokio::time::timeout(CLOSE_TIMEOUT, closed).await.is_ok()
    }
}

/// Answers calls until `closing` is cancelled.
pub async fn serve(
    reception: Reception,
    listener: tokio::net::TcpListener,
    closing: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let incoming = connections::accept(listener, MAX_CONNECTIONS);
    let health = HealthServer::new(reception.clone()).max_decoding_message_size(MAX_HEALTH_BYTES);
    let service = CoordinatorServer::new(reception)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .concurrency_limit_per_connection(MAX_CALLS_PER_CONNECTION)
        .max_frame_size(Some(FRAME_BYTES))
        .initial_stream_window_size(Some(8 << 20))
        .initial_connection_window_size(Some(16 << 20))
        .add_service(service)
        .add_service(health)
        .serve_with_incoming_shutdown(incoming, closing.cancelled_owned())
        .await
}
