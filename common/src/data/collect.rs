//! Reads all rows of all datasets, in order, on all cores.
//!
//! Enters: dataset files. Leaves: examples in the order of the data, or every row that cannot be used. Never holds more
//! than a batch of rows as JSON.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;
use serde_json::Value as Json;

use super::example::{Example, ExampleMaker, NO_TEMPLATE};
use super::notes::{Note, Notes};
use super::record::sharegpt;
use super::record::{DataErrors, Met, Problem, RecordParser};
use super::split_reader::{FileRow, Place, SplitReader};
use super::template::{ChatTemplate, STOPPED, Variables};
use super::tokenize::{Tokenizer, read_json};
use super::unlearned::UnlearnedRows;
use crate::job::{DatasetSpec, JobSpec};
use crate::progress::{Cancelled, Progress};
use crate::text::count;

/// Largest vocabulary: token ids are kept below this.
const MAX_VOCABULARY: u32 = super::tokens::TRAINED;

const BATCH_ROWS: usize = 2048;
/// Bytes of rows in a batch, which takes about ten times this while it is tokenised.
const BATCH_BYTES: usize = 8 << 20;

/// Counts and notes of reading, beside the examples.
#[derive(Debug, Default)]
pub struct Reading {
    pub rows: u64,
    pub unlearned: UnlearnedRows,
    /// What of the rows was passed over, a line each.
    pub notes: Vec<String>,
}

impl Reading {
    /// Adds what is to be said of a dataset that was read.
    fn take_notes(&mut self, dataset: &DatasetSpec, rows: &SplitReader, notes: &Notes, met: &Met) {
        self.notes.extend(rows.notes().iter().cloned());
        self.notes.extend(notes.lines(dataset));
        self.notes.extend(met.lines(dataset));
        self.unlearned.says_no += notes.rows(&Note::LeftOut);
        self.unlearned.marks_nothing += notes.rows(&Note::NothingLearned);
        self.unlearned.is_empty += notes.rows(&Note::EmptyAnswer);
    }
}

/// What reading a dataset came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// All of it was read.
    Read,
    /// Nobody wants more of any.
    Enough,
    /// The chat template has no end for one of its rows.
    GaveUp,
}

/// A dataset while its rows are read.
struct Of<'a> {
    index: usize,
    dataset: &'a DatasetSpec,
    /// How its rows are read where they turn out to be ShareGPT's.
    sharegpt: &'a DatasetSpec,
    met: &'a Met,
}

/// The datasets of a job with what turns their rows into tokens.
pub struct Source<'a> {
    job: &'a JobSpec,
    maker: ExampleMaker<'a>,
    /// Size of the model's vocabulary: rows of its embedding, with those that the job adds. None where its config does not say.
    vocab_size: Option<u32>,
    /// What the job gives the template in every conversation.
    variables: Variables,
    /// Counts bytes of rows.
    progress: Progress,
    /// Whether examples keep their texts.
    keeps_texts: AtomicBool,
}

impl<'a> Source<'a> {
    pub fn new(
        job: &'a JobSpec,
        tokenizer: &'a Tokenizer,
        template: Option<&'a ChatTemplate>,
    ) -> Result<Self, DataErrors> {
        let path = job.base_model.join("config.json");
        let config = read_json(&path).map_err(|reason| DataErrors::one(Some(&path), reason))?;
        let vocab_size = config
            .as_ref()
            .and_then(|config| u32::try_from(config.get("vocab_size")?.as_u64()?).ok())
            .map(|size| size.max(job.token_rows().try_into().unwrap_or(u32::MAX)));
        let variables = Variables::from_json(&Json::Object(job.chat_template_kwargs.clone()))
            .map_err(|reason| DataErrors::one(None, format!("chat_template_kwargs: {reason}")))?;
        let source = Self {
            job,
            maker: ExampleMaker {
                tokenizer,
                template,
                train_on_inputs: job.train_on_inputs,
            },
            vocab_size,
            variables,
            progress: Progress::default(),
            keeps_texts: AtomicBool::new(true),
        };
        match tokenizer.eos_id() {
            Some(eos) => source
                .check_id(eos)
                .map_err(|reason| DataErrors::one(Some(&job.base_model), reason))?,
            None => {
                return Err(DataErrors::one(
                    Some(&job.base_model),
                    "no eos_token in tokenizer_config.json and no eos_token_id in config.json: the model could not learn to stop",
                ));
            }
        }
        Ok(source)
    }

    /// Counts the bytes of rows in `progress`, and stops with an error once that is cancelled.
    pub fn watched_by(self, progress: &Progress) -> Self {
        let progress = progress.clone();
        Self { progress, ..self }
    }

    /// Examples that are read from now on have no text and no places of tokens in it, which take most of their memory: nobody
    /// is going to look at them.
    pub fn drop_texts(&self) {
        self.keeps_texts.store(false, Ordering::Relaxed);
    }

    /// The token that padding is filled with: any that the model has.
    pub fn pad_id(&self) -> u32 {
        let pad_id = self.maker.tokenizer.pad_id();
        if self.check_id(pad_id).is_ok() {
            pad_id
        } else {
            self.maker.tokenizer.eos_id().unwrap_or(0)
        }
    }

    /// Reads all rows and hands their examples over in batches, until `take` returns false.
    pub fn read(&self, mut take: impl FnMut(Vec<Example>) -> bool) -> Result<Reading, DataErrors> {
        let mut errors = DataErrors::default();
        let mut reading = Reading::default();
        for of in self.job.all_datasets().enumerate() {
            match self.read_dataset(of, &mut take, &mut reading, &mut errors)? {
                Outcome::Read => {}
                Outcome::Enough => return Ok(reading),
                Outcome::GaveUp => return errors.or(reading),
            }
        }
        reading.notes.extend(self.unread_variables());
        errors.or(reading)
    }

    /// Reads the rows of one dataset. What is wrong with them goes to `errors`; what ends all reading is the error.
    fn read_dataset(
        &self,
        (index, dataset): (usize, &DatasetSpec),
        take: &mut impl FnMut(Vec<Example>) -> bool,
        reading: &mut Reading,
        errors: &mut DataErrors,
    ) -> Result<Outcome, DataErrors> {
        let shown = PathBuf::from(dataset.shown());
        let reader = match SplitReader::open(dataset, self.job.seed) {
            Ok(reader) => reader,
            Err(reason) => {
                errors.merge(DataErrors::one(Some(&shown), reason));
                return Ok(Outcome::Read);
            }
        };
        let before = reading.rows;
        let (mut notes, met) = (Notes::default(), Met::new(dataset));
        let mut batches = Batches { rows: reader };
        let of = Of {
            index,
            dataset,
            sharegpt: &sharegpt::spec(dataset),
            met: &met,
        };
        // Whether more is wanted of what became of a batch.
        let hand_over = |results| {
            let examples = self.sorted_out(dataset, results, &mut notes, errors);
            !errors.is_empty() || take(examples)
        };
        let outcome = self
            .read_batches(&of, &mut batches, &mut reading.rows, hand_over)
            .map_err(|cancelled| DataErrors::one(Some(&shown), cancelled.to_string()))?;
        if outcome != Outcome::Read {
            return Ok(outcome);
        }
        reading.take_notes(dataset, &batches.rows, &notes, &met);
        let read = reading.rows - before;
        if read == 0 {
            let reason = no_rows(dataset, &batches.rows);
            errors.merge(DataErrors::one(Some(&shown), reason));
            return Ok(Outcome::Read);
        }
        for refusal in met.refusals() {
            errors.merge(DataErrors::one(Some(&shown), refusal));
        }
        reading
            .notes
            .extend(ends_beyond(dataset, &batches.rows, read));
        Ok(Outcome::Read)
    }

    /// Reads one batch after the other, and hands over what became of them, in order.
    fn read_batches(
        &self,
        of: &Of,
        batches: &mut Batches,
        rows: &mut u64,
        mut hand_over: impl FnMut(Vec<(Place, RowResult)>) -> bool,
    ) -> Result<Outcome, Cancelled> {
        let mut next = batches.next();
        let (mut ready, mut is_first) = (Vec::new(), true);
        while let Some(batch) = next.take() {
            *rows += batch.rows.len() as u64;
            // While this batch is tokenised, the one before it is handed over, and the next one is read, and unpacked where
            // the file is compressed.
            let mut results = Vec::new();
            let goes_on = rayon::in_place_scope(|scope| {
                scope.spawn(|_| results = self.results(of, batch));
                let goes_on = hand_over(std::mem::take(&mut ready));
                next = batches.next();
                goes_on
            });
            ready = results;
            self.progress.check()?;
            // The first rows may be all that are wanted.
            if !goes_on || (is_first && !hand_over(std::mem::take(&mut ready))) {
                return Ok(Outcome::Enough);
            }
            is_first = false;
            // A template without an end for one row is not waited for at every other one.
            if self.maker.template.is_some_and(ChatTemplate::gave_up) {
                let goes_on = hand_over(ready);
                return Ok(if goes_on {
                    Outcome::GaveUp
                } else {
                    Outcome::Enough
                });
            }
        }
        Ok(if hand_over(ready) {
            Outcome::Read
        } else {
            Outcome::Enough
        })
    }

    /// A line on what the job gives the chat template, and that does not ask for it.
    fn unread_variables(&self) -> Option<String> {
        let template = self.maker.template?;
        let names = self.job.chat_template_kwargs.keys();
        let unread = names.filter(|name| !template.source().contains(name.as_str()));
        let unread: Vec<String> = unread.map(|name| format!("`{name}`")).collect();
        let told = || {
            format!(
                "chat_template_kwargs: the chat template does not read {}",
                unread.join(", ")
            )
        };
        (!unread.is_empty()).then(told)
    }

    /// What becomes of each row of a batch, on all cores.
    fn results(&self, of: &Of, batch: Batch) -> Vec<(Place, RowResult)> {
        let accepts_role = |role: &str| {
            self.maker
                .template
                .is_some_and(|template| template.mentions_role(role))
        };
        let parser = RecordParser {
            spec: of.dataset,
            sharegpt: of.sharegpt,
            accepts_role: &accepts_role,
            train_on_inputs: self.job.train_on_inputs,
            default_system: self.job.default_system_message.as_deref(),
            variables: &self.variables,
            met: of.met,
        };
        let share = batch.share();
        let keeps_texts = self.keeps_texts.load(Ordering::Relaxed);
        { batch.rows }
            .into_par_iter()
            .map(|FileRow { place, row }| {
                let make = || {
                    // Within a batch, since one can take a minute.
                    self.progress
                        .check()
                        .map_err(|cancelled| (0, cancelled.to_string()))?;
                    let bytes = (row.bytes() as f64 * share).round();
                    self.progress.advance(bytes as u64);
                    let mut row = parser.parse(row)?;
                    let line = row.line;
                    let mut examples = self
                        .maker
                        .examples(&row.record, &mut row.notes)
                        .map_err(|reason| (line, reason))?;
                    for id in examples.iter().flat_map(|example| &example.ids) {
                        self.check_id(*id).map_err(|reason| (line, reason))?;
                    }
                    for example in &mut examples {
                        (example.dataset, example.file) = (of.index, place.file);
                        example.line = line;
                        if !keeps_texts {
                            (example.text, example.offsets) = (String::new(), Vec::new());
                        }
                    }
                    Ok((line, examples, row.notes))
                };
                (place, make())
            })
            .collect()
    }

    /// The examples of a batch; what else came of its rows goes to the notes and errors.
    fn sorted_out(
        &self,
        dataset: &DatasetSpec,
        results: Vec<(Place, RowResult)>,
        notes: &mut Notes,
        errors: &mut DataErrors,
    ) -> Vec<Example> {
        let mut examples = Vec::new();
        for (place, result) in results {
            match result {
                Ok((line, more, of_row)) => {
                    examples.extend(more);
                    notes.add(place, line, of_row);
                }
                // A fault of the model, told once.
                Err((_, reason)) if reason == NO_TEMPLATE => {
                    errors.push(Problem::new(Some(&self.job.base_model), None, reason));
                }
                // Told at the row at which the template was given up.
                Err((_, reason)) if reason.ends_with(STOPPED) => {}
                Err((line, reason)) => {
                    let file = dataset.shown_file(place.file);
                    let line = Some(line).filter(|line| *line > 0);
                    let problem = Problem::new(Some(file), line, reason);
                    errors.push(Problem {
                        unit: place.unit,
                        ..problem
                    });
                }
            }
        }
        examples
    }

    fn check_id(&self, id: u32) -> Result<(), String> {
        match self.vocab_size.unwrap_or(MAX_VOCABULARY) {
            size if id >= size.min(MAX_VOCABULARY) => Err(format!(
                "token {id} ({:?}) is outside the model's vocabulary of {size}: the tokenizer belongs to another model",
                self.maker.tokenizer.token_text(id).unwrap_or_default()
            )),
            _ => Ok(()),
        }
    }
}

/// What became of a row: its examples, or its line and why it cannot be used.
type RowResult = Result<RowExamples, (u64, String)>;

/// A row that was read: its line, its examples, and what of it was passed over.
type RowExamples = (u64, Vec<Example>, Vec<Note>);

/// A line where a dataset has fewer rows than its split names.
fn ends_beyond(dataset: &DatasetSpec, rows: &SplitReader, read: u64) -> Option<String> {
    let (have, split) = (rows.rows_beyond()?, dataset.split.as_ref()?);
    Some(format!(
        "{}: split {split} ends beyond the file, which has {}: {} taken",
        dataset.shown(),
        count(have as u64, "row"),
        count(read, "row")
    ))
}

/// Why a dataset has nothing to read.
fn no_rows(dataset: &DatasetSpec, rows: &SplitReader) -> String {
    match (rows.rows_beyond(), &dataset.split) {
        (_, Some(split)) if rows.counted() > 0 => format!(
            "split {split} names none of the file's {}: shares are rounded to whole rows, and negative numbers count from the end",
            count(rows.counted() as u64, "row")
        ),
        (Some(have), Some(split)) if have > 0 => format!(
            "split {split} asks for rows that are not there: the file has {} (numbered from 0)",
            count(have as u64, "row")
        ),
        _ if dataset.selection.skip > 0 => {
            let skip = count(dataset.selection.skip, "row");
            format!("skip passes over {skip}, and there are no more")
        }
        _ => "the dataset is empty: it has no rows".to_owned(),
    }
}

/// Rows in batches that bound memory.
struct Batches {
    rows: SplitReader,
}

/// Some rows, and the bytes that they have.
struct Batch {
    rows: Vec<FileRow>,
    bytes: u64,
    /// Bytes of the files that were read for them, where these are packed.
    packed: Option<u64>,
}

impl Batches {
    fn next(&mut self) -> Option<Batch> {
        let mut rows = Vec::new();
        let mut bytes = 0;
        let before = self.rows.packed_bytes().unwrap_or(0);
        for row in self.rows.by_ref() {
            bytes += row.row.bytes();
            rows.push(row);
            if rows.len() >= BATCH_ROWS || bytes >= BATCH_BYTES {
                break;
            }
        }
        let after = self.rows.packed_bytes();
        (!rows.is_empty()).then_some(Batch {
            rows,
            bytes: bytes as u64,
            packed: after.map(|after| after.saturating_sub(before)),
        })
    }
}

impl Batch {
    /// Bytes of the files for each of the rows: 1, unless the files are packed.
    fn share(&self) -> f64 {
        match self.packed {
            None => 1.0,
            Some(packed) => packed as f64 / self.bytes.max(1) as f64,
        }
    }
}
