//! Finds which rows of the datasets are in a block. The block file does not say: the examples are made once more and compared.
//!
//! Enters: the job, as it was prepared, and blocks. Leaves: file and line of each row with a piece in one of them. For
//! messages about what went wrong; slow, as reading all data is.

use std::collections::HashSet;
use std::fmt;
use std::path::PathBuf;

use super::block::{Block, PADDING_SEGMENT};
use super::blockfile::BlockFile;
use super::collect::Source;
use super::cut::windows;
use super::record::DataErrors;
use super::rows::{Unit, place_of};
use super::template::ChatTemplate;
use super::tokenize::Tokenizer;
use crate::job::JobSpec;

/// A row of a dataset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    pub file: PathBuf,
    /// Line in the file, from 1.
    pub line: u64,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&place_of(&self.file, self.line, Unit::Line))
    }
}

/// Finds the rows in these blocks, in the order of the data. Rows of equal text cannot be told apart and are all named.
pub fn origins(
    job: &JobSpec,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    file: &BlockFile,
    blocks: &[u64],
) -> Result<Vec<Origin>, DataErrors> {
    let wanted = segments(file, blocks);
    let source = Source::new(job, tokenizer, template)?;
    source.drop_texts();
    let mut found: Vec<Origin> = Vec::new();
    source.read(|batch| {
        for example in batch {
            let mut pieces = windows(
                (0, example.ids.len()),
                job.sequence_len,
                job.excess_length_strategy,
            );
            if !pieces.any(|(start, end)| wanted.contains(&example.ids[start..end])) {
                continue;
            }
            let origin = Origin {
                file: job
                    .dataset(example.dataset)
                    .map_or_else(PathBuf::new, |dataset| {
                        dataset.shown_file(example.file).to_owned()
                    }),
                line: example.line,
            };
            if found.last() != Some(&origin) {
                found.push(origin);
            }
        }
        true
    })?;
    Ok(found)
}

/// The tokens of each segment of these blocks.
fn segments(file: &BlockFile, blocks: &[u64]) -> HashSet<Vec<u32>> {
    let bytes = blocks.iter().filter_map(|block| file.block_bytes(*block));
    let blocks = bytes.filter_map(|bytes| Block::decode(bytes, file.sequence_len()).ok());
    let mut segments = HashSet::new();
    for block in blocks {
        let tokens: Vec<(u16, u32)> = block.segments.into_iter().zip(block.tokens).collect();
        for run in tokens.chunk_by(|(one, _), (other, _)| one == other) {
            if run[0].0 != PADDING_SEGMENT {
                segments.insert(run.iter().map(|(_, token)| *token).collect());
            }
        }
    }
    segments
}
