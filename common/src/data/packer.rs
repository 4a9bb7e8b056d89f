//! Collects all examples of the datasets, cuts them, holds some out, groups them into blocks and writes these.
//!
//! Enters: examples in the order of the data. Leaves: the block file and the counts. Every token that comes in is either
//! in a block or counted as left out.

use std::path::Path;

use super::block::{Block, PADDING_SEGMENT};
use super::blockfile::{self, BlockFile};
use super::counts::DataCounts;
use super::cut::{Cutter, MAX_PIECES, Pieces, Row, STARTS_ROW, examples_of, rows_of};
use super::example::Example;
use super::held_out::held_out;
use super::mixture::{self, Set};
use super::pack::Groups;
use super::rows::{Unit, place_of};
use super::tokens::{TRAINED, Tokens};
use super::unlearned::{UnlearnedRows, nothing_to_learn};
use crate::files::FileError;
use crate::job::{ExcessLength, JobSpec, ValSetSize};
use crate::plan::DataSize;
use crate::progress::Progress;
use crate::text::grouped;

/// All examples, end to end, before they are packed.
pub struct Packer {
    tokens: Tokens,
    /// Tokens of each example, with [`STARTS_ROW`].
    lengths: Vec<u32>,
    /// Number of rows of each dataset; those that are evaluated only come last.
    sets: Vec<u64>,
    /// The rows in the order in which they are trained on; None where that is the order of the data.
    mixed: Option<Mixed>,
    /// For each row whether it is evaluated only; None where none is.
    held_out: Option<Vec<bool>>,
    /// Whether the row of the last example has more of them.
    row_goes_on: bool,
    /// Rows that say themselves that little or nothing of them is learned.
    pub unlearned: UnlearnedRows,
    pub counts: DataCounts,
    longest: Option<Longest>,
}

/// Rows in another order than that of the data.
struct Mixed {
    rows: Vec<Row>,
    order: Vec<u32>,
}

/// The longest example so far, and its row.
struct Longest {
    tokens: usize,
    dataset: usize,
    file: usize,
    line: u64,
}

/// Examples grouped into blocks, ready to be written.
pub struct Packed {
    tokens: Tokens,
    /// The pieces and which of them share a block, those to learn and those held out.
    train: (Pieces, Groups),
    eval: (Pieces, Groups),
    pub counts: DataCounts,
}

impl Packer {
    /// Nothing yet. `folder` is where what memory is not to hold will be written.
    pub fn new(folder: &Path) -> Self {
        Self {
            tokens: Tokens::new(folder),
            lengths: Vec::new(),
            sets: Vec::new(),
            mixed: None,
            held_out: None,
            row_goes_on: false,
            unlearned: UnlearnedRows::default(),
            counts: DataCounts::default(),
            longest: None,
        }
    }

    /// Adds an example, in the order of the data.
    pub fn add(&mut self, example: &Example) -> Result<(), String> {
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
        let length = u32::try_from(tokens).ok();
        let length = length.filter(|length| length & STARTS_ROW == 0);
        let Some(length) = length.filter(|_| self.lengths.len() < MAX_PIECES) else {
            return Err("the data is too large: divide it".to_owned());
        };
        self.tokens
            .extend(&example.ids, &example.trained)
            .map_err(|error| error.to_string())?;
        let starts_row = if example.starts_row { STARTS_ROW } else { 0 };
        let sets = self.sets.len().max(example.dataset + 1);
        self.sets.resize(sets, 0);
        self.sets[example.dataset] += u64::from(example.starts_row);
        self.lengths.push(length | starts_row);
        // The last example of a row that has others before it.
        self.counts.divided_rows += u64::from(self.row_goes_on && !example.is_apart);
        self.row_goes_on = example.is_apart;
        self.counts.added_eos += u64::from(example.added_eos && example.templated);
        Ok(())
    }

    /// Decides which rows are trained on, how often and in what order. Before [`Self::size`] and [`Self::pack`].
    pub fn mix(&mut self, job: &JobSpec) -> Result<(), String> {
        self.sets.resize(job.all_datasets().count(), 0);
        if self.sets[..job.datasets.len()].iter().sum::<u64>() == 0 {
            return Err(nothing_to_learn(
                job,
                &self.counts,
                self.unlearned,
                "no example is left",
            ));
        }
        let sets = job.datasets.iter().zip(&self.sets);
        let sets: Vec<Set> = sets
            .map(|(dataset, rows)| Set {
                rows: *rows,
                fraction: dataset.selection.fraction,
                repeat: dataset.selection.repeat.unwrap_or(1),
            })
            .collect();
        self.mixed = mixture::order(&sets, &job.mixture, job.seed)?.map(|order| Mixed {
            rows: rows_of(&self.lengths).collect(),
            order,
        });
        self.held_out = self.held_out(job)?;
        Ok(())
    }

    fn is_held_out(&self, row: usize) -> bool {
        self.held_out.as_ref().is_some_and(|held_out| held_out[row])
    }

    /// The rows as they are trained on and evaluated, where that is not the order of the data.
    fn used_rows<'a>(&'a self, mixed: &'a Mixed) -> impl Iterator<Item = Row> + 'a {
        let order = mixed.order.iter().map(|row| *row as usize);
        let trained = order.filter(|row| !self.is_held_out(*row));
        let evaluated = (0..mixed.rows.len()).filter(|row| self.is_held_out(*row));
        trained.chain(evaluated).map(|row| mixed.rows[row])
    }

    /// Size of the examples as they are trained on, uncut, for a model of so many positions.
    pub fn size(&self, model_positions: Option<usize>) -> DataSize {
        let longest = self.longest.as_ref().map_or(0, |longest| longest.tokens);
        let mut size = DataSize {
            examples: self.lengths.len() as u64,
            longest: longest as u64,
            tokens: self.tokens.len() as u64,
            model_positions,
        };
        if let Some(mixed) = &self.mixed {
            (size.examples, size.longest, size.tokens) = (0, 0, 0);
            for row in self.used_rows(mixed) {
                for length in examples_of(&self.lengths, row) {
                    size.examples += 1;
                    size.longest = size.longest.max(u64::from(length));
                    size.tokens += u64::from(length);
                }
            }
        }
        size
    }

    /// Cuts, holds out and groups the examples by the job's settings. An error says that there is nothing to learn, or what
    /// could not be read again.
    pub fn pack(mut self, job: &JobSpec) -> Result<Packed, String> {
        if job.excess_length_strategy == ExcessLength::Raise {
            self.refuse_longer(job)?;
        }
        let counts = std::mem::take(&mut self.counts);
        let mut cutter = Cutter::new(job, &self.lengths, &self.sets, counts);
        if let Some(mixed) = &self.mixed {
            for row in mixed.order.iter().map(|row| *row as usize) {
                if !self.is_held_out(row) {
                    cutter.cut(row, mixed.rows[row], false, |range, found| {
                        self.tokens.read(range, found)
                    })?;
                }
            }
        }
        let mut in_order = self.tokens.in_order();
        for (number, row) in rows_of(&self.lengths).enumerate() {
            let is_eval = self.is_held_out(number);
            if is_eval || self.mixed.is_none() {
                cutter.cut(number, row, is_eval, |range, found| {
                    in_order.skip_to(range.start);
                    in_order.next(range.len(), found)
                })?;
            }
        }
        let Cutter {
            train,
            eval,
            counts,
            ..
        } = cutter;
        self.counts = counts;
        if !job.test_datasets.is_empty() && self.counts.eval_examples == 0 {
            return Err("test_datasets: nothing is left to evaluate: every example was left out (min_sample_len, dataset_exact_deduplication)".to_owned());
        }
        if train.lengths.is_empty() {
            let what = "the training data has no trained token";
            return Err(nothing_to_learn(job, &self.counts, self.unlearned, what));
        }
        if eval.lengths.is_empty() && self.counts.eval_examples > 0 {
            let what = "the validation examples have no trained token";
            return Err(nothing_to_learn(job, &self.counts, self.unlearned, what));
        }
        self.counts.sets.truncate(job.datasets.len());
        for (set, rows) in self.counts.sets.iter_mut().zip(&self.sets) {
            set.rows_read = *rows;
        }
        if job.datasets.len() == 1 {
            // It is all that is counted.
            self.counts.sets.clear();
        }
        (self.lengths, self.mixed, self.held_out) = (Vec::new(), None, None);
        let groups = train.grouped(job);
        let eval_groups = eval.grouped(job);
        self.counts.blocks = groups.len() as u64;
        self.counts.eval_blocks = eval_groups.len() as u64;
        let in_blocks = (self.counts.blocks + self.counts.eval_blocks) * job.sequence_len as u64;
        self.counts.padding_tokens = in_blocks - self.counts.tokens;
        Ok(Packed {
            tokens: self.tokens,
            train: (train, groups),
            eval: (eval, eval_groups),
            counts: self.counts,
        })
    }

    /// For each row whether it is held out; None where none is.
    fn held_out(&self, job: &JobSpec) -> Result<Option<Vec<bool>>, String> {
        if !job.test_datasets.is_empty() {
            let trained: u64 = self.sets[..job.datasets.len()].iter().sum();
            let all: u64 = self.sets.iter().sum();
            return Ok(Some((0..all).map(|row| row >= trained).collect()));
        }
        if job.val_set_size == ValSetSize::None {
            return Ok(None);
        }
        let examples: Vec<u32> = rows_of(&self.lengths).map(|row| row.examples).collect();
        let mut is_used = vec![self.mixed.is_none(); examples.len()];
        let mixed = self.mixed.iter().flat_map(|mixed| &mixed.order);
        mixed.for_each(|row| is_used[*row as usize] = true);
        held_out(job, &examples, &is_used).map(Some)
    }

    /// Refuses data with an example longer than a block.
    fn refuse_longer(&self, job: &JobSpec) -> Result<(), String> {
        let used: Box<dyn Iterator<Item = u32>> = match &self.mixed {
            None => Box::new(self.lengths.iter().map(|length| length & !STARTS_ROW)),
            Some(mixed) => {
                let rows = self.used_rows(mixed);
                Box::new(rows.flat_map(|row| examples_of(&self.lengths, row)))
            }
        };
        let longer = used
            .filter(|length| *length as usize > job.sequence_len)
            .count();
        let Some(longest) = self.longest.as_ref().filter(|_| longer > 0) else {
            return Ok(());
        };
        let file = job.dataset(longest.dataset);
        Err(format!(
            "{} longer than sequence_len {} (excess_length_strategy: raise); the longest is {}, of {} tokens",
            match longer {
                1 => "1 example is".to_owned(),
                some => format!("{} examples are", grouped(some as u64)),
            },
            job.sequence_len,
            file.map(|dataset| {
                place_of(dataset.shown_file(longest.file), longest.line, Unit::Line)
            })
            .unwrap_or_default(),
            grouped(longest.tokens as u64)
        ))
    }
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
        progress.begin(
            "packing the data",
            self.counts.blocks + self.counts.eval_blocks,
        );
        let blocks = [&self.train, &self.eval]
            .into_iter()
            .flat_map(|(pieces, groups)| {
                let groups = groups.iter();
                groups.map(|group| self.block(pieces, group, job.sequence_len, pad_id))
            });
        blockfile::write_watched(
            path,
            job.sequence_len,
            (self.counts.blocks, self.counts.eval_blocks),
            *inputs.as_bytes(),
            &info,
            blocks,
            progress,
        )
    }

    fn block(
        &self,
        pieces: &Pieces,
        group: &[u32],
        sequence_len: usize,
        pad_id: u32,
    ) -> Result<Block, FileError> {
        let mut block = Block {
            tokens: Vec::with_capacity(sequence_len),
            segments: Vec::with_capacity(sequence_len),
            trained: Vec::with_capacity(sequence_len),
        };
        let mut tokens = Vec::with_capacity(sequence_len);
        for (segment, piece) in (1..).zip(group) {
            let start = pieces.starts[*piece as usize] as usize;
            let end = start + pieces.lengths[*piece as usize] as usize;
            self.tokens.read(start..end, &mut tokens)?;
            let ids = tokens.iter().map(|token| token & !TRAINED);
            block.tokens.extend(ids);
            let trained = tokens.iter().map(|token| token & TRAINED != 0);
            block.trained.extend(trained);
            block.trained[block.segments.len()] = false;
            block.segments.resize(block.tokens.len(), segment);
        }
        block.tokens.resize(sequence_len, pad_id);
        block.segments.resize(sequence_len, PADDING_SEGMENT);
        block.trained.resize(sequence_len, false);
        Ok(block)
    }
}
