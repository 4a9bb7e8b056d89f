//! Cuts examples into pieces of at most a block.
//!
//! Enters: rows of examples, with their tokens. Leaves: the pieces of which something is learned, and counts of all tokens. Never
//! learns a token twice.

use std::ops::Range;

use super::counts::{DataCounts, SetCounts};
use super::pack::{Groups, best_fit_decreasing, next_fit};
use super::tokens::TRAINED;
use crate::files::FileError;
use crate::job::{ExcessLength, JobSpec};

/// The bit of an example's length that says that a row begins with it.
pub const STARTS_ROW: u32 = 1 << 31;

/// Most examples and pieces: they are numbered in 32 bits.
pub const MAX_PIECES: usize = u32::MAX as usize;

/// Where a row is.
#[derive(Clone, Copy)]
pub struct Row {
    /// Its first example, and how many it has.
    pub first: u32,
    pub examples: u32,
    /// Its first token.
    pub start: u64,
}

/// Runs of tokens, each of which becomes one segment.
#[derive(Default)]
pub struct Pieces {
    pub starts: Vec<u64>,
    pub lengths: Vec<u32>,
}

impl Pieces {
    fn push(&mut self, start: usize, end: usize) -> Result<(), String> {
        if self.lengths.len() >= MAX_PIECES {
            return Err("the data has more than 4,294,967,295 pieces: divide it".to_owned());
        }
        self.starts.push(start as u64);
        self.lengths.push((end - start) as u32);
        Ok(())
    }

    /// Which pieces share a block, as the job says.
    pub fn grouped(&self, job: &JobSpec) -> Groups {
        match (job.sample_packing, job.mixture.packs_in_order) {
            (false, _) => Groups::of_one(self.lengths.len() as u32),
            (true, true) => next_fit(&self.lengths, job.sequence_len),
            (true, false) => best_fit_decreasing(&self.lengths, job.sequence_len),
        }
    }
}

/// Goes through the rows, and cuts their examples into pieces.
pub struct Cutter<'a> {
    job: &'a JobSpec,
    lengths: &'a [u32],
    /// After which row each dataset ends.
    ends: Vec<usize>,
    pub train: Pieces,
    pub eval: Pieces,
    pub counts: DataCounts,
    tokens: Vec<u32>,
}

impl<'a> Cutter<'a> {
    /// `lengths` are those of all examples, `sets` the number of rows of each dataset.
    pub fn new(job: &'a JobSpec, lengths: &'a [u32], sets: &[u64], counts: DataCounts) -> Self {
        let ends = sets.iter().scan(0, |end, rows| {
            *end += *rows as usize;
            Some(*end)
        });
        Self {
            job,
            lengths,
            ends: ends.collect(),
            train: Pieces::default(),
            eval: Pieces::default(),
            counts: DataCounts {
                sets: vec![SetCounts::default(); sets.len()],
                ..counts
            },
            tokens: Vec::new(),
        }
    }

    /// Adds the pieces of a row's examples, whose tokens `read` gives.
    pub fn cut(
        &mut self,
        number: usize,
        row: Row,
        is_eval: bool,
        mut read: impl FnMut(Range<usize>, &mut Vec<u32>) -> Result<(), FileError>,
    ) -> Result<(), String> {
        let set = self.ends.partition_point(|end| *end <= number);
        let mut start = row.start as usize;
        // What is evaluated is none of what a dataset gives to an epoch.
        let of_set = self.counts.sets[set];
        self.counts.sets[set].rows += 1;
        for length in examples_of(self.lengths, row) {
            let end = start + length as usize;
            read(start..end, &mut self.tokens).map_err(|error| error.to_string())?;
            let pieces = match is_eval {
                true => &mut self.eval,
                false => &mut self.train,
            };
            cut(
                (&mut self.counts, set),
                start,
                &self.tokens,
                self.job,
                pieces,
            )?;
            self.counts.examples += 1;
            self.counts.eval_examples += u64::from(is_eval);
            start = end;
        }
        if is_eval {
            self.counts.sets[set] = of_set;
        }
        Ok(())
    }
}

/// The rows in the order of the data.
pub fn rows_of(lengths: &[u32]) -> impl Iterator<Item = Row> + '_ {
    let (mut first, mut start) = (0, 0);
    std::iter::from_fn(move || {
        let rest = lengths.get(first..).filter(|rest| !rest.is_empty())?;
        let more = rest[1..]
            .iter()
            .take_while(|length| **length & STARTS_ROW == 0);
        let row = Row {
            first: first as u32,
            examples: 1 + more.count() as u32,
            start,
        };
        start += examples_of(lengths, row).map(u64::from).sum::<u64>();
        first += row.examples as usize;
        Some(row)
    })
}

/// Number of tokens of each example of a row.
pub fn examples_of(lengths: &[u32], row: Row) -> impl Iterator<Item = u32> + '_ {
    let first = row.first as usize;
    let examples = &lengths[first..first + row.examples as usize];
    examples.iter().map(|length| length & !STARTS_ROW)
}

/// Cuts an example, which begins at token `first` of all, into pieces of at most a block. The first token of a piece has nothing
/// to be predicted from, so a later piece begins with the last token of the one before: each token is learned once. Pieces of
/// which nothing is learned are left out.
fn cut(
    (counts, set): (&mut DataCounts, usize),
    first: usize,
    tokens: &[u32],
    job: &JobSpec,
    pieces: &mut Pieces,
) -> Result<(), String> {
    let sequence_len = job.sequence_len;
    counts.longest = counts.longest.max(tokens.len() as u64);
    let excess = tokens.len().saturating_sub(sequence_len) as u64;
    let strategy = job.excess_length_strategy;
    match strategy {
        ExcessLength::Split => counts.split_examples += u64::from(excess > 0),
        ExcessLength::Drop if excess > 0 => {
            counts.dropped_examples += 1;
            counts.excess_tokens += tokens.len() as u64;
            return Ok(());
        }
        ExcessLength::Truncate => {
            counts.truncated_examples += u64::from(excess > 0);
            counts.excess_tokens += excess;
        }
        // Refused before, where there is one.
        ExcessLength::Drop | ExcessLength::Raise => {}
    }
    let (mut kept, mut kept_to) = (0, 0);
    for (start, end) in windows((0, tokens.len()), sequence_len, strategy) {
        let learned = tokens[start + 1..end].iter();
        let learned = learned.filter(|token| **token & TRAINED != 0).count();
        if learned == 0 {
            counts.untrained_pieces += 1;
            continue;
        }
        pieces.push(first + start, first + end)?;
        counts.add(set, end - start, learned);
        kept += end - start.max(kept_to);
        kept_to = end;
    }
    let cut_off = match strategy {
        ExcessLength::Truncate => excess,
        _ => 0,
    };
    counts.untrained_tokens += (tokens.len() - kept) as u64 - cut_off;
    Ok(())
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
