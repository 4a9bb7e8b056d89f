//! The bytes of a data file, unpacked, with its beginning to tell what they are.
//!
//! Enters: a reader. Leaves: the same bytes, and the first of them beside. Never holds more than those.

use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::compression::{self, Compression};
use super::encoding::Encoding;

/// Bytes that are read at a time.
const BUFFER_BYTES: usize = 1 << 20;

/// Bytes that tell what a file is: a tar archive says so at byte 257.
const START_BYTES: usize = 512;

/// Bytes of a text that are looked at to tell how its rows are laid out.
const TEXT_START_BYTES: usize = 1 << 20;

/// Something that bytes are read from, in pieces.
pub type Bytes = Box<dyn BufRead + Send>;

/// What a data file holds, unpacked.
pub struct Content {
    /// The first bytes, which `reader` yields too.
    pub start: Vec<u8>,
    pub reader: Bytes,
    pub compression: Option<Compression>,
}

/// How many bytes of a data file were read, where these are others than those of its rows: it is packed. 0 where it is not.
#[derive(Clone, Debug, Default)]
pub struct PackedBytes(Arc<AtomicU64>);

impl PackedBytes {
    pub fn set(&self, bytes: u64) {
        self.0.store(bytes, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// The same bytes, counted from `start` on as they are taken.
    pub fn counting<R: BufRead>(&self, reader: R, start: u64) -> CountedInto<R> {
        CountedInto {
            reader,
            position: start,
            bytes: self.clone(),
        }
    }
}

/// A reader that tells others how many bytes were taken from it.
pub struct CountedInto<R> {
    reader: R,
    position: u64,
    bytes: PackedBytes,
}

impl<R: BufRead> Read for CountedInto<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.position += read as u64;
        self.bytes.set(self.position);
        Ok(read)
    }
}

impl<R: BufRead> BufRead for CountedInto<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.reader.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        self.reader.consume(amount);
        self.position += amount as u64;
        self.bytes.set(self.position);
    }
}

impl Content {
    /// Unpacks what is read, if it is compressed, and counts it in `bytes` then.
    pub fn of(packed: impl Read + Send + 'static, bytes: &PackedBytes) -> Self {
        let (start, packed) = peek(packed, compression::MAGIC_BYTES);
        let compression = Compression::of(&start);
        let unpacked: Box<dyn Read + Send> = match compression {
            Some(compression) => compression.unpack(bytes.counting(packed, 0)),
            None => Box::new(packed),
        };
        let (start, reader) = peek(unpacked, START_BYTES);
        Self {
            start,
            reader,
            compression,
        }
    }
}

/// What a text file holds, as UTF-8.
pub struct TextContent {
    /// The first bytes, which `reader` yields too.
    pub start: Vec<u8>,
    pub reader: Counted,
    /// What the places in the file are counted in, for messages.
    pub of: &'static str,
}

impl TextContent {
    /// Takes a byte order mark away, and decodes what it stands for.
    pub fn of(content: Content) -> Self {
        let encoding = Encoding::of(&content.start);
        let mut reader = content.reader;
        let mark = encoding.mark_bytes();
        reader.consume(mark);
        let (start, reader) = peek(encoding.decode(reader), TEXT_START_BYTES);
        Self {
            start,
            reader: Counted {
                reader,
                position: mark as u64,
            },
            of: match content.compression {
                None => "the file",
                Some(_) => "the unpacked file",
            },
        }
    }
}

/// A reader that knows how many bytes were taken from it.
pub struct Counted {
    reader: Bytes,
    /// Number of bytes of the file before the next one.
    pub position: u64,
}

impl Counted {
    pub fn peek(&mut self) -> io::Result<Option<u8>> {
        Ok(self.fill_buf()?.first().copied())
    }
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.position += read as u64;
        Ok(read)
    }
}

impl BufRead for Counted {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.reader.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        self.reader.consume(amount);
        self.position += amount as u64;
    }
}

/// The first bytes of a reader, and a reader that yields them again. An error among them is met again behind them.
fn peek(mut reader: impl Read + Send + 'static, count: usize) -> (Vec<u8>, Bytes) {
    let mut start = Vec::new();
    let read = reader.by_ref().take(count as u64).read_to_end(&mut start);
    let again = Cursor::new(start.clone());
    let rest: Bytes = match read {
        Ok(_) => Box::new(BufReader::with_capacity(BUFFER_BYTES, reader)),
        Err(error) => Box::new(BufReader::with_capacity(1, Failed(error.to_string()))),
    };
    (start, Box::new(again.chain(rest)))
}

/// A reader of nothing but an error.
struct Failed(String);

impl Read for Failed {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::Error::other(self.0.clone()))
    }
}
