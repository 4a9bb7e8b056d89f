//! The mesh: one TCP connection between any two members of a generation.
//!
//! The higher rank connects to the lower one and both say Hello. A wrong run, generation or rank is refused; a Hello
//! of a generation that has not begun here yet waits for it. Every read and write ends when the generation does
//! ([`GenerationToken`]), when the peer falls silent for too long, or when its connection breaks.

use std::io::{ErrorKind, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::buffers::Buffers;
use super::frame::{FrameHeader, FrameKind};
use super::generation_token::{GENERATION_CHECK_INTERVAL, GenerationToken};
use super::greeting::Hello;
use super::link::{self, Link, LinkError, is_tick};
use super::listener::{HELLO_TIMEOUT, Listener, read_hello};
use super::lock::lock;
use super::{CollectiveError, Membership, PeerAddress};

/// The connected members of one generation.
pub struct Mesh {
    pub(super) membership: Membership,
    pub(super) token: Arc<GenerationToken>,
    /// Connections by rank; none at our own.
    peers: Vec<Option<Peer>>,
    pub(super) buffers: Buffers,
}

/// The connection to one peer. Reading and writing go on at the same time, each under its own lock, so that state and
/// gradients never interleave.
struct Peer {
    stream: TcpStream,
    reading: Mutex<()>,
    writing: Mutex<()>,
}

impl Mesh {
    /// Connects to all other members, or names the one that cannot be reached.
    pub fn form(
        listener: &Listener,
        membership: &Membership,
        token: Arc<GenerationToken>,
    ) -> Result<Self, CollectiveError> {
        let deadline = Instant::now() + membership.silence;
        let peers: Vec<Result<Option<Peer>, CollectiveError>> = std::thread::scope(|scope| {
            let connecting: Vec<_> = (0..membership.members.len() as u32)
                .map(|rank| {
                    let token = &token;
                    scope.spawn(move || -> Result<Option<Peer>, CollectiveError> {
                        let stream = match rank.cmp(&membership.rank) {
                            std::cmp::Ordering::Less => call(membership, rank, deadline, token)?,
                            std::cmp::Ordering::Equal => return Ok(None),
                            std::cmp::Ordering::Greater => {
                                answer(listener, membership, rank, deadline, token)?
                            }
                        };
                        Peer::new(stream, membership.silence)
                            .map(Some)
                            .map_err(|e| membership.blame(rank, &e.to_string()))
                    })
                })
                .collect();
            connecting
                .into_iter()
                .map(|thread| thread.join().unwrap_or(Err(CollectiveError::Superseded)))
                .collect()
        });
        Ok(Self {
            membership: membership.clone(),
            token,
            peers: peers.into_iter().collect::<Result<_, _>>()?,
            buffers: Buffers::default(),
        })
    }

    pub fn rank(&self) -> u32 {
        self.membership.rank
    }

    pub fn size(&self) -> usize {
        self.membership.members.len()
    }

    /// Holds the sending half of the connection to `rank`.
    pub(super) fn sender(&self, rank: u32) -> Result<Half<'_>, CollectiveError> {
        self.half(rank, |peer| &peer.writing)
    }

    /// Holds the receiving half of the connection to `rank`.
    pub(super) fn receiver(&self, rank: u32) -> Result<Half<'_>, CollectiveError> {
        self.half(rank, |peer| &peer.reading)
    }

    fn half<'a>(
        &'a self,
        rank: u32,
        mutex: impl Fn(&'a Peer) -> &'a Mutex<()>,
    ) -> Result<Half<'a>, CollectiveError> {
        let peer = self
            .peers
            .get(rank as usize)
            .and_then(Option::as_ref)
            .ok_or_else(|| self.membership.blame(rank, "is not a peer of this worker"))?;
        let held = lock(mutex(peer));
        Ok(Half {
            mesh: self,
            rank,
            link: Link::new(&peer.stream, &self.token, self.membership.silence),
            _held: held,
        })
    }
}

impl Peer {
    fn new(stream: TcpStream, silence: Duration) -> std::io::Result<Self> {
        link::prepare(&stream, silence)?;
        Ok(Self {
            stream,
            reading: Mutex::new(()),
            writing: Mutex::new(()),
        })
    }
}

/// Connects to a lower rank and waits until it answers: it does so when the generation has begun there too.
fn call(
    membership: &Membership,
    rank: u32,
    deadline: Instant,
    token: &GenerationToken,
) -> Result<TcpStream, CollectiveError> {
    let peer = &membership.members[rank as usize];
    let mut pause = Duration::from_millis(20);
    loop {
        let reason = match try_call(membership, rank, peer, deadline, token) {
            Ok(stream) => return Ok(stream),
            Err(e) => e,
        };
        token.check()?;
        if Instant::now() + pause >= deadline {
            let mut reason = format!("cannot be reached at {}: {reason}", peer.address);
            if is_loopback(peer) && !is_loopback(&membership.members[membership.rank as usize]) {
                reason += "; it joined the coordinator over the loopback, let it join by a name that we can reach too";
            }
            return Err(membership.blame(rank, &reason));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(500));
    }
}

fn try_call(
    membership: &Membership,
    rank: u32,
    peer: &PeerAddress,
    deadline: Instant,
    token: &GenerationToken,
) -> std::io::Result<TcpStream> {
    let stream = link::connect(&peer.address, HELLO_TIMEOUT.min(membership.silence))?;
    let hello = Hello {
        run_id: membership.run_id,
        generation: membership.generation,
        from: membership.rank,
        to: rank,
    };
    (&stream).write_all(&hello.encode())?;
    await_answer(&stream, &hello, deadline, token)?;
    Ok(stream)
}

/// Waits for a peer's Hello in short reads, because the generation may end before it has begun over there.
fn await_answer(
    stream: &TcpStream,
    hello: &Hello,
    deadline: Instant,
    token: &GenerationToken,
) -> std::io::Result<()> {
    stream.set_read_timeout(Some(GENERATION_CHECK_INTERVAL))?;
    while token.check().is_ok() && Instant::now() < deadline {
        match stream.peek(&mut [0]) {
            Ok(0) => return Err(ErrorKind::ConnectionAborted.into()),
            Ok(_) => {
                let answer = read_hello(stream, Instant::now() + HELLO_TIMEOUT)?;
                let expected = Hello {
                    from: hello.to,
                    to: hello.from,
                    ..*hello
                };
                return match answer == expected {
                    true => Ok(()),
                    false => Err(ErrorKind::InvalidData.into()),
                };
            }
            Err(e) if is_tick(&e) => {}
            Err(e) => return Err(e),
        }
    }
    Err(ErrorKind::TimedOut.into())
}

/// Takes the call of a higher rank and answers it.
fn answer(
    listener: &Listener,
    membership: &Membership,
    rank: u32,
    deadline: Instant,
    token: &GenerationToken,
) -> Result<TcpStream, CollectiveError> {
    let hello = Hello {
        run_id: membership.run_id,
        generation: membership.generation,
        from: membership.rank,
        to: rank,
    };
    loop {
        let stream = listener.take(membership, rank, deadline, token)?;
        // A caller that gave up in between calls again.
        if (&stream).write_all(&hello.encode()).is_ok() {
            return Ok(stream);
        }
    }
}

fn is_loopback(peer: &PeerAddress) -> bool {
    let address = peer.address.parse::<std::net::SocketAddr>();
    address.is_ok_and(|address| address.ip().is_loopback())
}

/// One direction of one connection, held by one thread.
pub(super) struct Half<'a> {
    mesh: &'a Mesh,
    rank: u32,
    link: Link<'a>,
    _held: std::sync::MutexGuard<'a, ()>,
}

impl Half<'_> {
    pub fn send(
        &mut self,
        kind: FrameKind,
        index: usize,
        payload: &[u8],
    ) -> Result<(), CollectiveError> {
        let sent = self.link.send(kind, index, payload);
        sent.map_err(|error| self.blame(error))
    }

    /// Sends a frame whose payload's checksum is known.
    pub fn send_summed(
        &mut self,
        kind: FrameKind,
        index: usize,
        payload: &[u8],
        checksum: u64,
    ) -> Result<(), CollectiveError> {
        let sent = self.link.send_summed(kind, index, payload, checksum);
        sent.map_err(|error| self.blame(error))
    }

    /// Receives the frame that is due into `payload`, whose length it must have.
    pub fn receive(
        &mut self,
        kind: FrameKind,
        index: usize,
        payload: &mut [u8],
    ) -> Result<(), CollectiveError> {
        let received = self.link.receive(kind, index, payload);
        received.map_err(|error| self.blame(error))
    }

    /// Waits until the peer sends something or its connection ends, or until `enough`.
    pub fn wait_for_bytes(&mut self, enough: impl Fn() -> bool) -> Result<(), CollectiveError> {
        let waited = self.link.wait_for_bytes(enough);
        waited.map_err(|error| self.blame(error))
    }

    /// Receives the header of whatever comes next; its payload must be received with one of the `receive_due` methods.
    pub fn receive_header(&mut self) -> Result<FrameHeader, CollectiveError> {
        let received = self.link.receive_header();
        received.map_err(|error| self.blame(error))
    }

    /// Receives the payload of a frame that must be the one that is due.
    pub fn receive_due(
        &mut self,
        header: &FrameHeader,
        kind: FrameKind,
        index: usize,
        payload: &mut [u8],
    ) -> Result<(), CollectiveError> {
        let received = self.link.receive_due(header, kind, index, payload);
        received.map_err(|error| self.blame(error))
    }

    /// Receives the payload of a frame that must be the one that is due. Returns its length, which may be less than `payload`'s.
    pub fn receive_due_up_to(
        &mut self,
        header: &FrameHeader,
        kind: FrameKind,
        index: usize,
        payload: &mut [u8],
    ) -> Result<usize, CollectiveError> {
        let received = self.link.receive_due_up_to(header, kind, index, payload);
        received.map_err(|error| self.blame(error))
    }

    /// Receives the frame that is due, whatever its length within the bound.
    pub fn receive_any_length(
        &mut self,
        kind: FrameKind,
        index: usize,
    ) -> Result<Vec<u8>, CollectiveError> {
        let received = self.link.receive_any_length(kind, index);
        received.map_err(|error| self.blame(error))
    }

    pub fn error(&self, reason: &str) -> CollectiveError {
        self.mesh.membership.blame(self.rank, reason)
    }

    fn blame(&self, error: LinkError) -> CollectiveError {
        match error {
            LinkError::Closed => CollectiveError::Superseded,
            LinkError::Broken(reason) => self.error(&reason),
        }
    }
}
