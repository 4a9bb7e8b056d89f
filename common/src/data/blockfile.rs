//! Blocks on disk: one file, written once, memory-mapped, addressed by its digest.
//!
//! Enters: blocks in order (training first, then validation) and a note of what they were made from. Leaves: the
//! encoded bytes of any block. Never trusts a file: lengths and digest are checked before the first block is read.
//!
//! Layout, little-endian: header (128 bytes), info (JSON), one u32 of trained tokens for each block, zeros up to a
//! multiple of 8, then the blocks, all of one size. The digest is BLAKE3 over everything but itself.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use thiserror::Error;

use super::block::Block;

const MAGIC: &[u8; 8] = b"MUSTERBK";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 128;
/// Where the digest stands in the header; it comes last.
const DIGEST_AT: usize = HEADER_BYTES - 32;
const MAX_INFO_BYTES: u64 = 16 << 20;
/// Longest block, in tokens.
const MAX_SEQUENCE_LEN: u64 = 1 << 24;

#[derive(Debug, Error)]
pub enum BlockFileError {
    #[error("{path}: {source}", path = .path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path}: not a usable block file: {reason}", path = .path.display())]
    Damaged { path: PathBuf, reason: String },
}

/// What the header says; all of it follows from the blocks.
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

    /// Where index and blocks begin and where the file ends. None where the numbers overflow.
    fn layout(&self) -> Option<(u64, u64, u64)> {
        let blocks = self.blocks()?;
        let index = (HEADER_BYTES as u64 + self.info_len).next_multiple_of(8);
        let data = index
            .checked_add(blocks.checked_mul(4)?)?
            .checked_next_multiple_of(8)?;
        let block_bytes = Block::encoded_len(self.sequence_len as usize) as u64;
        Some((
            index,
            data,
            data.checked_add(blocks.checked_mul(block_bytes)?)?,
        ))
    }
}

/// A verified block file.
#[derive(Debug)]
pub struct BlockFile {
    map: Mmap,
    header: Header,
    index_at: usize,
    data_at: usize,
    digest: String,
    path: PathBuf,
}

impl BlockFile {
    /// Maps the file and checks its header, its length and its digest.
    pub fn open(path: &Path) -> Result<Self, BlockFileError> {
        let io = |source| BlockFileError::Io {
            path: path.to_owned(),
            source,
        };
        let damaged = |reason: String| BlockFileError::Damaged {
            path: path.to_owned(),
            reason,
        };
        let file = File::open(path).map_err(io)?;
        // SAFETY: block files are written under another name, renamed when complete, and never written again.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let header = Header::decode(&map).map_err(damaged)?;
        let Some((index_at, data_at, end)) = header.layout() else {
            return Err(damaged("its numbers are out of range".to_owned()));
        };
        if map.len() as u64 != end {
            return Err(damaged(format!(
                "{} bytes where {end} are expected (truncated?)",
                map.len()
            )));
        }
        let digest = content_digest(&map);
        if digest.as_bytes() != &map[DIGEST_AT..HEADER_BYTES] {
            return Err(damaged("its digest does not match".to_owned()));
        }
        Ok(Self {
            header,
            index_at: index_at as usize,
            data_at: data_at as usize,
            digest: digest.to_hex().to_string(),
            path: path.to_owned(),
            map,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tokens in a block.
    pub fn sequence_len(&self) -> usize {
        self.header.sequence_len as usize
    }

    pub fn train_blocks(&self) -> u64 {
        self.header.train_blocks
    }

    /// Numbered after the training blocks.
    pub fn eval_blocks(&self) -> u64 {
        self.header.eval_blocks
    }

    /// Training and validation blocks.
    pub fn total_blocks(&self) -> u64 {
        self.header.train_blocks + self.header.eval_blocks
    }

    /// BLAKE3 of the content, hex: equal data, tokenizer and packing give equal digests on every machine.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// What the blocks were made from, as the writer was told.
    pub fn inputs(&self) -> &[u8; 32] {
        &self.header.inputs
    }

    /// The writer's info.
    pub fn info(&self) -> &[u8] {
        &self.map[HEADER_BYTES..HEADER_BYTES + self.header.info_len as usize]
    }

    /// The block in the encoding of [`Block::encode`]. None for a number that is no block's.
    pub fn block_bytes(&self, block: u64) -> Option<&[u8]> {
        if block >= self.total_blocks() {
            return None;
        }
        let size = Block::encoded_len(self.sequence_len());
        let start = self.data_at + block as usize * size;
        Some(&self.map[start..start + size])
    }

    /// Trained tokens of the block; 0 for a number that is no block's.
    pub fn trained_tokens(&self, block: u64) -> u64 {
        if block >= self.total_blocks() {
            return 0;
        }
        let start = self.index_at + block as usize * 4;
        let mut word = [0; 4];
        word.copy_from_slice(&self.map[start..start + 4]);
        u64::from(u32::from_le_bytes(word))
    }
}

fn content_digest(bytes: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&bytes[..DIGEST_AT]);
    hasher.update_rayon(&bytes[HEADER_BYTES..]);
    hasher.finalize()
}

/// Writes a block file under a temporary name and renames it when it is complete.
///
/// `blocks` yields the training blocks and then the validation blocks, `trained_tokens` holds the count of each.
pub fn write(
    path: &Path,
    sequence_len: usize,
    (train_blocks, eval_blocks): (u64, u64),
    inputs: [u8; 32],
    info: &[u8],
    blocks: impl Iterator<Item = Block>,
) -> Result<BlockFile, BlockFileError> {
    let io = |source| BlockFileError::Io {
        path: path.to_owned(),
        source,
    };
    let header = Header {
        sequence_len: sequence_len as u64,
        train_blocks,
        eval_blocks,
        info_len: info.len() as u64,
        inputs,
    };
    let (index_at, data_at, _) = header.layout().ok_or_else(|| BlockFileError::Damaged {
        path: path.to_owned(),
        reason: "too many blocks".to_owned(),
    })?;
    let temporary = path.with_extension(format!("tmp-{}", std::process::id()));
    let file = File::create(&temporary).map_err(io)?;
    let mut out = BufWriter::with_capacity(1 << 20, &file);
    let written: std::io::Result<()> = (|| {
        out.write_all(&header.encode())?;
        out.write_all(info)?;
        out.seek(SeekFrom::Start(data_at))?;
        let mut index = Vec::new();
        let mut bytes = Vec::with_capacity(Block::encoded_len(sequence_len));
        for block in blocks {
            bytes.clear();
            block.encode(&mut bytes);
            out.write_all(&bytes)?;
            index.extend_from_slice(&(block.trained_tokens() as u32).to_le_bytes());
        }
        out.seek(SeekFrom::Start(index_at))?;
        out.write_all(&index)?;
        out.flush()
    })();
    let finished = written.and_then(|()| {
        let length = header.layout().map_or(0, |(_, _, end)| end);
        file.set_len(length)?;
        // SAFETY: the file was created above and nobody else knows its name.
        let map = unsafe { Mmap::map(&file) }?;
        let digest = content_digest(&map);
        drop(map);
        (&file).seek(SeekFrom::Start(DIGEST_AT as u64))?;
        (&file).write_all(digest.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => File::open(folder)?.sync_all(),
            _ => Ok(()),
        }
    });
    if let Err(error) = finished {
        let _ = std::fs::remove_file(&temporary);
        return Err(io(error));
    }
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
        assert!(file.block_bytes(3).is_none());
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
