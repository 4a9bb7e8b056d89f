//! The parts of a ZIP archive, found and read where they lie.
//!
//! Enters: a file. Leaves: the names of the files in it, or the bytes of one of them, whose checksum is compared at its end. Writes
//! nothing.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};

use flate2::CrcReader;
use flate2::bufread::DeflateDecoder;
use zip::{CompressionMethod, ZipArchive};

use super::content::PackedBytes;

/// Most entries of an archive.
const MAX_ENTRIES: usize = 1 << 20;

/// A file in a ZIP archive.
#[derive(Clone, Debug)]
pub struct Member {
    pub name: String,
    start: u64,
    packed_size: u64,
    size: u64,
    checksum: u32,
    method: CompressionMethod,
    is_encrypted: bool,
}

impl Member {
    /// The bytes of the file, counted in `bytes` where they are packed. An error says why they cannot be had.
    pub fn read(
        &self,
        mut archive: File,
        bytes: &PackedBytes,
    ) -> Result<impl Read + Send + use<>, String> {
        if self.is_encrypted {
            return Err(format!(
                "`{}` in the ZIP archive is encrypted: unpack it",
                self.name
            ));
        }
        archive
            .seek(SeekFrom::Start(self.start))
            .map_err(|error| error.to_string())?;
        let packed = BufReader::with_capacity(1 << 18, archive).take(self.packed_size);
        let counted = |packed| bytes.counting(packed, self.start);
        let reader: Box<dyn Read + Send> = match self.method {
            CompressionMethod::STORE => Box::new(packed),
            CompressionMethod::DEFLATE => Box::new(DeflateDecoder::new(counted(packed))),
            method => {
                return Err(format!(
                    "`{}` in the ZIP archive is compressed in a way that is not read ({method}): pack it with Deflate, or unpack it",
                    self.name
                ));
            }
        };
        Ok(Checked {
            reader: CrcReader::new(reader),
            read: 0,
            size: self.size,
            checksum: self.checksum,
        })
    }
}

/// Whether the bytes begin like a ZIP archive.
pub fn is_zip(start: &[u8]) -> bool {
    start.starts_with(b"PK\x03\x04") || start.starts_with(b"PK\x05\x06")
}

/// The files of an archive.
pub fn members(file: File) -> Result<Vec<Member>, String> {
    let broken = |error: zip::result::ZipError| {
        format!("the ZIP archive cannot be read ({error}): copy or download it again")
    };
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(broken)?;
    if archive.len() > MAX_ENTRIES {
        return Err("the ZIP archive has too many entries: unpack it".to_owned());
    }
    let mut members = Vec::new();
    for index in 0..archive.len() {
        let entry = archive.by_index_raw(index).map_err(broken)?;
        if entry.is_dir() || entry.is_symlink() {
            continue;
        }
        members.push(Member {
            name: entry.name().map_err(broken)?.into_owned(),
            start: entry.data_start().ok_or_else(|| {
                "the ZIP archive does not say where its files begin: unpack it".to_owned()
            })?,
            packed_size: entry.compressed_size(),
            size: entry.size(),
            checksum: entry.crc32(),
            method: entry.compression(),
            is_encrypted: entry.encrypted(),
        });
    }
    Ok(members)
}

/// Compares size and checksum with what the archive says, once all is read.
struct Checked<R> {
    reader: CrcReader<R>,
    read: u64,
    size: u64,
    checksum: u32,
}

impl<R: Read> Read for Checked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.read += read as u64;
        let is_end = read == 0 && !buffer.is_empty();
        let is_whole = self.read == self.size && self.reader.crc().sum() == self.checksum;
        if self.read > self.size || (is_end && !is_whole) {
            return Err(io::Error::other(
                "the file in the ZIP archive is damaged: its size or checksum differs; copy or download it again",
            ));
        }
        Ok(read)
    }
}
