//! The parts of a tar archive, found and read where they lie.
//!
//! Enters: the bytes of an archive, unpacked. Leaves: the names and sizes of the files in it, or the bytes of one of them. Follows no
//! link and writes nothing.

use std::io::{self, Read};

use super::content::{Bytes, Content};

const BLOCK_BYTES: u64 = 512;

/// Most entries of an archive, so that looking through it has an end.
const MAX_ENTRIES: usize = 1 << 20;

/// Longest name that an entry gives to the next one.
const MAX_NAME_BYTES: u64 = 1 << 16;

/// A file in a tar archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    pub name: String,
    /// Number of bytes of the archive before its own.
    start: u64,
    size: u64,
}

impl Member {
    /// Skips the bytes of the archive before those of the file.
    pub fn find(&self, archive: &mut Content) -> Result<(), String> {
        skip(&mut archive.reader, self.start).map_err(|error| broken(&error))
    }

    /// The bytes of the file, from an archive in which it was found.
    pub fn read(&self, archive: Content) -> impl Read + Send + use<> {
        Exact {
            reader: archive.reader,
            left: self.size,
        }
    }
}

/// Whether the bytes begin like a tar archive.
pub fn is_tar(start: &[u8]) -> bool {
    start.get(257..262) == Some(b"ustar")
}

/// The files of an archive.
pub fn members(mut archive: Content) -> Result<Vec<Member>, String> {
    list(&mut archive.reader).map_err(|error| broken(&error))
}

fn broken(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            "the tar archive is cut off: copy or download it again".to_owned()
        }
        _ => format!("the tar archive cannot be read: {error}"),
    }
}

fn list(reader: &mut Bytes) -> io::Result<Vec<Member>> {
    let mut members = Vec::new();
    let mut at = 0;
    // What the entry before says of the next one.
    let (mut name, mut size) = (None, None);
    for _ in 0..MAX_ENTRIES {
        let mut block = [0; BLOCK_BYTES as usize];
        if reader.read(&mut block[..1])? == 0 {
            return Ok(members);
        }
        reader.read_exact(&mut block[1..])?;
        at += BLOCK_BYTES;
        if block.iter().all(|byte| *byte == 0) {
            // Whether what the archive is compressed with is whole, only its end tells.
            io::copy(reader, &mut io::sink())?;
            return Ok(members);
        }
        let header = Header::of(&block)?;
        let length = match header.kind {
            b'0' | 0 | b'7' => size.take().unwrap_or(header.size),
            _ => header.size,
        };
        let padded = length
            .checked_next_multiple_of(BLOCK_BYTES)
            .ok_or_else(|| io::Error::other("a size in it is too large"))?;
        let mut left = padded;
        match header.kind {
            b'L' | b'x' => {
                let text = text(reader, length)?;
                left -= text.len() as u64;
                match header.kind {
                    b'L' => name = Some(until_zero(&text)),
                    _ => {
                        let (path, bytes) = extended(&text);
                        (name, size) = (path.or(name), bytes.or(size));
                    }
                }
            }
            b'0' | 0 | b'7' => members.push(Member {
                name: name.take().unwrap_or(header.name),
                start: at,
                size: length,
            }),
            // Of folders, links and devices there is nothing to read; what was said of them is over.
            b'g' => {}
            _ => (name, size) = (None, None),
        }
        skip(reader, left)?;
        at = at
            .checked_add(padded)
            .ok_or_else(|| io::Error::other("a size in it is too large"))?;
    }
    Err(io::Error::other("it has too many entries"))
}

struct Header {
    name: String,
    size: u64,
    kind: u8,
}

impl Header {
    fn of(block: &[u8; BLOCK_BYTES as usize]) -> io::Result<Self> {
        let told = number(&block[148..156]);
        // The checksum is taken with spaces in its own place.
        let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
        let own: u64 = block[148..156].iter().map(|byte| u64::from(*byte)).sum();
        if told != Some(sum - own + 8 * u64::from(b' ')) {
            return Err(io::Error::other("the checksum of an entry differs"));
        }
        let name = until_zero(&block[..100]);
        let prefix = until_zero(&block[345..500]);
        let is_posix = &block[257..263] == b"ustar\0";
        Ok(Self {
            name: match is_posix && !prefix.is_empty() {
                true => format!("{prefix}/{name}"),
                false => name,
            },
            size: number(&block[124..136])
                .ok_or_else(|| io::Error::other("the size of an entry is no number"))?,
            kind: block[156],
        })
    }
}

/// A number of a header: octal, or binary if it is large.
fn number(field: &[u8]) -> Option<u64> {
    if let [0x80, rest @ ..] = field {
        let (zeros, last) = rest.split_at(rest.len().checked_sub(8)?);
        let is_small = zeros.iter().all(|byte| *byte == 0);
        return Some(u64::from_be_bytes(last.try_into().ok()?)).filter(|_| is_small);
    }
    let text = until_zero(field);
    match text.trim() {
        "" => Some(0),
        digits => u64::from_str_radix(digits, 8).ok(),
    }
}

fn until_zero(bytes: &[u8]) -> String {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or(bytes);
    String::from_utf8_lossy(text).into_owned()
}

/// The path and the size of the next entry in records `LENGTH KEY=VALUE`.
fn extended(text: &[u8]) -> (Option<String>, Option<u64>) {
    let (mut path, mut size) = (None, None);
    for record in String::from_utf8_lossy(text).split('\n') {
        let record = record.split_once(' ').map_or("", |(_, record)| record);
        match record.split_once('=') {
            Some(("path", value)) => path = Some(value.to_owned()),
            Some(("size", value)) => size = value.parse().ok(),
            _ => {}
        }
    }
    (path, size)
}

fn text(reader: &mut Bytes, length: u64) -> io::Result<Vec<u8>> {
    if length > MAX_NAME_BYTES {
        return Err(io::Error::other("a name in it is too long"));
    }
    let mut text = vec![0; length as usize];
    reader.read_exact(&mut text)?;
    Ok(text)
}

fn skip(reader: &mut Bytes, count: u64) -> io::Result<()> {
    match io::copy(&mut reader.take(count), &mut io::sink())? == count {
        true => Ok(()),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// As many bytes as there are to be; fewer are an error.
struct Exact {
    reader: Bytes,
    left: u64,
}

impl Read for Exact {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let read = self.reader.read(&mut buffer[..most])?;
        if read == 0 && most > 0 {
            let error = io::Error::from(io::ErrorKind::UnexpectedEof);
            return Err(io::Error::other(broken(&error)));
        }
        self.left -= read as u64;
        Ok(read)
    }
}
