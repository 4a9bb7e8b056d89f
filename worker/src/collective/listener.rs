//! The port that peers call, open for a worker's whole life.
//!
//! In: connections from anyone. Out: those that said a valid Hello, each when its generation has begun here. Callers of
//! older generations and terms and everything else are turned away. Who opens a feed or asks for a file is served at once,
//! whatever the generation, and who only tries whether this worker is here is answered.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use socket2::SockRef;

use super::feed::Feeds;
use super::files::SharedFiles;
use super::generation_token::{GENERATION_CHECK_INTERVAL, GenerationToken};
use super::greeting::{FeedHello, FileHello, HELLO_BYTES, Hello, ProbeHello};
use super::link::unpace;
use super::lock::lock;
use super::{CollectiveError, Membership};

/// How long a caller may take to say Hello.
pub(super) const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// Time between two log lines on connections that cannot be accepted.
const ACCEPT_LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Connections that may wait at a time, to say Hello or for their generation to begin.
const MAX_WAITING_CALLERS: usize = 256;

/// The port that peers connect to, and the connections whose generation has yet to begin here.
pub struct Listener {
    address: SocketAddr,
    shared: Arc<Waiting>,
}

struct Waiting {
    feeds: Arc<Feeds>,
    files: Arc<SharedFiles>,
    /// The run that this worker is in, and its number there; it answers probes and sends files as that one.
    identity: Mutex<Option<([u8; 32], u64)>>,
    stopped: AtomicBool,
    /// Number of connections that say Hello, are fed or get a file.
    greeting: AtomicUsize,
    callers: Mutex<Callers>,
    arrived: Condvar,
}

#[derive(Default)]
struct Callers {
    /// The run of this generation. Its callers of older generations are turned away; those of other runs wait, because one may
    /// be of the next term, which has not begun here yet.
    run_id: [u8; 32],
    generation: u64,
    streams: HashMap<Key, (Hello, TcpStream)>,
}

/// Run, generation and rank of a caller.
type Key = ([u8; 32], u64, u32);

impl Callers {
    fn is_over(&self, run_id: [u8; 32], generation: u64) -> bool {
        run_id == self.run_id && generation < self.generation
    }
}

impl Listener {
    /// Listens on a port of `host`; on a free one where `port` is 0.
    pub fn bind(
        host: IpAddr,
        port: u16,
        feeds: Arc<Feeds>,
        files: Arc<SharedFiles>,
    ) -> Result<Self, CollectiveError> {
        let failed = |e: std::io::Error| match e.kind() {
            ErrorKind::AddrInUse if port != 0 => CollectiveError::PortInUse { port },
            _ => CollectiveError::Listen {
                host,
                reason: e.to_string(),
            },
        };
        let listener = TcpListener::bind((host, port)).map_err(failed)?;
        unpace(&SockRef::from(&listener));
        let address = listener.local_addr().map_err(failed)?;
        let shared = Arc::new(Waiting {
            feeds,
            files,
            identity: Mutex::default(),
            stopped: AtomicBool::default(),
            greeting: AtomicUsize::default(),
            callers: Mutex::default(),
            arrived: Condvar::new(),
        });
        let accepting = shared.clone();
        std::thread::spawn(move || accepting.accept(&listener));
        Ok(Self { address, shared })
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Sets the run and the number with which this worker answers probes, and whoever asks for a file, from now on.
    pub fn identify(&self, run_id: [u8; 32], worker: u64) {
        *lock(&self.shared.identity) = Some((run_id, worker));
    }

    /// Begins a generation: callers of earlier ones, and of what ran before, are turned away from now on.
    pub(super) fn begin(&self, membership: &Membership) {
        let (run_id, generation) = (membership.run_id, membership.generation);
        let mut callers = lock(&self.shared.callers);
        if callers.is_over(run_id, generation) {
            return;
        }
        (callers.run_id, callers.generation) = (run_id, generation);
        callers
            .streams
            .retain(|key, _| key.0 == run_id && key.1 >= generation);
    }

    /// Takes the connection of `rank` in this generation, once it has called.
    pub(super) fn take(
        &self,
        membership: &Membership,
        rank: u32,
        deadline: Instant,
        token: &GenerationToken,
    ) -> Result<TcpStream, CollectiveError> {
        let key = (membership.run_id, membership.generation, rank);
        let mut callers = lock(&self.shared.callers);
        loop {
            token.check()?;
            if let Some((hello, stream)) = callers.streams.remove(&key)
                && hello.to == membership.rank
            {
                return Ok(stream);
            }
            if Instant::now() >= deadline {
                return Err(membership.blame(rank, "did not connect in time"));
            }
            callers = self
                .shared
                .arrived
                .wait_timeout(callers, GENERATION_CHECK_INTERVAL)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        // Wakes the accepting thread, which then sees that it is over.
        let host = match self.address.ip() {
            ip if !ip.is_unspecified() => ip,
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
        };
        let _ = TcpStream::connect_timeout(
            &SocketAddr::new(host, self.port()),
            GENERATION_CHECK_INTERVAL,
        );
    }
}

impl Waiting {
    fn accept(self: Arc<Self>, listener: &TcpListener) {
        let mut told: Option<Instant> = None;
        loop {
            let accepted = listener.accept();
            if self.stopped.load(Ordering::SeqCst) {
                return;
            }
            match accepted {
                Ok((stream, from)) => self.spawn_greeting(stream, from),
                // A caller that went away, or no descriptor free: neither is the listener's end.
                Err(e) => {
                    let is_due = told.is_none_or(|told| told.elapsed() >= ACCEPT_LOG_INTERVAL);
                    if is_due && !is_of_the_caller(&e) {
                        told = Some(Instant::now());
                        tracing::warn!(
                            "no other worker can connect here ({e}): trying on; where too many files are open, raise the \
                             limit (`ulimit -n`)"
                        );
                    }
                    std::thread::sleep(GENERATION_CHECK_INTERVAL);
                }
            }
        }
    }

    /// Greets a caller on a thread of its own, so that one who says nothing delays nobody else.
    fn spawn_greeting(self: &Arc<Self>, stream: TcpStream, from: SocketAddr) {
        if self.greeting.fetch_add(1, Ordering::SeqCst) >= MAX_WAITING_CALLERS {
            self.greeting.fetch_sub(1, Ordering::SeqCst);
            return;
        }
        let shared = self.clone();
        std::thread::spawn(move || {
            if shared.greet(stream).is_none() {
                tracing::debug!("turned {from} away: no valid hello");
            }
            shared.greeting.fetch_sub(1, Ordering::SeqCst);
        });
    }

    /// Reads a caller's Hello and keeps its connection for the generation that it names, or serves the feed.
    fn greet(&self, stream: TcpStream) -> Option<()> {
        let bytes = read_greeting(&stream, Instant::now() + HELLO_TIMEOUT).ok()?;
        if let Some(hello) = FeedHello::decode(&bytes) {
            if let Err(reason) = self.feeds.serve(&stream, &hello) {
                tracing::debug!("the feed of worker {} broke off: it {reason}", hello.worker);
            }
            return Some(());
        }
        if let Some(hello) = FileHello::decode(&bytes) {
            let own = (*lock(&self.identity))?;
            if own != (hello.run_id, hello.to) {
                return None;
            }
            if let Err(reason) = self.files.serve(&stream) {
                tracing::debug!(
                    "sending a file to worker {} broke off: it {reason}",
                    hello.from
                );
            }
            return Some(());
        }
        if let Some(hello) = ProbeHello::decode(&bytes) {
            let (run_id, worker) = (*lock(&self.identity))?;
            let answer = ProbeHello {
                run_id,
                ..hello.answered_by(worker)
            };
            return (&stream).write_all(&answer.encode()).ok();
        }
        let hello = Hello::decode(&bytes)?;
        let mut callers = lock(&self.callers);
        let is_over = callers.is_over(hello.run_id, hello.generation);
        if is_over || callers.streams.len() >= MAX_WAITING_CALLERS {
            return None;
        }
        let key = (hello.run_id, hello.generation, hello.from);
        callers.streams.insert(key, (hello, stream));
        self.arrived.notify_all();
        Some(())
    }
}

fn is_of_the_caller(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset | ErrorKind::Interrupted
    )
}

pub(super) fn read_hello(stream: &TcpStream, deadline: Instant) -> std::io::Result<Hello> {
    let bytes = read_greeting(stream, deadline)?;
    Hello::decode(&bytes).ok_or_else(|| ErrorKind::InvalidData.into())
}

pub(super) fn read_greeting(
    stream: &TcpStream,
    deadline: Instant,
) -> std::io::Result<[u8; HELLO_BYTES]> {
    let mut bytes = [0; HELLO_BYTES];
    let mut filled = 0;
    while filled < HELLO_BYTES {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match (&mut &*stream).read(&mut bytes[filled..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(bytes)
}
