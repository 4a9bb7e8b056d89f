//! The gRPC server around the [`Service`]: limits, keep-alive and windows of every connection.

use std::time::Duration;

use common::wire::MAX_MESSAGE_BYTES;
use proto::v1::coordinator_server::CoordinatorServer;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::connections;
use crate::service::Service;

/// A silent connection is probed this often.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// It is given up when a probe stays unanswered so long; a busy machine may take a while.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_CONNECTIONS: usize = 8192;
const MAX_CALLS_PER_CONNECTION: usize = 256;

/// Of a state that comes in: with HTTP/2's 16 KiB a checkpoint would be thousands of small writes and reads. A message
/// that waits behind one waits 2 ms at 1 Gbit/s.
const FRAME_BYTES: u32 = 256 << 10;

/// Answers calls until `closing` is cancelled.
pub async fn serve(
    service: Service,
    listener: TcpListener,
    closing: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let incoming = connections::accept(listener, MAX_CONNECTIONS);
    let service = CoordinatorServer::new(service)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .concurrency_limit_per_connection(MAX_CALLS_PER_CONNECTION)
        .max_frame_size(Some(FRAME_BYTES))
        .initial_stream_window_size(Some(8 << 20))
        .initial_connection_window_size(Some(16 << 20))
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, closing.cancelled_owned())
        .await
}
