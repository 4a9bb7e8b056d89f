//! The mesh: one TCP connection between any two members of a generation.
//!
//! The higher rank connects to the lower one and both say Hello. A wrong run, generation or rank is refused; a Hello
//! of a generation that has not begun here yet waits for it. Every read and write ends when the generation does
//! ([`Fence`]), when the peer falls silent for too long, or when its connection breaks.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::fence::{Fence, TICK};
use super::frame::{FrameHeader, FrameKind, Hello, checksum};
use super::listener::{HELLO_TIMEOUT, Listener, read_hello};
use super::{CollectiveError, Membership, PeerAddress, lock};

/// How long a peer may take to open a transfer: it may have a slot in hand. Whether it lives at all is noticed sooner,
/// by the coordinator and by its machine's end of the connection.
const OPENING_PATIENCE: Duration = Duration::from_secs(600);

/// The connected members of one generation.
pub struct Mesh {
    pub(super) membership: Membership,
    pub(super) fence: Arc<Fence>,
    /// By rank; none at our own.
    peers: Vec<Option<Peer>>,
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
        fence: Arc<Fence>,
    ) -> Result<Self, CollectiveError> {
        let deadline = Instant::now() + membership.silence;
        let peers: Vec<Result<Option<Peer>, CollectiveError>> = std::thread::scope(|scope| {
            let connecting: Vec<_> = (0..membership.members.len() as u32)
                .map(|rank| {
                    let fence = &fence;
                    scope.spawn(move || -> Result<Option<Peer>, CollectiveError> {
                        let stream = match rank.cmp(&membership.rank) {
                            std::cmp::Ordering::Less => call(membership, rank, deadline, fence)?,
                            std::cmp::Ordering::Equal => return Ok(None),
                            std::cmp::Ordering::Greater => {
                                answer(listener, membership, rank, deadline, fence)?
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
            fence,
            peers: peers.into_iter().collect::<Result<_, _>>()?,
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
        Ok(Half {
            mesh: self,
            rank,
            stream: &peer.stream,
            _held: lock(mutex(peer)),
        })
    }
}

impl Peer {
    fn new(stream: TcpStream, silence: Duration) -> std::io::Result<Self> {
        // Buffer sizes are left to the kernel, which grows them with the traffic; setting them would stop that.
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TICK))?;
        stream.set_write_timeout(Some(TICK))?;
        notice_a_cut(&stream, silence)?;
        Ok(Self {
            stream,
            reading: Mutex::new(()),
            writing: Mutex::new(()),
        })
    }
}

/// Has the system break the connection where the other machine does not acknowledge what is sent, or is not there to
/// be asked, for so long. A stopped process is no such case: its machine answers for it.
fn notice_a_cut(stream: &TcpStream, silence: Duration) -> std::io::Result<()> {
    let probe = (silence / 3).max(Duration::from_secs(1));
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(probe)
        .with_interval(probe)
        .with_retries(2);
    let socket = socket2::SockRef::from(stream);
    socket.set_tcp_keepalive(&keepalive)?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(silence))?;
    Ok(())
}

/// Connects to a lower rank and waits until it answers: it does so when the generation has begun there too.
fn call(
    membership: &Membership,
    rank: u32,
    deadline: Instant,
    fence: &Fence,
) -> Result<TcpStream, CollectiveError> {
    let peer = &membership.members[rank as usize];
    let mut pause = Duration::from_millis(20);
    loop {
        let reason = match try_call(membership, rank, peer, deadline, fence) {
            Ok(stream) => return Ok(stream),
            Err(e) => e,
        };
        fence.check()?;
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
    fence: &Fence,
) -> std::io::Result<TcpStream> {
    let mut failure = std::io::Error::new(ErrorKind::NotFound, "the name has no address");
    let mut connected = None;
    for address in peer.address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, HELLO_TIMEOUT.min(membership.silence)) {
            Ok(stream) => {
                connected = Some(stream);
                break;
            }
            Err(e) => failure = e,
        }
    }
    let stream = connected.ok_or(failure)?;
    let hello = Hello {
        run_id: membership.run_id,
        generation: membership.generation,
        from: membership.rank,
        to: rank,
    };
    stream.set_nodelay(true)?;
    (&stream).write_all(&hello.encode())?;
    await_answer(&stream, &hello, deadline, fence)?;
    Ok(stream)
}

/// Waits in short reads, because the generation may end before it has begun over there.
fn await_answer(
    stream: &TcpStream,
    hello: &Hello,
    deadline: Instant,
    fence: &Fence,
) -> std::io::Result<()> {
    stream.set_read_timeout(Some(TICK))?;
    while fence.check().is_ok() && Instant::now() < deadline {
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
    fence: &Fence,
) -> Result<TcpStream, CollectiveError> {
    let hello = Hello {
        run_id: membership.run_id,
        generation: membership.generation,
        from: membership.rank,
        to: rank,
    };
    loop {
        let stream = listener.take(membership, rank, deadline, fence)?;
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

fn is_tick(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
    )
}

/// One direction of one connection, held by one thread.
pub(super) struct Half<'a> {
    mesh: &'a Mesh,
    rank: u32,
    stream: &'a TcpStream,
    _held: std::sync::MutexGuard<'a, ()>,
}

impl Half<'_> {
    pub fn send(
        &mut self,
        kind: FrameKind,
        index: usize,
        payload: &[u8],
    ) -> Result<(), CollectiveError> {
        let header = FrameHeader::of(kind, index, payload).encode();
        self.write_all(&header)?;
        self.write_all(payload)
    }

    /// Receives the frame that is due into `payload`, whose length it must have.
    pub fn receive(
        &mut self,
        kind: FrameKind,
        index: usize,
        payload: &mut [u8],
    ) -> Result<(), CollectiveError> {
        let header = self.receive_header(kind, index, Some(payload.len()))?;
        self.receive_payload(&header, payload)
    }

    /// Receives the frame that is due, whatever its length within the bound.
    pub fn receive_any_length(
        &mut self,
        kind: FrameKind,
        index: usize,
    ) -> Result<Vec<u8>, CollectiveError> {
        let header = self.receive_header(kind, index, None)?;
        let mut payload = vec![0; header.length as usize];
        self.receive_payload(&header, &mut payload)?;
        Ok(payload)
    }

    fn receive_header(
        &mut self,
        kind: FrameKind,
        index: usize,
        length: Option<usize>,
    ) -> Result<FrameHeader, CollectiveError> {
        let mut bytes = [0; super::frame::HEADER_BYTES];
        // Frames of unknown length open a transfer: the peer may have to finish what it is at.
        let patience = match length {
            Some(_) => self.mesh.membership.silence,
            None => OPENING_PATIENCE,
        };
        self.read_exact(&mut bytes, patience)?;
        let header = FrameHeader::decode(&bytes);
        match header.fault(kind, index, length) {
            Some(fault) => Err(self.error(&fault)),
            None => Ok(header),
        }
    }

    fn receive_payload(
        &mut self,
        header: &FrameHeader,
        payload: &mut [u8],
    ) -> Result<(), CollectiveError> {
        self.read_exact(payload, self.mesh.membership.silence)?;
        match checksum(payload) == header.checksum {
            true => Ok(()),
            false => Err(self.error("sent a damaged frame (its checksum does not hold)")),
        }
    }

    pub fn error(&self, reason: &str) -> CollectiveError {
        self.mesh.membership.blame(self.rank, reason)
    }

    fn read_exact(
        &mut self,
        mut buffer: &mut [u8],
        mut patience: Duration,
    ) -> Result<(), CollectiveError> {
        let mut last_progress = Instant::now();
        while !buffer.is_empty() {
            match (&mut &*self.stream).read(buffer) {
                Ok(0) => return Err(self.error("closed the connection")),
                Ok(count) => {
                    buffer = &mut buffer[count..];
                    last_progress = Instant::now();
                    patience = self.mesh.membership.silence;
                }
                Err(e) => self.after_failure(&e, last_progress, patience)?,
            }
        }
        self.mesh.fence.check()
    }

    fn write_all(&mut self, mut buffer: &[u8]) -> Result<(), CollectiveError> {
        let mut last_progress = Instant::now();
        let patience = self.mesh.membership.silence;
        while !buffer.is_empty() {
            match (&mut &*self.stream).write(buffer) {
                Ok(0) => return Err(self.error("closed the connection")),
                Ok(count) => {
                    buffer = &buffer[count..];
                    last_progress = Instant::now();
                }
                Err(e) => self.after_failure(&e, last_progress, patience)?,
            }
        }
        self.mesh.fence.check()
    }

    /// Goes on after a tick, unless the generation is over or the peer silent for too long.
    fn after_failure(
        &self,
        error: &std::io::Error,
        last_progress: Instant,
        patience: Duration,
    ) -> Result<(), CollectiveError> {
        self.mesh.fence.check()?;
        if !is_tick(error) {
            return Err(self.error(&error.to_string()));
        }
        match last_progress.elapsed() < patience {
            true => Ok(()),
            false => {
                let seconds = patience.as_secs_f64();
                Err(self.error(&format!("was silent for {seconds:.1} s")))
            }
        }
    }
}
