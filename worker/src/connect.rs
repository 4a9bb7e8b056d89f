//! The connection to the coordinator, under every call.
//!
//! In: an address and perhaps a token. Out: a client, or one error when the time to try is up.

use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBuilder};
use common::wire::{MAX_MESSAGE_BYTES, TOKEN_KEY, bearer};
use proto::v1::coordinator_client::CoordinatorClient;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use crate::{JoinOptions, WorkerError};

pub type Client = CoordinatorClient<InterceptedService<Channel, Bearer>>;

/// One attempt to connect.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
/// The connection is probed this often and given up when a probe stays unanswered as long again.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Adds the token to every call.
#[derive(Clone)]
pub struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert(TOKEN_KEY, token.clone());
        }
        Ok(request)
    }
}

/// Pauses between attempts: doubling, with jitter, so that many workers do not come back at one moment.
pub fn retry_delays(attempts: usize) -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(250))
        .with_max_delay(Duration::from_secs(5))
        .with_max_times(attempts)
        .with_jitter()
        .build()
}

/// Connects, trying again until the options' time is up.
pub async fn connect(options: &JoinOptions) -> Result<Client, WorkerError> {
    let bearer = Bearer(match &options.token {
        Some(token) => Some(bearer(token).parse().map_err(|_| WorkerError::Token)?),
        None => None,
    });
    let endpoint = endpoint(&options.address)?;
    let deadline = Instant::now() + options.connect_timeout;
    let mut delays = retry_delays(usize::MAX);
    let mut told = None;
    let channel = loop {
        let error = match endpoint.connect().await {
            Ok(channel) => break channel,
            Err(error) => root_cause(&error),
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let delay = delays.next().unwrap_or(ATTEMPT_TIMEOUT).min(left);
        if left.is_zero() {
            return Err(WorkerError::Unreachable {
                address: options.address.clone(),
                reason: error,
                seconds: options.connect_timeout.as_secs(),
            });
        }
        // Rounded up, and each second told once: the first attempts are less than a second apart.
        let seconds = left.as_secs_f64().ceil() as u64;
        if told.replace(seconds) != Some(seconds) {
            tracing::warn!(
                "coordinator {} cannot be reached ({error}); trying again, {seconds} s left",
                options.address,
            );
        }
        tokio::time::sleep(delay).await;
    };
    Ok(CoordinatorClient::with_interceptor(channel, bearer)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES))
}

fn endpoint(address: &str) -> Result<Endpoint, WorkerError> {
    let wrong = || WorkerError::Address {
        address: address.to_owned(),
    };
    let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
    if host.is_empty() || port.parse::<u16>().is_err() || address.contains('/') {
        return Err(wrong());
    }
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|_| wrong())?;
    Ok(endpoint
        .connect_timeout(ATTEMPT_TIMEOUT)
        .tcp_nodelay(true)
        .tcp_keepalive(Some(KEEP_ALIVE))
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(8 << 20)
        .initial_connection_window_size(16 << 20))
}

/// The last error of the chain says what happened; those above it only that something did.
pub fn root_cause(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
