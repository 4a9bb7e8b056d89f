//! The connection to the coordinator, under every call.
//!
//! In: an address and perhaps a token. Out: a client, or one error when the time to try is up.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBuilder};
use common::wire::{MAX_MESSAGE_BYTES, TOKEN_KEY, bearer};
use proto::v1::coordinator_client::CoordinatorClient;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use crate::{JoinOptions, WorkerError};

pub type Client = CoordinatorClient<InterceptedService<Channel, Bearer>>;

/// One attempt to connect.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two attempts; with jitter twice that. A coordinator that starts anew waits longer for its workers.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// The connection is probed this often and given up when a probe stays unanswered as long again.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// How a client begins in HTTP/2 (RFC 9113, 3.4): these words, then an empty SETTINGS frame. The server's first frame is
/// SETTINGS, too.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
const FRAME_HEADER_BYTES: usize = 9;
const FRAME_TYPE_AT: usize = 3;
const SETTINGS: u8 = 4;

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
    delays(Duration::from_secs(5), attempts)
}

fn delays(longest: Duration, attempts: usize) -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(250))
        .with_max_delay(longest)
        .with_max_times(attempts)
        .with_jitter()
        // Without one of its own every process would draw the same.
        .with_jitter_seed(RandomState::new().hash_one(0))
        .build()
}

/// Connects, trying again until `patience` is over.
pub async fn connect(options: &JoinOptions, patience: Duration) -> Result<Client, WorkerError> {
    let bearer = Bearer(match &options.token {
        Some(token) => Some(bearer(token).parse().map_err(|_| WorkerError::Token)?),
        None => None,
    });
    let endpoint = endpoint(&options.address)?;
    let began = Instant::now();
    let mut delays = delays(LONGEST_PAUSE, usize::MAX);
    let mut countdown = Countdown::default();
    let channel = loop {
        let error = match endpoint.connect().await {
            Ok(channel) => break channel,
            Err(error) => root_cause(&error),
        };
        let left = patience.saturating_sub(began.elapsed());
        let delay = delays.next().unwrap_or(ATTEMPT_TIMEOUT).min(left);
        if left.is_zero() {
            return Err(WorkerError::Unreachable {
                address: options.address.clone(),
                reason: error,
                seconds: patience.as_secs(),
            });
        }
        if let Some(seconds) = countdown.due(left) {
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

/// Tells how long is left, but not at every attempt: each second of the last minute at most once, and before that twice a
/// minute.
#[derive(Default)]
struct Countdown {
    told: Option<u64>,
}

impl Countdown {
    fn due(&mut self, left: Duration) -> Option<u64> {
        // Rounded up, because the first attempts are less than a second apart.
        let seconds = left.as_secs_f64().ceil() as u64;
        let step = if seconds > 60 { 30 } else { 1 };
        let is_due = self.told.is_none_or(|told| told >= seconds + step);
        is_due.then(|| *self.told.insert(seconds))
    }
}

/// Whether a server is there that speaks anything but HTTP/2. Where it hangs up at once, a call fails before it has seen
/// what was said.
pub async fn answers_otherwise(address: &str) -> bool {
    let frame = async {
        let mut stream = tokio::net::TcpStream::connect(address).await?;
        stream.write_all(PREFACE).await?;
        let mut header = [0; FRAME_HEADER_BYTES];
        stream.read_exact(&mut header).await?;
        Ok::<_, std::io::Error>(header)
    };
    match tokio::time::timeout(ATTEMPT_TIMEOUT, frame).await {
        Ok(Ok(header)) => header[FRAME_TYPE_AT] != SETTINGS,
        _ => false,
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_workers_come_back_at_the_same_moments() {
        let pauses = || retry_delays(8).collect::<Vec<_>>();
        assert_ne!(pauses(), pauses());
    }

    #[test]
    fn the_countdown_grows_denser_towards_the_end() {
        let mut countdown = Countdown::default();
        let mut told = Vec::new();
        for milliseconds in (0..120_000).rev().step_by(250) {
            told.extend(countdown.due(Duration::from_millis(milliseconds)));
        }
        assert_eq!(told[..4], [120, 90, 60, 59]);
        assert_eq!((told.len(), told.last()), (2 + 60, Some(&1)));
    }
}
