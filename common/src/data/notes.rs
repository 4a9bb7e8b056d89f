//! Notes on what of the rows was passed over: each thing once per dataset, with its first line and how many rows have it.
//!
//! Enters: notes on single rows, in the order of the data. Leaves: lines for people. Holds a bounded number of names.

use std::collections::BTreeMap;

use super::rows::place_of;
use super::split_reader::Place;
use crate::job::DatasetSpec;
use crate::text::count;

/// Most different notes that are told of a dataset; the others are counted.
const MAX_NOTES: usize = 40;

/// Names in one line; the others are counted.
const MAX_NAMES: usize = 12;

/// Longest name of a column that is shown whole, in bytes.
const MAX_NAME_BYTES: usize = 60;

/// Something of a row that does not reach training, or not as the row has it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Note {
    /// A column that nothing reads.
    Column(String),
    /// A key of a message that the chat template does not read.
    MessageKey(String),
    /// A role that the chat template may know, but the reader does not.
    Role(String),
    /// A role that is read as another one: `human as user`.
    RoleRenamed(String),
    /// A part of a message (`the content of a system message`) or of the row that the template does not show.
    NotShown(&'static str),
    /// An answer without anything in it: its end is all that is learned.
    EmptyAnswer,
    /// An answer that the row itself leaves out of what is learned.
    LeftOut,
    /// A row of instructions is a conversation, since nothing says that it is Axolotl's text.
    Instructions,
    /// A special token that ends answers, and that nothing names as an end of a text.
    OtherEnd(String),
    /// The chat template's own marks say what is learned.
    GenerationMarks,
    /// A row of tokens, whose labels say what is learned.
    Tokenized,
    /// A row of tokens or segments that says of none of them that it is learned.
    NothingLearned,
    /// The template's marks are not asked, since the job or the row says more than they could.
    MarksPutAside,
}

impl Note {
    /// Group of notes that are told in one line.
    fn group(&self) -> u8 {
        match self {
            Self::Column(_) => 0,
            Self::MessageKey(_) => 1,
            Self::Role(_) => 2,
            Self::RoleRenamed(_) => 7,
            Self::Instructions => 8,
            Self::OtherEnd(_) => 9,
            Self::NotShown(_) => 3,
            Self::EmptyAnswer => 4,
            Self::LeftOut => 5,
            Self::GenerationMarks => 6,
            Self::Tokenized => 10,
            Self::NothingLearned => 11,
            Self::MarksPutAside => 12,
        }
    }

    fn name(&self) -> Option<&str> {
        match self {
            Self::Column(name)
            | Self::MessageKey(name)
            | Self::Role(name)
            | Self::OtherEnd(name)
            | Self::RoleRenamed(name) => Some(name),
            Self::NotShown(part) => Some(part),
            Self::EmptyAnswer
            | Self::LeftOut
            | Self::Instructions
            | Self::GenerationMarks
            | Self::Tokenized
            | Self::NothingLearned
            | Self::MarksPutAside => None,
        }
    }
}

/// The notes of one dataset.
#[derive(Debug, Default)]
pub struct Notes {
    found: BTreeMap<Note, Found>,
    /// Number of rows whose note found no room.
    untold: u64,
}

#[derive(Clone, Copy, Debug)]
struct Found {
    /// Where the first row is: a file, a line and what that counts.
    first: (Place, u64),
    rows: u64,
}

impl Notes {
    /// Counts the notes of a row, each once.
    pub fn add(&mut self, place: Place, line: u64, mut notes: Vec<Note>) {
        notes.sort_unstable();
        notes.dedup();
        for note in notes {
            if let Some(found) = self.found.get_mut(&note) {
                found.rows += 1;
            } else if self.found.len() < MAX_NOTES {
                let found = Found {
                    first: (place, line),
                    rows: 1,
                };
                self.found.insert(note, found);
            } else {
                self.untold += 1;
            }
        }
    }

    /// Number of rows with this note.
    pub fn rows(&self, note: &Note) -> u64 {
        self.found.get(note).map_or(0, |found| found.rows)
    }

    /// A line for each kind of note, with the place of the first row.
    pub fn lines(&self, dataset: &DatasetSpec) -> Vec<String> {
        let all: Vec<(&Note, &Found)> = self.found.iter().collect();
        let mut lines: Vec<String> = all
            .chunk_by(|(one, _), (other, _)| one.group() == other.group())
            .map(|group| describe(dataset, group))
            .collect();
        if self.untold > 0 {
            lines.push(format!(
                "{}: {} more notes on its rows are not shown",
                dataset.shown(),
                self.untold
            ));
        }
        lines
    }
}

/// One line for notes of one kind.
fn describe(dataset: &DatasetSpec, group: &[(&Note, &Found)]) -> String {
    let firsts = group.iter().map(|(_, found)| found.first);
    let first = firsts.min_by_key(|(place, line)| (place.file, *line));
    let rows = group.iter().map(|(_, found)| found.rows).max().unwrap_or(0);
    let place = first.map_or_else(String::new, |(place, line)| {
        place_of(dataset.shown_file(place.file), line, place.unit)
    });
    match group[0].0 {
        Note::Column(_) => format!("{place}: columns that are not read: {}", names(group, true)),
        Note::MessageKey(_) => format!(
            "{place}: keys of messages that the chat template does not read: {}",
            names(group, true)
        ),
        Note::Role(_) => format!(
            "{place}: roles given to the chat template as they are: {}",
            names(group, true)
        ),
        Note::RoleRenamed(_) => format!(
            "{place}: roles are read by ShareGPT's names: {}",
            names(group, false)
        ),
        Note::NotShown(_) => format!(
            "{place}: the chat template does not show {}",
            names(group, false)
        ),
        Note::EmptyAnswer => format!(
            "{place}: an answer is empty, and only its end is learned ({})",
            count(rows, "row")
        ),
        Note::LeftOut => format!(
            "{place}: answers are not learned where their message says so ({})",
            count(rows, "row")
        ),
        Note::OtherEnd(_) => format!(
            "{place}: answers end with {}, which neither the tokenizer nor generation_config.json names as an end: give eot_tokens, so that what is trained stops there",
            names(group, true)
        ),
        Note::Instructions => format!(
            "{place}: rows of instructions are conversations in the chat template; `type: alpaca` makes them Axolotl's fixed text ({})",
            count(rows, "row")
        ),
        Note::Tokenized => format!(
            "{place}: rows are tokens already, and their labels say what is learned, whatever train_on_inputs says ({})",
            count(rows, "row")
        ),
        Note::NothingLearned => format!(
            "{place}: rows of which nothing is learned ({})",
            count(rows, "row")
        ),
        Note::MarksPutAside => format!(
            "{place}: the {{% generation %}} marks of the chat template are not asked, since the job or the row says itself what is learned ({})",
            count(rows, "row")
        ),
        Note::GenerationMarks => format!(
            "{place}: what is learned is what the chat template marks with {{% generation %}} ({})",
            count(rows, "row")
        ),
    }
}

fn names(group: &[(&Note, &Found)], quoted: bool) -> String {
    let told = group.iter().take(MAX_NAMES).filter_map(|(note, found)| {
        let name = shortened(note.name()?);
        Some(match quoted {
            true => format!("`{name}` ({})", count(found.rows, "row")),
            false => format!("{name} ({})", count(found.rows, "row")),
        })
    });
    let told: Vec<String> = told.collect();
    match group.len().saturating_sub(MAX_NAMES) {
        0 => told.join(", "),
        more => format!("{} and {more} more", told.join(", ")),
    }
}

fn shortened(name: &str) -> String {
    match name.char_indices().nth(MAX_NAME_BYTES) {
        Some((end, _)) => format!("{}...", &name[..end]),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::super::rows::Unit;
    use super::*;
    use crate::job::{DatasetKind, FieldNames};

    const PLACE: Place = Place {
        file: 0,
        unit: Unit::Line,
    };

    fn dataset() -> DatasetSpec {
        let path = PathBuf::from("a.jsonl");
        DatasetSpec::new(path, DatasetKind::Auto, FieldNames::default())
    }

    #[test]
    fn each_thing_is_told_once_with_its_first_line_and_its_rows() {
        let column = |name: &str| Note::Column(name.to_owned());
        let mut notes = Notes::default();
        notes.add(PLACE, 3, vec![column("id"), column("id"), column("score")]);
        notes.add(PLACE, 4, vec![column("id"), Note::NotShown("reasoning")]);
        assert_eq!(
            notes.lines(&dataset()),
            [
                "a.jsonl:3: columns that are not read: `id` (2 rows), `score` (1 row)",
                "a.jsonl:4: the chat template does not show reasoning (1 row)",
            ]
        );
    }

    #[test]
    fn rows_with_a_column_each_do_not_fill_the_memory() {
        let mut notes = Notes::default();
        for line in 1..=1000 {
            notes.add(PLACE, line, vec![Note::Column(format!("column {line}"))]);
        }
        let lines = notes.lines(&dataset());
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines[0].ends_with(" and 28 more"), "{lines:?}");
        assert!(lines[1].contains("960 more notes"), "{lines:?}");
    }
}
