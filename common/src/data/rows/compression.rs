//! Unpacks what is compressed with gzip, Zstandard, xz or bzip2, while it is read.
//!
//! Enters: bytes. Leaves: the bytes that were compressed, or an error that says that they are cut off or damaged. Files of several
//! parts one behind the other (`cat a.gz b.gz`) are read to their end. Never holds more than a window of each format.

use std::io::{self, BufRead, Read};

use flate2::bufread::GzDecoder;
use lzma_rust2::XzReader;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

/// Number of bytes that tell what something is compressed with.
pub const MAGIC_BYTES: usize = 6;

/// How bytes are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    Gzip,
    Zstandard,
    Xz,
    Bzip2,
}

impl Compression {
    /// What the bytes are compressed with, by how they begin.
    pub fn of(start: &[u8]) -> Option<Self> {
        match start {
            [0x1f, 0x8b, ..] => Some(Self::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
                Some(Self::Zstandard)
            }
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Self::Xz),
            [b'B', b'Z', b'h', b'1'..=b'9', ..] => Some(Self::Bzip2),
            _ => None,
        }
    }

    /// The name of a file without the ending that says how it is compressed.
    pub fn strip(name: &str) -> &str {
        let lower = name.to_lowercase();
        let endings = [
            ".gz", ".gzip", ".zst", ".zstd", ".xz", ".bz2", ".tgz", ".txz", ".tbz2", ".tzst",
        ];
        let ending = endings.iter().find(|ending| lower.ends_with(*ending));
        match ending {
            // Lower case may have other lengths; the name is left as it is then.
            Some(ending) => name
                .get(..name.len().saturating_sub(ending.len()))
                .unwrap_or(name),
            None => name,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstandard => "Zstandard",
            Self::Xz => "xz",
            Self::Bzip2 => "bzip2",
        }
    }

    /// Reads what `packed` holds, which is compressed like this.
    pub fn unpack(self, packed: impl BufRead + Send + 'static) -> Box<dyn Read + Send> {
        let unpacked: Box<dyn Read + Send> = match self {
            Self::Gzip => Box::new(Frames::<_, GzDecoder<_>>::new(packed)),
            Self::Zstandard => Box::new(Frames::<_, ZstandardFrame<_>>::new(packed)),
            Self::Bzip2 => Box::new(Frames::<_, bzip2::bufread::BzDecoder<_>>::new(packed)),
            Self::Xz => Box::new(XzReader::new(packed, true)),
        };
        Box::new(Unpacked {
            reader: unpacked,
            compression: self,
            has_failed: false,
        })
    }
}

/// Turns the errors of a decoder into lines for people, and does not ask a decoder that has failed again.
struct Unpacked {
    reader: Box<dyn Read + Send>,
    compression: Compression,
    has_failed: bool,
}

impl Read for Unpacked {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.has_failed {
            return Err(io::Error::other("reading failed before"));
        }
        loop {
            let error = match self.reader.read(buffer) {
                Ok(read) => return Ok(read),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => error,
            };
            self.has_failed = true;
            let name = self.compression.name();
            return Err(io::Error::other(match is_end(&error) {
                true => {
                    format!("the {name} data is cut off: copy or download the file again")
                }
                false => format!(
                    "the {name} data cannot be unpacked ({error}): copy or download the file again"
                ),
            }));
        }
    }
}

/// Whether an error, or what it came from, is that the bytes ended.
fn is_end(error: &io::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            if error.kind() == io::ErrorKind::UnexpectedEof {
                return true;
            }
            let inner = error.get_ref();
            cause = inner.map(|inner| inner as &(dyn std::error::Error + 'static));
        } else {
            cause = error.source();
        }
    }
    false
}

/// A decoder of one part of a compressed file.
trait Frame<R>: Read + Sized {
    /// How a part begins.
    fn starts(start: &[u8]) -> bool;

    /// Begins a part. The inner error is what follows a part that holds nothing.
    fn begin(packed: R) -> io::Result<Result<Self, R>>;

    /// What is behind the part, which was read to its end.
    fn end(self) -> io::Result<R>;
}

/// The parts of a compressed file, one after the other.
struct Frames<R, F> {
    /// What is not read yet, between two parts.
    rest: Option<R>,
    frame: Option<F>,
}

impl<R: BufRead, F: Frame<R>> Frames<R, F> {
    fn new(packed: R) -> Self {
        Self {
            rest: Some(packed),
            frame: None,
        }
    }

    /// Begins the next part; false where there is none.
    fn next_frame(&mut self) -> io::Result<bool> {
        let Some(mut rest) = self.rest.take() else {
            return Ok(false);
        };
        loop {
            let buffer = rest.fill_buf()?;
            let zeros = buffer.iter().take_while(|byte| **byte == 0).count();
            if zeros > 0 {
                // Tapes and some tools fill up a block with zeros.
                rest.consume(zeros);
                continue;
            }
            if buffer.is_empty() {
                self.rest = Some(rest);
                return Ok(false);
            }
            if !F::starts(buffer) {
                return Err(io::Error::other("there is something else behind its end"));
            }
            match F::begin(rest)? {
                Ok(frame) => {
                    self.frame = Some(frame);
                    return Ok(true);
                }
                Err(behind) => rest = behind,
            }
        }
    }
}

impl<R: BufRead, F: Frame<R>> Read for Frames<R, F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if let Some(frame) = &mut self.frame {
                let read = frame.read(buffer)?;
                if read > 0 {
                    return Ok(read);
                }
            }
            if let Some(frame) = self.frame.take() {
                self.rest = Some(frame.end()?);
            }
            if !self.next_frame()? {
                return Ok(0);
            }
        }
    }
}

/// Whether a buffer, of which there may be only a part yet, begins with `magic`.
fn begins(buffer: &[u8], magic: &[u8]) -> bool {
    let length = buffer.len().min(magic.len());
    buffer[..length] == magic[..length]
}

impl<R: BufRead> Frame<R> for GzDecoder<R> {
    fn starts(start: &[u8]) -> bool {
        begins(start, b"\x1f\x8b")
    }

    fn begin(packed: R) -> io::Result<Result<Self, R>> {
        Ok(Ok(GzDecoder::new(packed)))
    }

    fn end(self) -> io::Result<R> {
        Ok(self.into_inner())
    }
}

impl<R: BufRead> Frame<R> for bzip2::bufread::BzDecoder<R> {
    fn starts(start: &[u8]) -> bool {
        begins(start, b"BZh")
    }

    fn begin(packed: R) -> io::Result<Result<Self, R>> {
        Ok(Ok(bzip2::bufread::BzDecoder::new(packed)))
    }

    fn end(self) -> io::Result<R> {
        Ok(self.into_inner())
    }
}

struct ZstandardFrame<R> {
    packed: R,
    decoder: FrameDecoder,
}

impl<R: Read> Read for ZstandardFrame<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
            self.decoder
                .decode_blocks(&mut self.packed, BlockDecodingStrategy::UptoBlocks(1))
                .map_err(io::Error::other)?;
        }
        self.decoder.read(buffer)
    }
}

impl<R: BufRead> Frame<R> for ZstandardFrame<R> {
    fn starts(start: &[u8]) -> bool {
        let is_skipped = matches!(start, [0x50..=0x5f, rest @ ..] if begins(rest, b"\x2a\x4d\x18"));
        is_skipped || begins(start, b"\x28\xb5\x2f\xfd")
    }

    fn begin(mut packed: R) -> io::Result<Result<Self, R>> {
        let mut decoder = FrameDecoder::new();
        match decoder.init(&mut packed) {
            Ok(()) => {}
            Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                length,
                ..
            })) => {
                let skipped = io::copy(&mut packed.by_ref().take(length.into()), &mut io::sink())?;
                return match skipped == u64::from(length) {
                    true => Ok(Err(packed)),
                    false => Err(io::ErrorKind::UnexpectedEof.into()),
                };
            }
            Err(error) => return Err(io::Error::other(error)),
        }
        Ok(Ok(Self { packed, decoder }))
    }

    fn end(self) -> io::Result<R> {
        let decoder = &self.decoder;
        let told = decoder.get_checksum_from_data();
        if told.is_some() && told != decoder.get_calculated_checksum() {
            return Err(io::Error::other("its checksum differs"));
        }
        Ok(self.packed)
    }
}
