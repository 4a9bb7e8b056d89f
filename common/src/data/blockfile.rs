//! Blocks on disk: one file, written once, memory-mapped, addressed by its digest.
//!
//! Enters: blocks in order (training first, then validation) and a note of what they were made from. Leaves: the
//! encoded bytes of any block. Never trusts a file: lengths and digest are checked before the first block is read.
//!
//! Layout, little-endian: header (80 bytes), info (JSON), zeros up to a multiple of 8, the blocks, all of one size; for
//! each block its trained tokens and its tokens without padding (u32 each); BLAKE3 over everything before it.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use thiserror::Error;

use super::block::Block;
use crate::files::FileError;
use crate::files::atomic::AtomicFile;
use crate::progress::Progress;

const MAGIC: &[u8; 8] = b"MUSTERBK";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 80;
const INDEX_BYTES: u64 = 8;
const DIGEST_BYTES: u64 = 32;
const MAX_INFO_BYTES: u64 = 16 << 20;
/// Bytes of blocks that are written at a time, or those of one block.
const WRITTEN_AT_ONCE: usize = 4 << 20;
/// Longest block, in tokens.
const MAX_SEQUENCE_LEN: u64 = 1 << 24;

/// Why a block file cannot be read or written.
#[derive(Debug, Error)]
pub enum BlockFileError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{path}: not a usable block file: {reason}", path = .path.display())]
    Damaged { path: PathBuf, reason: String },
}

/// The header of a block file; all of it follows from the blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    sequence_len: u64,
    train_blocks: u64,
    eval_blocks: u64,
    info_len: u64,
    inputs: [u8; 32],
}

impl Header {
    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        let numbers = [
            self.sequence_len,
            self.train_blocks,
            self.eval_blocks,
            self.info_len,
        ];
        for (index, number) in numbers.iter().enumerate() {
            bytes[16 + index * 8..24 + index * 8].copy_from_slice(&number.to_le_bytes());
        }
        bytes[48..80].copy_from_slice(&self.inputs);
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() < HEADER_BYTES || &bytes[..8] != MAGIC {
            return Err("it does not begin as one".to_owned());
        }
        let version = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        if version != VERSION {
            return Err(format!("version {version} where {VERSION} is known"));
        }
        let number = |index: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[16 + index * 8..24 + index * 8]);
            u64::from_le_bytes(word)
        };
        let mut inputs = [0; 32];
        inputs.copy_from_slice(&bytes[48..80]);
        let header = Self {
            sequence_len: number(0),
            train_blocks: number(1),
            eval_blocks: number(2),
            info_len: number(3),
            inputs,
        };
        if header.sequence_len == 0 || header.sequence_len > MAX_SEQUENCE_LEN {
            return Err(format!("blocks of {} tokens", header.sequence_len));
        }
        if header.info_len > MAX_INFO_BYTES {
            return Err(format!("{} bytes of info", header.info_len));
        }
        Ok(header)
    }

    fn blocks(&self) -> Option<u64> {
        self.train_blocks.checked_add(self.eval_blocks)
    }

    /// Where the parts of the file begin; None where the numbers overflow.
    fn layout(&self) -> Option<Layout> {
        let blocks = self.blocks()?;
        let block_bytes = Block::encoded_len(self.sequence_len as usize) as u64;
        let data = (HEADER_BYTES as u64 + self.info_len).next_multiple_of(8);
        let index = data.checked_add(blocks.checked_mul(block_bytes)?)?;
        let digest = index.checked_add(blocks.checked_mul(INDEX_BYTES)?)?;
        Some(Layout {
            data,
            index,
            digest,
            end: digest.checked_add(DIGEST_BYTES)?,
        })
    }
}

/// Where the parts of the file begin, in bytes.
#[derive(Clone, Copy, Debug)]
struct Layout {
    data: u64,
    index: u64,
    digest: u64,
    end: u64,
}

/// What a block file says that it was made from, before anything of it is verified.
#[derive(Debug)]
pub struct Claims {
    /// Digest of what the blocks were made from.
    pub inputs: [u8; 32],
    /// Info that the writer put in.
    pub info: Vec<u8>,
}

/// Reads what a file claims, and nothing else of it.
pub fn claims(path: &Path) -> Result<Claims, BlockFileError> {
    let io = |error| BlockFileError::File(FileError::io("read", path)(error));
    let damaged = |reason: String| BlockFileError::Damaged {
        path: path.to_owned(),
        reason,
    };
    let mut file = File::open(path).map_err(io)?;
    let mut bytes = Vec::with_capacity(HEADER_BYTES);
    let start = Read::by_ref(&mut file).take(HEADER_BYTES as u64);
    read_all(start, &mut bytes).map_err(io)?;
    let header = Header::decode(&bytes).map_err(damaged)?;
    let mut info = Vec::new();
    let rest = read_all(file.take(header.info_len), &mut info);
    match rest.map_err(io)? as u64 == header.info_len {
        true => Ok(Claims {
            inputs: header.inputs,
            info,
        }),
        false => Err(damaged("it ends too early".to_owned())),
    }
}

fn read_all(mut from: impl Read, into: &mut Vec<u8>) -> std::io::Result<usize> {
    from.read_to_end(into)
}

/// A verified block file.
#[derive(Debug)]
pub struct BlockFile {
    map: Mmap,
    header: Header,
    layout: Layout,
    digest: String,
    path: PathBuf,
}

/// BLAKE3 of the first bytes of a map. Gives up the pages that were read: a file that is longer than the memory would else fill it.
fn digest_of(map: &Mmap, len: usize) -> blake3::Hash {
    const READ_BYTES: usize = 64 << 20;
    let mut hasher = blake3::Hasher::new();
    for start in (0..len).step_by(READ_BYTES) {
        let end = len.min(start + READ_BYTES);
        hasher.update_rayon(&map[start..end]);
        #[cfg(unix)]
        if len > READ_BYTES {
            // SAFETY: the map is of a file and only read, so pages that are given up come back as they were.
            let _ = unsafe {
                map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start)
            };
        }
    }
    hasher.finalize()
}

impl BlockFile {
    /// Maps the file and checks its header, its length and its digest.
    pub fn open(path: &Path) -> Result<Self, BlockFileError> {
        let io = |error| BlockFileError::File(FileError::io("read", path)(error));
        let damaged = |reason: String| BlockFileError::Damaged {
            path: path.to_owned(),
            reason,
        };
        let file = File::open(path).map_err(io)?;
        // SAFETY: block files are written under another name, renamed when complete, and never written again.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let header = Header::decode(&map).map_err(damaged)?;
        let Some(layout) = header.layout() else {
            return Err(damaged("its numbers are out of range".to_owned()));
        };
        if map.len() as u64 != layout.end {
            return Err(damaged(format!(
                "{} bytes where {} are expected (truncated?)",
                map.len(),
                layout.end
            )));
        }
        let (content, digest) = map.split_at(layout.digest as usize);
        let found = digest_of(&map, content.len());
        if found.as_bytes() != digest {
            return Err(damaged("its digest does not match".to_owned()));
        }
        Ok(Self {
            header,
            layout,
            digest: found.to_hex().to_string(),
            path: path.to_owned(),
            map,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of tokens in a block.
    pub fn sequence_len(&self) -> usize {
        self.header.sequence_len as usize
    }

    /// Number of training blocks.
    pub fn train_blocks(&self) -> u64 {
        self.header.train_blocks
    }

    /// Number of validation blocks, which come after the training blocks.
    pub fn eval_blocks(&self) -> u64 {
        self.header.eval_blocks
    }

    /// Number of training and validation blocks together.
    pub fn total_blocks(&self) -> u64 {
        self.header.train_blocks + self.header.eval_blocks
    }

    /// BLAKE3 of the content, hex: equal data, tokenizer and packing give equal digests on every machine.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Digest of what the blocks were made from, as the writer was told.
    pub fn inputs(&self) -> &[u8; 32] {
        &self.header.inputs
    }

    /// Info that the writer put in.
    pub fn info(&self) -> &[u8] {
        &self.map[HEADER_BYTES..HEADER_BYTES + self.header.info_len as usize]
    }

    /// The block in the encoding of [`Block::encode`]. None for a number that is no block's.
    pub fn block_bytes(&self, block: u64) -> Option<&[u8]> {
        if block >= self.total_blocks() {
            return None;
        }
        let size = Block::encoded_len(self.sequence_len());
        let start = self.layout.data as usize + block as usize * size;
        Some(&self.map[start..start + size])
    }

    /// Trained tokens of the block; 0 for a number that is no block's.
    pub fn trained_tokens(&self, block: u64) -> u64 {
        self.counts(block).0
    }

    /// Tokens of the block without padding; 0 for a number that is no block's.
    pub fn used_tokens(&self, block: u64) -> u64 {
        self.counts(block).1
    }

    fn counts(&self, block: u64) -> (u64, u64) {
        if block >= self.total_blocks() {
            return (0, 0);
        }
        let start = (self.layout.index + block * INDEX_BYTES) as usize;
        let count = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&self.map[at..at + 4]);
            u64::from(u32::from_le_bytes(word))
        };
        (count(start), count(start + 4))
    }
}

/// Writes a block file under a temporary name and renames it when it is complete. What is there is replaced.
///
/// `blocks` yields the training blocks and then the validation blocks, as many as are announced.
pub fn write(
    path: &Path,
    sequence_len: usize,
    (train_blocks, eval_blocks): (u64, u64),
    inputs: [u8; 32],
    info: &[u8],
    blocks: impl Iterator<Item = Block>,
) -> Result<BlockFile, BlockFileError> {
    let wanted = Progress::default();
    let counts = (train_blocks, eval_blocks);
    let blocks = blocks.map(Ok);
    write_watched(path, sequence_len, counts, inputs, info, blocks, &wanted)
}

/// [`write`] with progress: counts each block, and leaves nothing behind where that is cancelled.
pub fn write_watched(
    path: &Path,
    sequence_len: usize,
    (train_blocks, eval_blocks): (u64, u64),
    inputs: [u8; 32],
    info: &[u8],
    mut blocks: impl Iterator<Item = Result<Block, FileError>>,
    progress: &Progress,
) -> Result<BlockFile, BlockFileError> {
    let header = Header {
        sequence_len: sequence_len as u64,
        train_blocks,
        eval_blocks,
        info_len: info.len() as u64,
        inputs,
    };
    let mut file = AtomicFile::create(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut put = |bytes: &[u8]| {
        hasher.update_rayon(bytes);
        file.write_all(bytes).map_err(FileError::io("write", path))
    };
    let gap = (HEADER_BYTES + info.len()).next_multiple_of(8) - HEADER_BYTES - info.len();
    put(&header.encode())?;
    put(info)?;
    put(&[0; 8][..gap])?;
    let mut index = Vec::new();
    let mut encode_some = |bytes: &mut Vec<u8>| {
        bytes.clear();
        while bytes.len() < WRITTEN_AT_ONCE
            && let Some(block) = blocks.next()
        {
            let block = block?;
            let wanted = progress.check();
            wanted.map_err(|cancelled| FileError::io("write", path)(cancelled.into()))?;
            progress.advance(1);
            block.encode(bytes);
            index.extend_from_slice(&(block.trained_tokens() as u32).to_le_bytes());
            index.extend_from_slice(&(block.used_len() as u32).to_le_bytes());
        }
        Ok::<(), FileError>(())
    };
    let (mut bytes, mut following) = (Vec::new(), Vec::new());
    encode_some(&mut bytes)?;
    while !bytes.is_empty() {
        // The next blocks are made while these are written.
        let mut written = Ok(());
        let made = rayon::in_place_scope(|scope| {
            scope.spawn(|_| written = put(&bytes));
            encode_some(&mut following)
        });
        written.and(made)?;
        std::mem::swap(&mut bytes, &mut following);
    }
    put(&index)?;
    let digest = hasher.finalize();
    file.write_all(digest.as_bytes())
        .map_err(FileError::io("write", path))?;
    file.commit()?;
    BlockFile::open(path)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn block(first: u32) -> Block {
        Block {
            tokens: vec![first, 6, 7, 0],
            segments: vec![1, 1, 1, 0],
            trained: vec![false, true, first > 10, false],
        }
    }

    fn written(folder: &Path) -> BlockFile {
        let blocks = [block(10), block(20), block(30)];
        write(
            &folder.join("blocks.bin"),
            4,
            (2, 1),
            [7; 32],
            b"{}",
            blocks.into_iter(),
        )
        .unwrap()
    }

    #[test]
    fn blocks_read_back_as_written() {
        let folder = tempfile::tempdir().unwrap();
        let file = written(folder.path());
        assert_eq!(
            (file.train_blocks(), file.eval_blocks(), file.sequence_len()),
            (2, 1, 4)
        );
        assert_eq!((file.info(), file.inputs()), (&b"{}"[..], &[7; 32]));
        assert_eq!(
            Block::decode(file.block_bytes(2).unwrap(), 4).unwrap(),
            block(30)
        );
        assert_eq!([0, 1, 2, 3].map(|i| file.trained_tokens(i)), [1, 2, 2, 0]);
        assert_eq!([0, 2, 3].map(|i| file.used_tokens(i)), [3, 3, 0]);
        assert!(file.block_bytes(3).is_none());
    }

    #[test]
    fn blocks_beyond_those_that_are_written_at_a_time_are_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let length = 1 << 13;
        let count = 2 * WRITTEN_AT_ONCE / Block::encoded_len(length) + 3;
        let block = |number: usize| Block {
            tokens: vec![number as u32; length],
            segments: vec![1; length],
            trained: (0..length).map(|token| token > number).collect(),
        };
        let path = folder.path().join("blocks.bin");
        let counts = (count as u64, 0);
        let blocks = (0..count).map(block);
        let file = write(&path, length, counts, [0; 32], b"{}", blocks).unwrap();
        for number in 0..count {
            let bytes = file.block_bytes(number as u64).unwrap();
            assert!(Block::decode(bytes, length).unwrap() == block(number));
            assert_eq!(
                file.trained_tokens(number as u64) as usize,
                length - number - 1
            );
        }
    }

    #[test]
    fn equal_blocks_give_equal_digests() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        assert_eq!(written(one.path()).digest(), written(two.path()).digest());
    }

    #[test]
    fn truncated_and_changed_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = written(folder.path()).path().to_owned();
        let bytes = std::fs::read(&path).unwrap();
        for len in [0, 1, HEADER_BYTES - 1, HEADER_BYTES, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..len]).unwrap();
            assert!(BlockFile::open(&path).is_err(), "{len} bytes");
        }
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x40;
            std::fs::write(&path, &changed).unwrap();
            assert!(BlockFile::open(&path).is_err(), "byte {at}");
        }
        let mut longer = bytes;
        longer.push(0);
        std::fs::write(&path, &longer).unwrap();
        assert!(BlockFile::open(&path).is_err());
    }

    #[test]
    fn what_a_file_claims_is_read_without_the_rest() {
        let folder = tempfile::tempdir().unwrap();
        let path = written(folder.path()).path().to_owned();
        let told = claims(&path).unwrap();
        assert_eq!((told.inputs, told.info), ([7; 32], b"{}".to_vec()));
        let bytes = std::fs::read(&path).unwrap();
        for len in [0, HEADER_BYTES - 1, HEADER_BYTES + 1] {
            std::fs::write(&path, &bytes[..len]).unwrap();
            assert!(claims(&path).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn numbers_that_overflow_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = written(folder.path()).path().to_owned();
        let bytes = std::fs::read(&path).unwrap();
        for field in 0..4 {
            let mut hostile = bytes.clone();
            hostile[16 + field * 8..24 + field * 8].copy_from_slice(&u64::MAX.to_le_bytes());
            std::fs::write(&path, &hostile).unwrap();
            assert!(BlockFile::open(&path).is_err(), "field {field}");
        }
    }
}
