//! The connection to the coordinator, under every call.
//!
//! In: an address and perhaps a token. Out: a client, or one error when the time to try is up. What is tried in vain is told,
//! at a bounded rate.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use backon::{BackoffBuilder, ExponentialBuilder};
use common::wire::{MAX_MESSAGE_BYTES, TOKEN_KEY, bearer};
use proto::v1::coordinator_client::CoordinatorClient;
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use crate::net::address::AddressError;
use crate::net::resolve::resolve_async;

/// gRPC client of the coordinator's service, which sends the token with every call.
pub type Client = CoordinatorClient<InterceptedService<Channel, Bearer>>;

/// Longest time that one attempt to connect may take.
pub const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
/// Shortest time that an attempt gets, however little is left.
const SHORTEST_ATTEMPT: Duration = Duration::from_millis(500);
/// How long to wait for a TCP connection to one of several addresses.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Time between two log lines on attempts that fail for the same reason; the next constant is for a new reason.
const SAME_REASON_LOG_INTERVAL: Duration = Duration::from_secs(30);
const NEW_REASON_LOG_INTERVAL: Duration = Duration::from_secs(5);
/// Longest pause between two attempts, doubled at most by jitter. A coordinator that starts anew waits as long for its workers.
const LONGEST_CONNECT_PAUSE: Duration = Duration::from_millis(500);
/// The connection is probed this often and given up when a probe stays unanswered as long again.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// What a client sends first in HTTP/2 (RFC 9113, 3.4): these words, then an empty SETTINGS frame. The server's first frame
/// is SETTINGS, too.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
const FRAME_HEADER_BYTES: usize = 9;
const FRAME_TYPE_AT: usize = 3;
const SETTINGS: u8 = 4;

/// Why there is no connection.
#[derive(Debug, Error)]
pub enum ConnectError {
    #[error(transparent)]
    Address(#[from] AddressError),
    #[error("coordinator {address} cannot be reached: {reason} (tried for {seconds} s)")]
    Unreachable {
        address: String,
        reason: String,
        seconds: u64,
    },
    #[error("{address} answers, but is no Muster coordinator")]
    NoCoordinator { address: String },
    #[error("the token contains characters that cannot be sent")]
    Token,
}

/// Adds the token, if there is one, to every call.
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

/// Connects, trying again until `timeout` is over. `is_known`: a coordinator was here before, so that another program in
/// its place is not for long.
pub async fn connect(
    address: &str,
    token: Option<&str>,
    timeout: Duration,
    is_known: bool,
) -> Result<Client, ConnectError> {
    let bearer = Bearer(match token {
        Some(token) => Some(bearer(token).parse().map_err(|_| ConnectError::Token)?),
        None => None,
    });
    let endpoint = endpoint(address)?;
    let began = Instant::now();
    let mut delays = delays(LONGEST_CONNECT_PAUSE, usize::MAX);
    let mut tries = Tries::default();
    let channel = loop {
        let left = timeout.saturating_sub(began.elapsed());
        let limit = left.clamp(SHORTEST_ATTEMPT, ATTEMPT_TIMEOUT);
        let error = match attempt(&endpoint, address, limit).await {
            Ok(channel) => break channel,
            Err(AttemptError::Foreign) if !is_known => {
                let address = address.to_owned();
                return Err(ConnectError::NoCoordinator { address });
            }
            Err(error) => error.to_string(),
        };
        let left = timeout.saturating_sub(began.elapsed());
        let delay = delays.next().unwrap_or(ATTEMPT_TIMEOUT).min(left);
        if left.is_zero() {
            return Err(ConnectError::Unreachable {
                address: address.to_owned(),
                reason: error,
                seconds: timeout.as_secs_f64().round() as u64,
            });
        }
        if let Some(count) = tries.note(Instant::now(), &error) {
            tracing::warn!(
                "no coordinator at {address} yet ({error}): {count}, {:.0} s left",
                left.as_secs_f64().ceil()
            );
        }
        tokio::time::sleep(delay).await;
    };
    Ok(CoordinatorClient::with_interceptor(channel, bearer)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES))
}

/// Why one attempt failed.
#[derive(Debug, Error)]
enum AttemptError {
    #[error("{0}")]
    Failed(String),
    #[error("something listens there, but does not answer")]
    Silent,
    #[error("what answers is no Muster coordinator")]
    Foreign,
}

impl From<std::io::Error> for AttemptError {
    fn from(error: std::io::Error) -> Self {
        // What happened, without the system's number for it.
        match error.raw_os_error() {
            Some(_) if error.kind() != ErrorKind::Other => Self::Failed(error.kind().to_string()),
            _ => Self::Failed(error.to_string()),
        }
    }
}

/// Makes one attempt, which takes no longer than `limit`: the name, a server that speaks HTTP/2, then the connection.
async fn attempt(
    endpoint: &Endpoint,
    address: &str,
    limit: Duration,
) -> Result<Channel, AttemptError> {
    let deadline = tokio::time::Instant::now() + limit;
    let mut failure = AttemptError::Failed("the name has no address".to_owned());
    for address in resolve_async(address.to_owned(), limit).await? {
        let greeted = tokio::time::timeout_at(deadline, greet(address)).await;
        match greeted {
            Ok(Ok(())) => {
                let connected = tokio::time::timeout_at(deadline, endpoint.connect()).await;
                return match connected {
                    Ok(Ok(channel)) => Ok(channel),
                    Ok(Err(error)) => Err(AttemptError::Failed(root_cause(&error))),
                    Err(_) => Err(AttemptError::Silent),
                };
            }
            Ok(Err(error)) => failure = error,
            Err(_) => failure = AttemptError::Silent,
        }
    }
    Err(failure)
}

/// Checks that a server is there that speaks HTTP/2.
///
/// One that accepts and says nothing would be waited for much longer by a call, and one that speaks otherwise and hangs up is
/// seen as a broken connection there.
async fn greet(address: SocketAddr) -> Result<(), AttemptError> {
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await;
    let mut stream = connected.map_err(|_| std::io::Error::from(ErrorKind::TimedOut))??;
    stream.write_all(PREFACE).await?;
    let mut header = [0; FRAME_HEADER_BYTES];
    match stream.read_exact(&mut header).await {
        Ok(_) if header[FRAME_TYPE_AT] == SETTINGS => Ok(()),
        Ok(_) => Err(AttemptError::Foreign),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
            let reason = "it closed the connection at once".to_owned();
            Err(AttemptError::Failed(reason))
        }
        Err(error) => Err(error.into()),
    }
}

/// Counts attempts to connect, and decides which of them are logged: the first, one whose reason is new, and else two a
/// minute.
#[derive(Default)]
struct Tries {
    count: u64,
    told: Option<(Instant, String)>,
}

impl Tries {
    fn note(&mut self, now: Instant, reason: &str) -> Option<String> {
        self.count += 1;
        let is_told = self.told.as_ref().is_some_and(|(at, told)| {
            let pause = match told == reason {
                true => SAME_REASON_LOG_INTERVAL,
                false => NEW_REASON_LOG_INTERVAL,
            };
            now.duration_since(*at) < pause
        });
        if is_told {
            return None;
        }
        self.told = Some((now, reason.to_owned()));
        let tries = if self.count == 1 { "try" } else { "tries" };
        Some(format!("{} {tries}", self.count))
    }
}

fn endpoint(address: &str) -> Result<Endpoint, ConnectError> {
    // What passes the checks of an address is always one of a URI.
    let endpoint = Endpoint::from_shared(format!("http://{address}"));
    let endpoint = endpoint.map_err(|_| AddressError::Coordinator {
        text: address.to_owned(),
        reason: "it cannot be written as a URI",
    })?;
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
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn no_two_workers_come_back_at_the_same_moments() {
        let pauses = || retry_delays(8).collect::<Vec<_>>();
        assert_ne!(pauses(), pauses());
    }

    #[test]
    fn attempts_are_told_at_first_twice_a_minute_and_where_the_reason_changes() {
        let began = Instant::now();
        let mut tries = Tries::default();
        let mut told = Vec::new();
        for seconds in 0..100 {
            let reason = match seconds {
                50.. => "timed out",
                _ => "connection refused",
            };
            let now = began + Duration::from_secs(seconds);
            told.extend(tries.note(now, reason).map(|count| (seconds, count)));
        }
        let expected = [
            (0, "1 try"),
            (30, "31 tries"),
            (50, "51 tries"),
            (80, "81 tries"),
        ];
        assert_eq!(told, expected.map(|(at, count)| (at, count.to_owned())));
    }

    #[tokio::test]
    async fn a_server_that_accepts_and_says_nothing_is_given_up_in_time() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let timeout = Duration::from_millis(300);
        let error = connect(&address, None, timeout, false).await.unwrap_err();
        let said = error.to_string();
        assert!(said.contains("does not answer"), "{said}");
        assert!(said.contains(&address), "{said}");
    }
}
