//! Files of the run's model that workers pass on to each other, so that they do not all pull them from the coordinator's port.
//!
//! [`SharedFiles`] is the sender's side: files by digest, and nothing else can be named. [`fetch`] is the receiver's; what it brings is
//! believed when the whole file's digest is right, and not before.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::wire::CHUNK_BYTES;

use super::frame::FrameKind;
use super::generation_token::GenerationToken;
use super::greeting::FileHello;
use super::link::{self, Link, LinkError, broken};
use super::lock::lock;

/// Longest time that either end may move nothing.
const SILENCE: Duration = Duration::from_secs(10);
/// How long a worker may take to be reached.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Files that are sent at a time. The coordinator names this worker to fewer; whoever comes beside is turned away.
const MAX_SENT: usize = 8;
/// Least speed of a sender, once it was waited for so long.
const LEAST_BYTES_PER_SECOND: u64 = 4 << 20;
const BEGINNING: Duration = Duration::from_secs(10);
/// Bytes of a request: the file's digest, and the offset to begin at.
const REQUEST_BYTES: usize = 40;
/// Longest reason that is read of a sender that ends.
const MAX_REASON_BYTES: usize = 256;

/// BLAKE3 of a whole file.
pub type Digest = [u8; 32];

/// The bytes of a digest of 64 hexadecimal digits; None where it is not one.
pub fn digest_of(hex: &str) -> Option<Digest> {
    Some(*blake3::Hash::from_hex(hex).ok()?.as_bytes())
}

/// The files that this worker passes on.
#[derive(Default)]
pub struct SharedFiles {
    files: Mutex<HashMap<Digest, (PathBuf, u64)>>,
    sending: AtomicUsize,
    token: GenerationToken,
}

impl SharedFiles {
    /// Passes a file of `size` bytes on from now on, from `path` instead of an earlier one.
    pub fn share(&self, digest: Digest, path: PathBuf, size: u64) {
        lock(&self.files).insert(digest, (path, size));
    }

    /// Digests of all files that are passed on, as hexadecimal digits.
    pub fn digests(&self) -> Vec<String> {
        let files = lock(&self.files);
        let digests = files.keys().map(|digest| blake3::Hash::from(*digest));
        digests.map(|digest| digest.to_string()).collect()
    }

    /// Ends all sendings.
    pub fn close(&self) {
        self.token.close();
    }

    /// Sends a file to a caller that has said Hello to this worker.
    pub(super) fn serve(&self, stream: &TcpStream) -> Result<(), String> {
        let place = self.sending.fetch_add(1, Ordering::SeqCst);
        let sent = match place < MAX_SENT {
            true => self.send(stream),
            false => refuse(stream, &self.token),
        };
        self.sending.fetch_sub(1, Ordering::SeqCst);
        sent.map_err(reason)
    }

    fn send(&self, stream: &TcpStream) -> Result<(), LinkError> {
        let link = open(stream, &self.token)?;
        let mut request = [0; REQUEST_BYTES];
        link.receive(FrameKind::FileRequest, 0, &mut request)?;
        let Some((digest, offset)) = decode(&request) else {
            return Err(broken("asked for no file"));
        };
        let found = lock(&self.files).get(&digest).cloned();
        let opened = found.and_then(|(path, size)| {
            let mut file = File::open(path).ok()?;
            file.seek(SeekFrom::Start(offset)).ok()?;
            Some(file.take(size.checked_sub(offset)?))
        });
        let Some(mut file) = opened else {
            return link.send(FrameKind::Ended, 0, b"it has no such file");
        };
        let mut piece = vec![0; CHUNK_BYTES];
        for index in 0.. {
            let wanted = (file.limit() as usize).min(CHUNK_BYTES);
            if wanted == 0 {
                break;
            }
            if let Err(error) = file.read_exact(&mut piece[..wanted]) {
                let reason = format!("it cannot read the file: {error}");
                return link.send(FrameKind::Ended, 0, reason.as_bytes());
            }
            link.send(FrameKind::FilePiece, index, &piece[..wanted])?;
        }
        Ok(())
    }
}

fn refuse(stream: &TcpStream, token: &GenerationToken) -> Result<(), LinkError> {
    let link = open(stream, token)?;
    link.send(FrameKind::Ended, 0, b"it sends files to others already")
}

fn open<'a>(stream: &'a TcpStream, token: &'a GenerationToken) -> Result<Link<'a>, LinkError> {
    link::prepare(stream, SILENCE).map_err(|error| broken(&error.to_string()))?;
    Ok(Link::new(stream, token, SILENCE))
}

fn encode(digest: &Digest, offset: u64) -> [u8; REQUEST_BYTES] {
    let mut bytes = [0; REQUEST_BYTES];
    bytes[..32].copy_from_slice(digest);
    bytes[32..].copy_from_slice(&offset.to_le_bytes());
    bytes
}

fn decode(bytes: &[u8; REQUEST_BYTES]) -> Option<(Digest, u64)> {
    let (digest, offset) = bytes.split_at(32);
    let offset = u64::from_le_bytes(offset.try_into().ok()?);
    Some((digest.try_into().ok()?, offset))
}

/// What is to be fetched, and from whom.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Where the sender's exchange listens, `HOST:PORT`.
    pub address: String,
    pub hello: FileHello,
    pub digest: Digest,
    /// Bytes that are here already.
    pub offset: u64,
    /// Bytes of the whole file.
    pub size: u64,
}

/// Fetches the rest of a file. `take` gets each piece and says whether it goes on. An error says what the sender did, as a sentence
/// without its subject.
pub fn fetch(wanted: &Wanted, mut take: impl FnMut(Vec<u8>) -> bool) -> Result<(), String> {
    let named = |error: std::io::Error| format!("cannot be reached at {}: {error}", wanted.address);
    let stream = link::connect(&wanted.address, CONNECT_TIMEOUT).map_err(named)?;
    (&stream)
        .write_all(&wanted.hello.encode())
        .map_err(|error| error.to_string())?;
    let token = GenerationToken::default();
    let link = open(&stream, &token).map_err(reason)?;
    let request = encode(&wanted.digest, wanted.offset);
    link.send(FrameKind::FileRequest, 0, &request)
        .map_err(reason)?;
    // What `take` needs is not the sender's.
    let mut waited = Duration::ZERO;
    let mut left = wanted.size.saturating_sub(wanted.offset);
    let mut received = 0;
    for index in 0.. {
        if left == 0 {
            break;
        }
        let began = Instant::now();
        let piece = receive(&link, index, left).map_err(reason)?;
        waited += began.elapsed();
        left -= piece.len() as u64;
        received += piece.len() as u64;
        if !take(piece) {
            return Err("is not listened to any more".to_owned());
        }
        let seconds = waited.as_secs();
        if seconds >= BEGINNING.as_secs() && received / seconds < LEAST_BYTES_PER_SECOND {
            return Err(format!("sent {received} bytes in {seconds} s"));
        }
    }
    Ok(())
}

/// Receives the next piece, of at most `left` bytes.
fn receive(link: &Link<'_>, index: usize, left: u64) -> Result<Vec<u8>, LinkError> {
    let header = link.receive_header()?;
    if FrameKind::of(header.kind) == Some(FrameKind::Ended) {
        let mut reason = vec![0; (header.length as usize).min(MAX_REASON_BYTES)];
        link.receive_due(&header, FrameKind::Ended, 0, &mut reason)?;
        let reason = common::text::reason(&String::from_utf8_lossy(&reason));
        return Err(broken(&format!("said: {reason}")));
    }
    let mut piece = vec![0; left.min(CHUNK_BYTES as u64) as usize];
    let length = link.receive_due_up_to(&header, FrameKind::FilePiece, index, &mut piece)?;
    if length == 0 {
        return Err(broken("sent an empty piece"));
    }
    piece.truncate(length);
    Ok(piece)
}

fn reason(error: LinkError) -> String {
    match error {
        LinkError::Closed => "left".to_owned(),
        LinkError::Broken(reason) => reason,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, TcpListener};

    use super::super::Collective;
    use super::*;

    const RUN: [u8; 32] = [7; 32];
    const HOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    struct Site {
        _folder: tempfile::TempDir,
        collective: Collective,
        content: Vec<u8>,
        wanted: Wanted,
    }

    /// Worker 2, which passes a file of some pieces on.
    fn site() -> Site {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        let content: Vec<u8> = (0..2_500_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let collective = Collective::bind(HOST).unwrap();
        collective.identify(RUN, 2);
        let digest = *blake3::hash(&content).as_bytes();
        let size = content.len() as u64;
        collective.shared_files().share(digest, path, size);
        let wanted = Wanted {
            address: format!("{HOST}:{}", collective.port()),
            hello: FileHello {
                run_id: RUN,
                from: 1,
                to: 2,
            },
            digest,
            offset: 0,
            size,
        };
        Site {
            _folder: folder,
            collective,
            content,
            wanted,
        }
    }

    fn fetched(wanted: &Wanted) -> Result<Vec<u8>, String> {
        let mut content = Vec::new();
        fetch(wanted, |piece| {
            content.extend(piece);
            true
        })?;
        Ok(content)
    }

    #[test]
    fn a_file_arrives_from_any_byte_on() {
        let site = site();
        for offset in [0, 1_234_567, site.wanted.size] {
            let wanted = Wanted {
                offset,
                ..site.wanted.clone()
            };
            assert!(fetched(&wanted).unwrap() == site.content[offset as usize..]);
        }
        let digest = blake3::Hash::from(site.wanted.digest).to_string();
        assert_eq!(site.collective.shared_files().digests(), [digest]);
    }

    #[test]
    fn nothing_else_can_be_had() {
        let site = site();
        let unknown = Wanted {
            digest: [0; 32],
            ..site.wanted.clone()
        };
        let beyond = Wanted {
            offset: site.wanted.size + 1,
            size: u64::MAX,
            ..site.wanted.clone()
        };
        for wanted in [unknown, beyond] {
            let error = fetched(&wanted).unwrap_err();
            assert_eq!(error, "said: it has no such file");
        }
        // Another run, and another worker at this address, hear nothing.
        let hello = site.wanted.hello;
        for hello in [
            FileHello {
                run_id: [8; 32],
                ..hello
            },
            FileHello { to: 3, ..hello },
        ] {
            let wanted = Wanted {
                hello,
                ..site.wanted.clone()
            };
            assert!(fetched(&wanted).is_err());
        }
    }

    #[test]
    fn a_file_that_shrank_and_a_sender_that_dies_are_told() {
        let site = site();
        let path = site._folder.path().join("weights");
        std::fs::write(path, &site.content[..2_000_000]).unwrap();
        let error = fetched(&site.wanted).unwrap_err();
        assert!(error.contains("cannot read the file"), "{error}");

        let dying = TcpListener::bind((HOST, 0)).unwrap();
        let address = dying.local_addr().unwrap().to_string();
        std::thread::spawn(move || drop(dying.accept()));
        let wanted = Wanted {
            address,
            ..site.wanted.clone()
        };
        assert!(fetched(&wanted).is_err());
    }
}
