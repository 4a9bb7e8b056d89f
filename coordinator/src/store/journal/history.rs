//! The history that the records of a journal tell. Pure: records and events in, the state that a next term begins with out.

use std::collections::VecDeque;
use std::time::SystemTime;

use super::record::{Identity, Record, Step, Term};
use crate::cluster::PreviousTerms;
use crate::cluster::run_event::RunEvent;
use crate::store::output;
use crate::store::output::Line;

/// Most steps and evaluations whose lines are kept when a journal is written anew. `metrics.jsonl` has them too, but is not made
/// durable as often.
const KEPT_LINES: usize = 4096;

/// A run as its journal tells it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    term: Option<Term>,
    generation: Option<Record>,
    step: Option<Step>,
    /// The newest steps and evaluations, in order.
    lines: VecDeque<Record>,
    /// The newest checkpoint: its step, and the record itself.
    checkpoint: Option<(u64, Record)>,
    ended: Option<Record>,
}

impl History {
    /// The history that these records tell, in order.
    pub fn of(records: impl IntoIterator<Item = Record>) -> Self {
        let mut history = Self::default();
        for record in records {
            history.add(record);
        }
        history
    }

    /// Adds a record, the newest so far.
    pub fn add(&mut self, record: Record) {
        match &record {
            Record::Term(term) => {
                self.term = Some(term.clone());
                self.ended = None;
            }
            Record::Generation { .. } => self.generation = Some(record),
            Record::Step(step) => {
                // A line of a step that is on record already adds nothing.
                if step.step > self.recorded() {
                    self.step = Some(step.clone());
                    self.keep(record);
                }
            }
            Record::Evaluated { .. } => self.keep(record),
            Record::Checkpoint { step, .. } => self.checkpoint = Some((*step, record)),
            Record::Ended { .. } => self.ended = Some(record),
        }
    }

    fn keep(&mut self, record: Record) {
        while self.lines.len() >= KEPT_LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(record);
    }

    /// The same history in as few records as it takes.
    pub fn compacted(&self) -> Vec<Record> {
        let term = self.term.clone().map(Record::Term);
        let generation = self.generation.clone();
        let checkpoint = self.checkpoint.as_ref().map(|(_, record)| record.clone());
        // After many evaluations of one step, its own line may be gone.
        let has_step = self
            .lines
            .iter()
            .any(|line| matches!(line, Record::Step(_)));
        let step = self.step.clone().filter(|_| !has_step).map(Record::Step);
        term.into_iter()
            .chain(generation)
            .chain(step)
            .chain(self.lines.iter().cloned())
            .chain(checkpoint)
            .chain(self.ended.clone())
            .collect()
    }

    /// The record that an event becomes, if it is one to remember. It happened `at` this time; `local_workers` live in the
    /// coordinator's process.
    pub fn record_of(
        &self,
        event: &RunEvent,
        at: SystemTime,
        local_workers: usize,
    ) -> Option<Record> {
        Some(match event {
            RunEvent::Started {
                workers,
                generation,
                numerics_class,
                ..
            } => Record::Generation {
                number: *generation,
                workers: workers.saturating_sub(local_workers),
                numerics_class: numerics_class.clone(),
            },
            RunEvent::StepCommitted(step) => Record::Step(Step {
                step: step.step,
                weights_digest: step.weights_digest.clone(),
                skipped_in_a_row: match step.skipped {
                    true => self.skipped_in_a_row() + 1,
                    false => 0,
                },
                line: output::line_of(event, at)?,
            }),
            RunEvent::Evaluated(evaluation) => Record::Evaluated {
                step: evaluation.step,
                line: output::line_of(event, at)?,
            },
            RunEvent::CheckpointSaved { step, path } => Record::Checkpoint {
                step: *step,
                path: path.clone(),
            },
            _ => return None,
        })
    }

    /// The newest term.
    pub fn term(&self) -> Option<&Term> {
        self.term.as_ref()
    }

    /// Whether the newest term is of this job, data and model.
    pub fn is_of(&self, identity: &Identity) -> bool {
        self.term().is_some_and(|term| term.identity == *identity)
    }

    /// Number of updates after the last step on record.
    pub fn recorded(&self) -> u64 {
        self.step.as_ref().map_or(0, |step| step.step)
    }

    fn skipped_in_a_row(&self) -> u64 {
        self.step.as_ref().map_or(0, |step| step.skipped_in_a_row)
    }

    /// Step of the newest checkpoint that was stored.
    pub fn checkpoint_step(&self) -> Option<u64> {
        self.checkpoint.as_ref().map(|(step, _)| *step)
    }

    /// Lines for `metrics.jsonl`, in order.
    pub fn lines(&self) -> impl Iterator<Item = &Line> {
        self.lines.iter().filter_map(|record| match record {
            Record::Step(step) => Some(&step.line),
            Record::Evaluated { line, .. } => Some(line),
            _ => None,
        })
    }

    /// The history as the cluster of the next term needs it.
    pub fn earlier(&self) -> PreviousTerms {
        let (generation, workers, numerics_class) = match &self.generation {
            Some(Record::Generation {
                number,
                workers,
                numerics_class,
            }) => (*number, *workers, Some(numerics_class.clone())),
            _ => (0, 0, None),
        };
        // Told to end, they did.
        let waits = !matches!(self.ended, Some(Record::Ended { resumable: false }));
        PreviousTerms {
            recorded: self.recorded(),
            weights_digest: self
                .step
                .as_ref()
                .and_then(|step| step.weights_digest.clone()),
            skipped_in_a_row: self.skipped_in_a_row(),
            generation,
            workers: if waits { workers } else { 0 },
            numerics_class,
        }
    }
}
