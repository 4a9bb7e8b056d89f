//! The whole dataset, once: rows become examples, examples become blocks, blocks become one file.
//!
//! Enters: the job, the model's tokenizer and template. Leaves: the block file, counts for people, samples; or every
//! problem of every row. Never drops text without counting it.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::block::{Block, PADDING_SEGMENT};
use super::blockfile::{self, BlockFile};
use super::collect::Source;
use super::example::Example;
use super::pack::best_fit_decreasing;
use super::record::DataErrors;
use super::template::ChatTemplate;
use super::tokenize::Tokenizer;
use crate::files::{FileError, file_digest};
use crate::job::{JobSpec, ValSetSize};
use crate::rng::CounterRng;

/// Changes whenever equal inputs may give other blocks.
const PACKING_VERSION: u64 = 1;
/// Which examples are held out.
const STREAM_VALIDATION: u64 = u64::from_be_bytes(*b"validate");

/// What the data came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataCounts {
    pub rows: u64,
    /// Tokenised texts, training and validation.
    pub examples: u64,
    pub eval_examples: u64,
    /// Blocks to train on.
    pub blocks: u64,
    pub eval_blocks: u64,
    /// In all blocks, without padding.
    pub tokens: u64,
    pub trained_tokens: u64,
    pub padding_tokens: u64,
    /// Tokens of the longest example.
    pub longest: u64,
    /// Examples longer than a block, cut into pieces.
    pub split_examples: u64,
    /// Pieces and examples left out because nothing in them is learned.
    pub untrained_pieces: u64,
    pub untrained_tokens: u64,
    /// Examples of a template that ends no turn with a special token: EOS was added.
    pub added_eos: u64,
    /// The template prints the date, so another day gives other tokens.
    pub dated_template: bool,
}

/// The data, ready for training.
#[derive(Debug)]
pub struct PreparedData {
    pub file: BlockFile,
    pub counts: DataCounts,
    /// The first example, for people.
    pub samples: Vec<Sample>,
    /// BLAKE3 over the dataset files, hex.
    pub data_digest: String,
}

/// An example as people and `check --json` see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Sample {
    pub text: String,
    pub input_ids: Vec<u32>,
    /// The token where it is learned, else -100.
    pub labels: Vec<i64>,
    #[serde(skip)]
    pub spans: Vec<TextSpan>,
}

/// A stretch of text that is learned, or is not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextSpan {
    pub text: String,
    pub trained: bool,
}

/// Makes the block file in `out_dir`, or takes the one that was made there from the same inputs.
pub fn prepare_blocks(
    job: &JobSpec,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    out_dir: &Path,
) -> Result<PreparedData, DataErrors> {
    let data_digest = data_digest(job)?;
    let inputs = inputs_digest(job, &data_digest, tokenizer, template);
    let path = out_dir.join(format!("blocks-{}.bin", &inputs.to_hex()[..16]));
    if let Some((file, counts)) = reuse(&path, job, &inputs) {
        return Ok(PreparedData {
            file,
            counts,
            samples: samples(job, tokenizer, template, 1)?,
            data_digest,
        });
    }
    let source = Source::new(job, tokenizer, template)?;
    let mut packer = Packer::default();
    let mut first = None;
    packer.counts.rows = source.read(|batch| {
        for example in batch {
            first.get_or_insert_with(|| sample_of(&example, tokenizer, job.sequence_len));
            packer.add(&example);
        }
        true
    })?;
    packer.counts.dated_template = template.is_some_and(ChatTemplate::uses_the_date);
    let packed = packer
        .pack(job)
        .map_err(|reason| DataErrors::one(None, reason))?;
    let file = packed
        .write(&path, job, inputs, source.pad_id())
        .map_err(|error| DataErrors::one(None, error.to_string()))?;
    Ok(PreparedData {
        file,
        counts: packed.counts,
        samples: first.into_iter().collect(),
        data_digest,
    })
}

/// The first `count` examples of the data.
pub fn samples(
    job: &JobSpec,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    count: usize,
) -> Result<Vec<Sample>, DataErrors> {
    let source = Source::new(job, tokenizer, template)?;
    let mut found = Vec::new();
    source.read(|batch| {
        found.extend(batch);
        found.len() < count
    })?;
    found.truncate(count);
    Ok(found
        .iter()
        .map(|example| sample_of(example, tokenizer, job.sequence_len))
        .collect())
}

fn reuse(path: &Path, job: &JobSpec, inputs: &blake3::Hash) -> Option<(BlockFile, DataCounts)> {
    let file = BlockFile::open(path).ok()?;
    let counts: DataCounts = serde_json::from_slice(file.info()).ok()?;
    let usable = file.inputs() == inputs.as_bytes()
        && file.sequence_len() == job.sequence_len
        && file.train_blocks() == counts.blocks
        && file.train_blocks() > 0
        && file.eval_blocks() == counts.eval_blocks;
    usable.then_some((file, counts))
}

/// BLAKE3 over the dataset files in order, hex.
fn data_digest(job: &JobSpec) -> Result<String, DataErrors> {
    let mut all = blake3::Hasher::new();
    let mut errors = DataErrors::default();
    for dataset in &job.datasets {
        match dataset_digest(&dataset.path) {
            Ok(digest) => drop(all.update(digest.as_bytes())),
            Err(reason) => errors.merge(DataErrors::one(Some(&dataset.path), reason)),
        }
    }
    errors.or(all.finalize().to_hex().to_string())
}

fn dataset_digest(path: &Path) -> Result<String, String> {
    let metadata = std::fs::metadata(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => "no such file".to_owned(),
        _ => error.to_string(),
    })?;
    if !metadata.is_file() {
        return Err("is not a file: name a JSON Lines file".to_owned());
    }
    if metadata.len() == 0 {
        return Err("the dataset is empty".to_owned());
    }
    file_digest(path).map_err(|error| error.to_string())
}

/// Everything that decides what the blocks hold. A template's date does not count: a run that is resumed the next day
/// goes on with the blocks it began with.
fn inputs_digest(
    job: &JobSpec,
    data_digest: &str,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
) -> blake3::Hash {
    let datasets: Vec<_> = job
        .datasets
        .iter()
        .map(|dataset| (dataset.kind, &dataset.split, &dataset.fields))
        .collect();
    let held_out = (job.val_set_size, job.seed, job.shuffle);
    let description = serde_json::json!([
        PACKING_VERSION,
        crate::VERSION,
        data_digest,
        datasets,
        (job.val_set_size != ValSetSize::None).then_some(held_out),
        (job.sequence_len, job.sample_packing, job.train_on_inputs),
        tokenizer.digest(),
        template.map(ChatTemplate::source),
    ]);
    blake3::hash(description.to_string().as_bytes())
}

/// All examples, end to end.
#[derive(Default)]
struct Packer {
    tokens: Vec<u32>,
    trained: Vec<bool>,
    /// Where each example ends.
    ends: Vec<usize>,
    counts: DataCounts,
}

/// A run of tokens that becomes one segment.
#[derive(Clone, Copy)]
struct Piece {
    start: usize,
    end: usize,
}

struct Packed {
    tokens: Vec<u32>,
    trained: Vec<bool>,
    /// Training blocks, then validation blocks.
    groups: Vec<Vec<Piece>>,
    counts: DataCounts,
}

impl Packer {
    fn add(&mut self, example: &Example) {
        self.tokens.extend_from_slice(&example.ids);
        self.trained.extend_from_slice(&example.trained);
        self.ends.push(self.tokens.len());
        self.counts.added_eos += u64::from(example.added_eos && example.templated);
    }

    fn pack(mut self, job: &JobSpec) -> Result<Packed, String> {
        let count = self.ends.len();
        let held_out = held_out(job, count)?;
        let (mut train, mut eval) = (Vec::new(), Vec::new());
        for (example, held_out) in held_out.iter().enumerate() {
            let pieces = self.pieces(example, job.sequence_len);
            if *held_out {
                eval.extend(pieces);
                self.counts.eval_examples += 1;
            } else {
                train.extend(pieces);
            }
        }
        if train.is_empty() {
            return Err(
                "nothing to learn: the training data has no trained token (is every answer empty?)"
                    .to_owned(),
            );
        }
        if eval.is_empty() && self.counts.eval_examples > 0 {
            return Err("the validation examples have no trained token".to_owned());
        }
        let mut groups = group(&train, job);
        self.counts.examples = count as u64;
        self.counts.blocks = groups.len() as u64;
        groups.extend(group(&eval, job));
        self.counts.eval_blocks = groups.len() as u64 - self.counts.blocks;
        let pieces = train.iter().chain(&eval);
        let (tokens, trained) = pieces.fold((0, 0), |(tokens, trained), piece| {
            let learned = &self.trained[piece.start + 1..piece.end];
            let learned = learned.iter().filter(|trained| **trained).count();
            (tokens + (piece.end - piece.start), trained + learned)
        });
        self.counts.tokens = tokens as u64;
        self.counts.trained_tokens = trained as u64;
        self.counts.padding_tokens = (groups.len() * job.sequence_len - tokens) as u64;
        Ok(Packed {
            tokens: self.tokens,
            trained: self.trained,
            groups,
            counts: self.counts,
        })
    }

    /// The example in pieces of at most a block. The first token of a piece has nothing to be predicted from, so a
    /// piece of which only that would be learned is left out with those of which nothing is.
    fn pieces(&mut self, example: usize, sequence_len: usize) -> Vec<Piece> {
        let first = example.checked_sub(1).map_or(0, |before| self.ends[before]);
        let last = self.ends[example];
        self.counts.longest = self.counts.longest.max((last - first) as u64);
        self.counts.split_examples += u64::from(last - first > sequence_len);
        let mut pieces = Vec::with_capacity(1);
        for start in (first..last).step_by(sequence_len) {
            let end = last.min(start + sequence_len);
            if self.trained[start + 1..end].contains(&true) {
                pieces.push(Piece { start, end });
            } else {
                self.counts.untrained_pieces += 1;
                self.counts.untrained_tokens += (end - start) as u64;
            }
        }
        pieces
    }
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

/// Which examples are held out for validation: drawn from the seed, or the last ones where nothing is shuffled.
fn held_out(job: &JobSpec, examples: usize) -> Result<Vec<bool>, String> {
    let wanted = match job.val_set_size {
        ValSetSize::None => 0,
        ValSetSize::Examples(count) => count,
        ValSetSize::Fraction(fraction) => (examples as f64 * fraction).ceil() as usize,
    };
    if wanted > 0 && wanted >= examples {
        return Err(format!(
            "val_set_size holds out {wanted} of {examples} examples: none is left to train on"
        ));
    }
    let mut order: Vec<usize> = (0..examples).rev().collect();
    if job.shuffle {
        CounterRng::new(job.seed, &[STREAM_VALIDATION]).shuffle(&mut order);
    }
    let mut held_out = vec![false; examples];
    for example in &order[..wanted] {
        held_out[*example] = true;
    }
    Ok(held_out)
}

impl Packed {
    fn write(
        &self,
        path: &Path,
        job: &JobSpec,
        inputs: blake3::Hash,
        pad_id: u32,
    ) -> Result<BlockFile, blockfile::BlockFileError> {
        let io = |error| FileError::io("write", path)(error);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(io)?;
        }
        let info = serde_json::to_vec(&self.counts).map_err(|error| io(error.into()))?;
        blockfile::write(
            path,
            job.sequence_len,
            (self.counts.blocks, self.counts.eval_blocks),
            *inputs.as_bytes(),
            &info,
            self.groups
                .iter()
                .map(|group| self.block(group, job.sequence_len, pad_id)),
        )
    }

    fn block(&self, group: &[Piece], sequence_len: usize, pad_id: u32) -> Block {
        let mut block = Block {
            tokens: Vec::with_capacity(sequence_len),
            segments: Vec::with_capacity(sequence_len),
            trained: Vec::with_capacity(sequence_len),
        };
        for (segment, piece) in (1..).zip(group) {
            block
                .tokens
                .extend_from_slice(&self.tokens[piece.start..piece.end]);
            block
                .trained
                .extend_from_slice(&self.trained[piece.start..piece.end]);
            block.trained[block.segments.len()] = false;
            block.segments.resize(block.tokens.len(), segment);
        }
        block.tokens.resize(sequence_len, pad_id);
        block.segments.resize(sequence_len, PADDING_SEGMENT);
        block.trained.resize(sequence_len, false);
        block
    }
}

/// The example with the labels that its blocks will have: the first token of each piece has none.
fn sample_of(example: &Example, tokenizer: &Tokenizer, sequence_len: usize) -> Sample {
    let trained: Vec<bool> = example
        .trained
        .iter()
        .enumerate()
        .map(|(token, trained)| *trained && token % sequence_len != 0)
        .collect();
    let labels = example.ids.iter().zip(&trained);
    let mut text = example.text.clone();
    if example.added_eos
        && let Some(eos) = tokenizer.eos_id().and_then(|id| tokenizer.token_text(id))
    {
        text.push_str(&eos);
    }
    Sample {
        spans: text_spans(&text, example, &trained),
        labels: labels
            .map(|(id, trained)| if *trained { i64::from(*id) } else { -100 })
            .collect(),
        input_ids: example.ids.clone(),
        text,
    }
}

/// The text in stretches that are learned or not.
fn text_spans(text: &str, example: &Example, trained: &[bool]) -> Vec<TextSpan> {
    let mut spans: Vec<TextSpan> = Vec::new();
    let mut at = 0;
    for token in 1..=trained.len() {
        if token < trained.len() && trained[token] == trained[token - 1] {
            continue;
        }
        let mut end = example
            .offsets
            .get(token)
            .map_or(text.len(), |covered| covered.start);
        while !text.is_char_boundary(end) {
            end += 1;
        }
        if end > at {
            spans.push(TextSpan {
                text: text[at..end].to_owned(),
                trained: trained[token - 1],
            });
            at = end;
        }
    }
    spans
}
