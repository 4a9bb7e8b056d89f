//! Frames over one TCP connection, for the mesh and for feeds.
//!
//! Everything read is bounded and carries a checksum. Every wait ends when the token closes, when the peer moves nothing
//! for too long, or when the connection breaks.

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};

use super::frame::{FrameHeader, FrameKind, HEADER_BYTES, checksum};
use super::generation_token::{GENERATION_CHECK_INTERVAL, GenerationToken};
use crate::net::resolve::resolve;

/// How long a peer may take to open a transfer: it may have a slot in hand. Whether it lives at all is noticed sooner,
/// by the coordinator and by its machine's end of the connection.
const OPENING_PATIENCE: Duration = Duration::from_secs(600);

/// How long the name of a peer may take to be resolved.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes of the buffer at each end of a connection within this machine. Linux takes twice as much, for what it keeps beside
/// the data, and no more than `net.core.rmem_max` and `wmem_max` allow.
#[cfg(target_os = "linux")]
const BUFFER_BYTES_WITHIN: usize = 512 << 10;

/// Why a connection is of no more use.
#[derive(Debug)]
pub(super) enum LinkError {
    /// The generation is over.
    Closed,
    /// What the peer did, as a sentence without its subject.
    Broken(String),
}

/// Connects to `HOST:PORT`, whichever of its addresses answers.
pub(super) fn connect(address: &str, timeout: Duration) -> std::io::Result<TcpStream> {
    let mut failure = std::io::Error::new(ErrorKind::NotFound, "the name has no address");
    let deadline = Instant::now() + timeout;
    for address in resolve(address, timeout.min(RESOLVE_TIMEOUT))? {
        let left = deadline.saturating_duration_since(Instant::now());
        // The system takes no time-out of nothing.
        match connect_to(address, left.max(GENERATION_CHECK_INTERVAL)) {
            Ok(stream) => return Ok(stream),
            Err(e) => failure = e,
        }
    }
    Err(failure)
}

fn connect_to(address: SocketAddr, timeout: Duration) -> std::io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    unpace(&socket);
    socket.connect_timeout(&address.into(), timeout)?;
    socket.set_tcp_nodelay(true)?;
    Ok(socket.into())
}

/// Turns pacing off for a socket, before it listens or connects.
///
/// A connection that was paced once stays so, whatever its algorithm. [`prepare`] gives it the system's again where it leaves
/// this machine.
pub(super) fn unpace(socket: &Socket) {
    // Without it, connections within this machine are slower.
    #[cfg(target_os = "linux")]
    let _ = socket.set_tcp_congestion(b"reno");
}

/// Sets a connection up for a [`Link`].
pub(super) fn prepare(stream: &TcpStream, silence: Duration) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(GENERATION_CHECK_INTERVAL))?;
    stream.set_write_timeout(Some(GENERATION_CHECK_INTERVAL))?;
    #[cfg(target_os = "linux")]
    if within_this_machine(stream)? {
        // What is on its way is to stay within a cache. Elsewhere sizes are left to the kernel, which grows them with the
        // traffic; setting them would stop that.
        let socket = SockRef::from(stream);
        socket.set_send_buffer_size(BUFFER_BYTES_WITHIN)?;
        socket.set_recv_buffer_size(BUFFER_BYTES_WITHIN)?;
    } else {
        // Nothing is congested within it, and the algorithms that pace what they send (BBR) halve its speed.
        // Where the system does not let anybody choose, nothing was chosen.
        let unused = Socket::new(Domain::IPV4, Type::STREAM, None);
        if let Ok(usual) = unused.and_then(|unused| unused.tcp_congestion()) {
            let _ = SockRef::from(stream).set_tcp_congestion(&usual);
        }
    }
    notice_a_cut(stream, silence)
}

/// Returns whether both ends are at one address, as over the loopback.
#[cfg(target_os = "linux")]
fn within_this_machine(stream: &TcpStream) -> std::io::Result<bool> {
    Ok(stream.local_addr()?.ip() == stream.peer_addr()?.ip())
}

/// Has the system break the connection when the other machine does not acknowledge data, or keep-alive probes, for so long.
///
/// Where a process reads nothing its machine answers for it, but on Linux only as long as it has room: a connection that was
/// filled and then takes nothing for so long is broken too, as [`Link::write_all`] would.
fn notice_a_cut(stream: &TcpStream, silence: Duration) -> std::io::Result<()> {
    let probe = (silence / 3).max(Duration::from_secs(1));
    let keepalive = TcpKeepalive::new()
        .with_time(probe)
        .with_interval(probe)
        .with_retries(2);
    let socket = SockRef::from(stream);
    socket.set_tcp_keepalive(&keepalive)?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(silence))?;
    Ok(())
}

/// Returns whether a read or write only ran into its time-out.
pub(super) fn is_tick(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
    )
}

/// One connection as one thread uses it.
pub(super) struct Link<'a> {
    stream: &'a TcpStream,
    token: &'a GenerationToken,
    silence: Duration,
}

impl<'a> Link<'a> {
    /// Uses a stream that has been through [`prepare`].
    pub fn new(stream: &'a TcpStream, token: &'a GenerationToken, silence: Duration) -> Self {
        Self {
            stream,
            token,
            silence,
        }
    }

    pub fn send(&self, kind: FrameKind, index: usize, payload: &[u8]) -> Result<(), LinkError> {
        self.send_summed(kind, index, payload, checksum(payload))
    }

    /// Sends a frame whose payload's checksum is known.
    pub fn send_summed(
        &self,
        kind: FrameKind,
        index: usize,
        payload: &[u8],
        checksum: u64,
    ) -> Result<(), LinkError> {
        let header = FrameHeader::summed(kind, index, payload, checksum).encode();
        self.check_fence()?;
        // Both in one packet, as a rule.
        let both = [IoSlice::new(&header), IoSlice::new(payload)];
        let begun = match (&mut &*self.stream).write_vectored(&both) {
            Ok(count) => count,
            Err(e) if is_tick(&e) => 0,
            Err(e) => return Err(broken(&e.to_string())),
        };
        self.write_all(&header[begun.min(HEADER_BYTES)..])?;
        self.write_all(&payload[begun.saturating_sub(HEADER_BYTES)..])
    }

    /// Receives the frame that is due into `payload`, whose length it must have.
    pub fn receive(
        &self,
        kind: FrameKind,
        index: usize,
        payload: &mut [u8],
    ) -> Result<(), LinkError> {
        let header = self.receive_header()?;
        self.receive_due(&header, kind, index, payload)
    }

    /// Receives the frame that is due, whatever its length within the bound.
    ///
    /// Such a frame opens a transfer: the peer may have to finish first what it is at.
    pub fn receive_any_length(&self, kind: FrameKind, index: usize) -> Result<Vec<u8>, LinkError> {
        let header = self.receive_header_within(OPENING_PATIENCE)?;
        self.receive_due_any_length(&header, kind, index)
    }

    /// Receives the payload of a frame that must be the one that is due, whatever its length within the bound.
    pub fn receive_due_any_length(
        &self,
        header: &FrameHeader,
        kind: FrameKind,
        index: usize,
    ) -> Result<Vec<u8>, LinkError> {
        check(header, kind, index, None)?;
        let mut payload = vec![0; header.length as usize];
        self.receive_payload(header, &mut payload)?;
        Ok(payload)
    }

    /// Waits until the peer sends something or its connection ends, or until `enough`. Meanwhile it may be silent.
    pub fn wait_for_bytes(&self, enough: impl Fn() -> bool) -> Result<(), LinkError> {
        while !enough() {
            match self.stream.peek(&mut [0]) {
                // The end is for whoever reads on.
                Ok(_) => break,
                Err(e) => self.after_failure(&e, Instant::now(), self.silence)?,
            }
        }
        self.check_fence()
    }

    /// Receives the header of whatever comes next; its payload must be received with one of the `receive_due` methods.
    pub fn receive_header(&self) -> Result<FrameHeader, LinkError> {
        self.receive_header_within(self.silence)
    }

    fn receive_header_within(&self, timeout: Duration) -> Result<FrameHeader, LinkError> {
        let mut bytes = [0; HEADER_BYTES];
        self.read_exact(&mut bytes, timeout)?;
        Ok(FrameHeader::decode(&bytes))
    }

    /// Receives the payload of a frame that must be the one that is due.
    pub fn receive_due(
        &self,
        header: &FrameHeader,
        kind: FrameKind,
        index: usize,
        payload: &mut [u8],
    ) -> Result<(), LinkError> {
        check(header, kind, index, Some(payload.len()))?;
        self.receive_payload(header, payload)
    }

    /// Receives the payload of a frame that must be the one that is due. Returns its length, which may be less than `payload`'s.
    pub fn receive_due_up_to(
        &self,
        header: &FrameHeader,
        kind: FrameKind,
        index: usize,
        payload: &mut [u8],
    ) -> Result<usize, LinkError> {
        check(header, kind, index, None)?;
        let (length, limit) = (header.length as usize, payload.len());
        let payload = payload.get_mut(..length).ok_or_else(|| {
            broken(&format!(
                "sent a frame of {length} bytes, more than {limit}"
            ))
        })?;
        self.receive_payload(header, payload)?;
        Ok(length)
    }

    fn receive_payload(&self, header: &FrameHeader, payload: &mut [u8]) -> Result<(), LinkError> {
        self.read_exact(payload, self.silence)?;
        match checksum(payload) == header.checksum {
            true => Ok(()),
            false => Err(broken("sent a damaged frame (its checksum does not hold)")),
        }
    }

    /// Fills `buffer`. The first byte may take as long as `timeout`.
    fn read_exact(&self, mut buffer: &mut [u8], mut timeout: Duration) -> Result<(), LinkError> {
        let mut last_progress = Instant::now();
        while !buffer.is_empty() {
            match (&mut &*self.stream).read(buffer) {
                Ok(0) => return Err(broken("closed the connection")),
                Ok(count) => {
                    buffer = &mut buffer[count..];
                    last_progress = Instant::now();
                    timeout = self.silence;
                }
                Err(e) => self.after_failure(&e, last_progress, timeout)?,
            }
        }
        self.check_fence()
    }

    pub fn write_all(&self, mut buffer: &[u8]) -> Result<(), LinkError> {
        let mut last_progress = Instant::now();
        while !buffer.is_empty() {
            match (&mut &*self.stream).write(buffer) {
                Ok(0) => return Err(broken("closed the connection")),
                Ok(count) => {
                    buffer = &buffer[count..];
                    last_progress = Instant::now();
                }
                Err(e) => self.after_failure(&e, last_progress, self.silence)?,
            }
        }
        self.check_fence()
    }

    /// Goes on after a tick, unless it is all over or the peer silent for too long.
    fn after_failure(
        &self,
        error: &std::io::Error,
        last_progress: Instant,
        timeout: Duration,
    ) -> Result<(), LinkError> {
        self.check_fence()?;
        if !is_tick(error) {
            return Err(broken(&error.to_string()));
        }
        match last_progress.elapsed() < timeout {
            true => Ok(()),
            false => {
                let seconds = timeout.as_secs_f64();
                Err(broken(&format!("was silent for {seconds:.1} s")))
            }
        }
    }

    fn check_fence(&self) -> Result<(), LinkError> {
        self.token.check().map_err(|_| LinkError::Closed)
    }
}

pub(super) fn broken(reason: &str) -> LinkError {
    LinkError::Broken(reason.to_owned())
}

fn check(
    header: &FrameHeader,
    kind: FrameKind,
    index: usize,
    length: Option<usize>,
) -> Result<(), LinkError> {
    match header.fault(kind, index, length) {
        Some(fault) => Err(LinkError::Broken(fault)),
        None => Ok(()),
    }
}

#[cfg(all(test, target_os = "linux"))]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn connections_within_this_machine_were_never_paced() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        unpace(&SockRef::from(&listener));
        let address = listener.local_addr().unwrap().to_string();
        let calling = connect(&address, Duration::from_secs(5)).unwrap();
        let (called, _) = listener.accept().unwrap();
        for stream in [&calling, &called] {
            for prepared in [false, true] {
                let algorithm = SockRef::from(stream).tcp_congestion().unwrap();
                assert!(algorithm.starts_with(b"reno"), "prepared: {prepared}");
                prepare(stream, Duration::from_secs(5)).unwrap();
            }
        }
    }
}
