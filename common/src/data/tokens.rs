//! All tokens of the data with their loss mask, four bytes each: the first in memory, what is beyond that in a file.
//!
//! Enters: token ids in order. Leaves: any range of them. Grows by whole chunks, so that nothing is ever copied, and holds no
//! more memory than its bound, however long the data is.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::files::FileError;
use crate::files::atomic::ScratchFile;

/// Tokens in a chunk.
const CHUNK: usize = 1 << 18;

/// Chunks that are kept in memory: 128 MiB.
const KEPT_CHUNKS: usize = 128;

/// Bytes of a token.
const TOKEN_BYTES: usize = size_of::<u32>();

/// The bit that says that a token is learned. No vocabulary reaches it.
pub const TRAINED: u32 = 1 << 31;

/// Token ids, each with [`TRAINED`] set where it is learned.
pub struct Tokens {
    /// Where the file is made once it is needed.
    folder: PathBuf,
    kept_chunks: usize,
    chunks: Vec<Vec<u32>>,
    rest: Option<ScratchFile>,
    /// The chunk that is being filled.
    last: Vec<u32>,
    len: usize,
}

impl Tokens {
    /// None yet. `folder` is where what memory is not to hold will be written.
    pub fn new(folder: &Path) -> Self {
        Self::keeping(folder, KEPT_CHUNKS)
    }

    fn keeping(folder: &Path, kept_chunks: usize) -> Self {
        Self {
            folder: folder.to_owned(),
            kept_chunks,
            chunks: Vec::new(),
            rest: None,
            last: Vec::new(),
            len: 0,
        }
    }

    pub fn extend(&mut self, ids: &[u32], trained: &[bool]) -> Result<(), FileError> {
        for (id, trained) in ids.iter().zip(trained) {
            if self.last.capacity() == 0 {
                self.last.reserve_exact(CHUNK);
            }
            assert!(
                *id < TRAINED,
                "token ids are below the size of a vocabulary"
            );
            self.last.push(if *trained { *id | TRAINED } else { *id });
            if self.last.len() == CHUNK {
                self.put_away()?;
            }
        }
        self.len += ids.len().min(trained.len());
        Ok(())
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Puts the tokens of a range into `found`, instead of what is there.
    pub fn read(&self, range: Range<usize>, found: &mut Vec<u32>) -> Result<(), FileError> {
        found.clear();
        let mut at = range.start;
        while at < range.end {
            let (chunk, start) = (at / CHUNK, at % CHUNK);
            let end = CHUNK.min(start + range.end - at);
            match self.in_memory(chunk) {
                Some(tokens) => found.extend_from_slice(&tokens[start..end]),
                None => self.read_back(chunk, start..end, found)?,
            }
            at += end - start;
        }
        Ok(())
    }

    /// Reads all tokens from the first to the last.
    pub fn in_order(&self) -> InOrder<'_> {
        InOrder {
            tokens: self,
            at: 0,
            chunk: None,
            held: Vec::new(),
        }
    }

    fn in_memory(&self, chunk: usize) -> Option<&[u32]> {
        let is_last = chunk == self.len / CHUNK;
        match self.chunks.get(chunk) {
            Some(tokens) => Some(tokens),
            None => is_last.then_some(&*self.last),
        }
    }

    fn put_away(&mut self) -> Result<(), FileError> {
        if self.chunks.len() < self.kept_chunks {
            self.chunks.push(std::mem::take(&mut self.last));
            return Ok(());
        }
        if self.rest.is_none() {
            self.rest = Some(ScratchFile::create(&self.folder)?);
        }
        if let Some(rest) = &self.rest {
            let written = { rest.file() }.write_all(bytemuck::cast_slice(&self.last));
            written.map_err(FileError::io("write", rest.path()))?;
        }
        self.last.clear();
        Ok(())
    }

    fn read_back(
        &self,
        chunk: usize,
        range: Range<usize>,
        found: &mut Vec<u32>,
    ) -> Result<(), FileError> {
        let Some(rest) = &self.rest else {
            return Ok(());
        };
        let start = found.len();
        found.resize(start + range.len(), 0);
        let first = (chunk - self.chunks.len()) * CHUNK + range.start;
        let bytes = bytemuck::cast_slice_mut(&mut found[start..]);
        read_at(rest.file(), (first * TOKEN_BYTES) as u64, bytes)
            .map_err(FileError::io("read", rest.path()))
    }
}

#[cfg(unix)]
fn read_at(file: &File, place: u64, bytes: &mut [u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, place)
}

#[cfg(not(unix))]
fn read_at(mut file: &File, place: u64, bytes: &mut [u8]) -> io::Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    let read = file.seek(SeekFrom::Start(place));
    let read = read.and_then(|_| file.read_exact(bytes));
    // What is written next goes to the end.
    let back = file.seek(SeekFrom::End(0));
    read.and(back.map(|_| ()))
}

/// Tokens from the first to the last, a chunk of the file at a time.
pub struct InOrder<'a> {
    tokens: &'a Tokens,
    at: usize,
    /// The chunk that is held of those in the file.
    chunk: Option<usize>,
    held: Vec<u32>,
}

impl InOrder<'_> {
    /// Goes on at this token.
    pub fn skip_to(&mut self, token: usize) {
        self.at = token;
    }

    /// Puts the next `count` tokens into `found`, instead of what is there.
    pub fn next(&mut self, count: usize, found: &mut Vec<u32>) -> Result<(), FileError> {
        found.clear();
        let end = (self.at + count).min(self.tokens.len());
        while self.at < end {
            let (chunk, start) = (self.at / CHUNK, self.at % CHUNK);
            let stop = CHUNK.min(start + end - self.at);
            if let Some(tokens) = self.tokens.in_memory(chunk) {
                found.extend_from_slice(&tokens[start..stop]);
            } else {
                if self.chunk != Some(chunk) {
                    self.held.clear();
                    self.tokens.read_back(chunk, 0..CHUNK, &mut self.held)?;
                    self.chunk = Some(chunk);
                }
                found.extend_from_slice(&self.held[start..stop]);
            }
            self.at += stop - start;
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn filled(folder: &Path, kept_chunks: usize, count: usize) -> Tokens {
        let mut tokens = Tokens::keeping(folder, kept_chunks);
        let ids: Vec<u32> = (0..count as u32).collect();
        let trained: Vec<bool> = ids.iter().map(|id| id % 3 == 0).collect();
        tokens.extend(&ids[..7], &trained[..7]).unwrap();
        tokens.extend(&ids[7..], &trained[7..]).unwrap();
        assert_eq!(tokens.len(), count);
        tokens
    }

    fn expected(range: Range<usize>) -> Vec<u32> {
        let tokens = range.map(|id| id as u32);
        let tokens = tokens.map(|id| {
            if id.is_multiple_of(3) {
                id | TRAINED
            } else {
                id
            }
        });
        tokens.collect()
    }

    #[test]
    fn ranges_go_over_the_ends_of_chunks_in_memory_and_in_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let count = 4 * CHUNK + 10;
        for kept_chunks in [9, 2, 1, 0] {
            let mut tokens = filled(folder.path(), kept_chunks, count);
            let mut found = Vec::new();
            for start in [0, CHUNK - 4, 2 * CHUNK - 1, 3 * CHUNK + 5, 4 * CHUNK - 2] {
                for length in [0, 1, 8, CHUNK + 3] {
                    let range = start..(start + length).min(count);
                    tokens.read(range.clone(), &mut found).unwrap();
                    assert!(found == expected(range.clone()), "{kept_chunks}: {range:?}");
                }
            }
            // Reading does not move where the next ones go.
            let more: Vec<u32> = (count as u32..(count + CHUNK) as u32).collect();
            let trained: Vec<bool> = more.iter().map(|id| id % 3 == 0).collect();
            tokens.extend(&more, &trained).unwrap();
            let mut in_order = tokens.in_order();
            let (mut at, steps) = (0, [1, 100_000, CHUNK, 3 * CHUNK]);
            for step in steps.into_iter().cycle() {
                in_order.next(step, &mut found).unwrap();
                let end = (at + step).min(tokens.len());
                assert!(found == expected(at..end), "{kept_chunks}: {at}..{end}");
                at = end;
                if at == tokens.len() {
                    break;
                }
            }
        }
    }

    #[test]
    fn what_was_written_to_a_file_is_gone_with_the_tokens() {
        let folder = tempfile::tempdir().unwrap();
        drop(filled(folder.path(), 0, CHUNK + 1));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let gone = folder.path().join("gone");
        std::fs::write(&gone, "no folder").unwrap();
        let mut tokens = Tokens::keeping(&gone, 0);
        let error = tokens
            .extend(&vec![1; CHUNK], &vec![true; CHUNK])
            .unwrap_err();
        assert!(error.to_string().contains("gone"), "{error}");
    }
}
