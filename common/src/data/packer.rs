//! Collects all examples of the datasets, cuts them, holds some out, groups them into blocks and writes these.
//!
//! Enters: examples in the order of the data. Leaves: the block file and the counts. Every token that comes in is either
//! in a block or counted as left out.

use std::path::Path;

use super::block::{Block, PADDING_SEGMENT};
use super::blockfile::{self, BlockFile};
use super::counts::DataCounts;
use super::example::Example;
use super::pack::best_fit_decreasing;
use super::tokens::Tokens;
use crate::files::FileError;
use crate::job::{ExcessLength, JobSpec, ValSetSize};
use crate::plan::DataSize;
use crate::progress::Progress;
use crate::rng::CounterRng;
use crate::text::{count, grouped};

/// Random stream that draws which examples are held out.
const STREAM_VALIDATION: u64 = u64::from_be_bytes(*b"validate");

/// All examples, end to end, before they are packed.
#[derive(Default)]
pub struct Packer {
    tokens: Tokens,
    /// Where each example ends.
    ends: Vec<usize>,
    /// The first example of each row.
    rows: Vec<usize>,
    /// Number of examples before the first one of a dataset that is only evaluated. None: there is none.
    trained_examples: Option<usize>,
    /// Whether the row of the last example has more of them.
    row_goes_on: bool,
    /// Number of rows of which an answer says that it is not learned.
    pub left_out_rows: u64,
    pub counts: DataCounts,
    longest: Option<Longest>,
}

/// The longest example so far, and its row.
struct Longest {
    tokens: usize,
    dataset: usize,
    file: usize,
    line: u64,
}

/// A run of tokens that becomes one segment.
#[derive(Clone, Copy)]
struct Piece {
    start: usize,
    end: usize,
}

/// Examples grouped into blocks, ready to be written.
pub struct Packed {
    tokens: Tokens,
    /// The pieces of each block: training blocks, then validation blocks.
    groups: Vec<Vec<Piece>>,
    pub counts: DataCounts,
}

impl Packer {
    /// Adds an example, in the order of the data. Those of `is_test` are evaluated only, and come last.
    pub fn add(&mut self, example: &Example, is_test: bool) {
        if is_test {
            self.trained_examples.get_or_insert(self.ends.len());
        }
        if example.starts_row {
            self.rows.push(self.ends.len());
        }
        let tokens = example.ids.len();
        if self
            .longest
            .as_ref()
            .is_none_or(|longest| longest.tokens < tokens)
        {
            self.longest = Some(Longest {
                tokens,
                dataset: example.dataset,
                file: example.file,
                line: example.line,
            });
        }
        self.tokens.extend(&example.ids, &example.trained);
        self.ends.push(self.tokens.len());
        // The last example of a row that has others before it.
        self.counts.divided_rows += u64::from(self.row_goes_on && !example.is_apart);
        self.row_goes_on = example.is_apart;
        self.counts.added_eos += u64::from(example.added_eos && example.templated);
    }

    /// Size of the examples, uncut, for a model of so many positions.
    pub fn size(&self, model_positions: Option<usize>) -> DataSize {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let longest = starts.zip(&self.ends).map(|(start, end)| end - start).max();
        DataSize {
            examples: self.ends.len() as u64,
            longest: longest.unwrap_or(0) as u64,
            tokens: self.tokens.len() as u64,
            model_positions,
        }
    }

    /// Cuts, holds out and groups the examples by the job's settings. An error says that there is nothing to learn.
    pub fn pack(mut self, job: &JobSpec) -> Result<Packed, String> {
        let examples = self.ends.len();
        if job.excess_length_strategy == ExcessLength::Raise {
            self.refuse_longer(job)?;
        }
        let held_out = match self.trained_examples {
            Some(trained) => (0..examples).map(|example| example >= trained).collect(),
            None => held_out(job, &self.rows, examples)?,
        };
        let (mut train, mut eval) = (Vec::new(), Vec::new());
        for (example, held_out) in held_out.iter().enumerate() {
            let pieces = self.pieces(example, job);
            if *held_out {
                eval.extend(pieces);
                self.counts.eval_examples += 1;
            } else {
                train.extend(pieces);
            }
        }
        if train.is_empty() {
            return Err(self.nothing_to_learn("the training data has no trained token"));
        }
        if eval.is_empty() && self.counts.eval_examples > 0 {
            return Err(self.nothing_to_learn("the validation examples have no trained token"));
        }
        let mut groups = group(&train, job);
        self.counts.examples = examples as u64;
        self.counts.blocks = groups.len() as u64;
        groups.extend(group(&eval, job));
        self.counts.eval_blocks = groups.len() as u64 - self.counts.blocks;
        for piece in train.iter().chain(&eval) {
            let learned = self.tokens.trained(piece.start + 1..piece.end).count();
            let tokens = (piece.end - piece.start) as u64;
            self.counts.tokens += tokens;
            self.counts.squared_tokens += tokens * tokens;
            self.counts.trained_tokens += learned as u64;
        }
        let in_blocks = (groups.len() * job.sequence_len) as u64;
        self.counts.padding_tokens = in_blocks - self.counts.tokens;
        Ok(Packed {
            tokens: self.tokens,
            groups,
            counts: self.counts,
        })
    }

    /// Refuses data with an example longer than a block.
    fn refuse_longer(&self, job: &JobSpec) -> Result<(), String> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let lengths = starts.zip(&self.ends).map(|(start, end)| end - start);
        let longer = lengths.filter(|length| *length > job.sequence_len).count();
        let Some(longest) = self.longest.as_ref().filter(|_| longer > 0) else {
            return Ok(());
        };
        let file = job.dataset(longest.dataset);
        Err(format!(
            "{} longer than sequence_len {} (excess_length_strategy: raise); the longest is {}:{}, of {} tokens",
            match longer {
                1 => "1 example is".to_owned(),
                some => format!("{} examples are", grouped(some as u64)),
            },
            job.sequence_len,
            file.map(|dataset| dataset.file(longest.file).display().to_string())
                .unwrap_or_default(),
            longest.line,
            grouped(longest.tokens as u64)
        ))
    }

    /// An error that there is nothing to learn: `what`, with the cause as far as it is known.
    fn nothing_to_learn(&self, what: &str) -> String {
        const SWITCHES: &str = "`train: false`, `weight: 0` or `loss: false`";
        let rows = count(self.counts.rows, "row");
        match self.left_out_rows {
            0 => format!("nothing to learn: {what} (is every answer empty?)"),
            some if some == self.counts.rows => format!(
                "nothing to learn: {what}, because answers say that they are not learned ({SWITCHES}) in all of {rows}"
            ),
            some => format!(
                "nothing to learn: {what}: answers say that they are not learned ({SWITCHES}) in {} of {rows}, and the others are \
                 empty or held out",
                grouped(some)
            ),
        }
    }

    /// Cuts an example into pieces of at most a block. The first token of a piece has nothing to be predicted from, so a later
    /// piece begins with the last token of the one before: each token is learned once. Pieces of which nothing is learned are
    /// left out.
    fn pieces(&mut self, example: usize, job: &JobSpec) -> Vec<Piece> {
        let sequence_len = job.sequence_len;
        let first = example.checked_sub(1).map_or(0, |before| self.ends[before]);
        let last = self.ends[example];
        self.counts.longest = self.counts.longest.max((last - first) as u64);
        let excess = (last - first).saturating_sub(sequence_len) as u64;
        let strategy = job.excess_length_strategy;
        match strategy {
            ExcessLength::Split => self.counts.split_examples += u64::from(excess > 0),
            ExcessLength::Drop if excess > 0 => {
                self.counts.dropped_examples += 1;
                self.counts.excess_tokens += (last - first) as u64;
                return Vec::new();
            }
            ExcessLength::Truncate => {
                self.counts.truncated_examples += u64::from(excess > 0);
                self.counts.excess_tokens += excess;
            }
            // Refused before, where there is one.
            ExcessLength::Drop | ExcessLength::Raise => {}
        }
        let mut pieces = Vec::with_capacity(1);
        let (mut kept, mut kept_to) = (0, first);
        for (start, end) in windows((first, last), sequence_len, strategy) {
            if self.tokens.trained(start + 1..end).next().is_some() {
                pieces.push(Piece { start, end });
                kept += end - start.max(kept_to);
                kept_to = end;
            } else {
                self.counts.untrained_pieces += 1;
            }
        }
        let cut_off = match strategy {
            ExcessLength::Truncate => excess,
            _ => 0,
        };
        self.counts.untrained_tokens += (last - first - kept) as u64 - cut_off;
        pieces
    }
}

/// Token ranges of the pieces of an example, which goes from the first token to before the last.
pub fn windows(
    (first, last): (usize, usize),
    sequence_len: usize,
    strategy: ExcessLength,
) -> impl Iterator<Item = (usize, usize)> {
    let is_longer = last - first > sequence_len;
    let last = match strategy {
        ExcessLength::Truncate if is_longer => first + sequence_len,
        ExcessLength::Drop if is_longer => first,
        _ => last,
    };
    let end = move |start: usize| last.min(start + sequence_len);
    let starts = std::iter::successors(Some(first), move |start| {
        let end = end(*start);
        (end < last).then(|| (end - 1).max(start + 1))
    });
    let starts = starts.take_while(move |start| *start < last);
    starts.map(move |start| (start, end(start)))
}

fn group(pieces: &[Piece], job: &JobSpec) -> Vec<Vec<Piece>> {
    if !job.sample_packing {
        return pieces.iter().map(|piece| vec![*piece]).collect();
    }
    let lengths: Vec<usize> = pieces.iter().map(|piece| piece.end - piece.start).collect();
    best_fit_decreasing(&lengths, job.sequence_len)
        .into_iter()
        .map(|group| group.into_iter().map(|piece| pieces[piece]).collect())
        .collect()
}

/// For each example, whether it is held out for validation: those of rows drawn from the seed, or of the last rows where
/// nothing is shuffled. The examples of one row stay together, since they share their text.
fn held_out(job: &JobSpec, rows: &[usize], examples: usize) -> Result<Vec<bool>, String> {
    let wanted = match job.val_set_size {
        ValSetSize::None => 0,
        ValSetSize::Examples(count) => count,
        ValSetSize::Fraction(fraction) => (examples as f64 * fraction).ceil() as usize,
    };
    let mut order: Vec<usize> = (0..rows.len()).rev().collect();
    if job.shuffle {
        CounterRng::new(job.seed, &[STREAM_VALIDATION]).shuffle(&mut order);
    }
    let mut held_out = vec![false; examples];
    let mut count = 0;
    for row in order {
        if count >= wanted {
            break;
        }
        let end = rows.get(row + 1).copied().unwrap_or(examples);
        held_out[rows[row]..end].fill(true);
        count += end - rows[row];
    }
    if wanted > 0 && count >= examples {
        return Err(format!(
            "val_set_size holds out {wanted} of {examples} examples: none is left to train on"
        ));
    }
    Ok(held_out)
}

impl Packed {
    pub fn write(
        &self,
        path: &Path,
        job: &JobSpec,
        inputs: blake3::Hash,
        pad_id: u32,
        progress: &Progress,
    ) -> Result<BlockFile, blockfile::BlockFileError> {
        let io = |error| FileError::io("write", path)(error);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(io)?;
        }
        let info = serde_json::to_vec(&self.counts).map_err(|error| io(error.into()))?;
        progress.begin("packing the data", self.groups.len() as u64);
        blockfile::write_watched(
            path,
            job.sequence_len,
            (self.counts.blocks, self.counts.eval_blocks),
            *inputs.as_bytes(),
            &info,
            self.groups
                .iter()
                .map(|group| self.block(group, job.sequence_len, pad_id)),
            progress,
        )
    }

    fn block(&self, group: &[Piece], sequence_len: usize, pad_id: u32) -> Block {
        let mut block = Block {
            tokens: Vec::with_capacity(sequence_len),
            segments: Vec::with_capacity(sequence_len),
            trained: Vec::with_capacity(sequence_len),
        };
        for (segment, piece) in (1..).zip(group) {
            for (token, trained) in self.tokens.range(piece.start..piece.end) {
                block.tokens.push(token);
                block.trained.push(trained);
            }
            block.trained[block.segments.len()] = false;
            block.segments.resize(block.tokens.len(), segment);
        }
        block.tokens.resize(sequence_len, pad_id);
        block.segments.resize(sequence_len, PADDING_SEGMENT);
        block.trained.resize(sequence_len, false);
        block
    }
}
