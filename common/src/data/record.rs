//! Reads the rows of a dataset as records.
//!
//! Enters: a file of JSON rows and the names of its columns. Leaves: records, or for each row that cannot be used its
//! file, line and reason. Never skips a row, a column or a key of a message in silence.

mod columns;
mod conversation;
mod details;
mod instructions;
mod kind;
mod meant;
mod message;
mod met;
mod problem;
mod prompted;
mod segments;
pub mod sharegpt;
mod tokenized;

use std::collections::BTreeMap;
use std::sync::LazyLock;

use serde_json::{Map, Value as Json};

use super::json::{self, kind_of};
use super::notes::Note;
use super::rows::RawRow;
use super::template::Variables;
use crate::job::{DatasetKind, DatasetSpec, EndOfTurn, PromptFormat};
use columns::Shape;
use kind::kind_of_row;
use meant::columns_found;

pub use details::{Detail, PartialMask};
pub use met::Met;
pub use problem::{DataErrors, MAX_PROBLEMS, Problem};

/// A row of a dataset as something to learn from.
#[derive(Clone, Debug)]
pub enum Record {
    Conversation(Chat),
    Completion {
        prompt: String,
        completion: String,
    },
    /// Texts one after the other, each tokenised by itself, as Axolotl does.
    Segments(Segments),
    /// Tokens, and whether each is learned.
    Tokens {
        ids: Vec<u32>,
        learned: Vec<bool>,
    },
    Text(String),
}

/// Texts one after the other, and what is put around them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segments {
    pub list: Vec<Segment>,
    /// Whether the first has the special tokens before it that the tokenizer puts before a text.
    pub begins_special: bool,
    /// Number of end tokens after the last, where it says anything.
    pub end_tokens: usize,
}

/// A part of a text, which no token reaches out of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    pub text: String,
    pub learned: bool,
}

/// A conversation as its chat template sees it.
#[derive(Clone, Debug, Default)]
pub struct Chat {
    pub messages: Vec<Json>,
    /// For each message whether it is learned: answers, but for those of a prompt and those that say that they are not.
    pub learned: Vec<bool>,
    /// Messages of which only some characters are learned, by index.
    pub partial: BTreeMap<usize, PartialMask>,
    /// Which EOS tokens behind messages are learned, and which other tokens that end one.
    pub ends: Ends,
    pub tools: Option<Json>,
    /// Further variables that the row gives the template.
    pub variables: Variables,
}

/// Which of the tokens that end messages are learned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    pub eos: EndOfTurn,
    pub eot: EndOfTurn,
}

/// A row that can be used.
#[derive(Debug)]
pub struct Row {
    pub line: u64,
    pub record: Record,
    /// What of the row is passed over.
    pub notes: Vec<Note>,
}

/// The text of rows of instructions where the job names no other.
static ALPACA: LazyLock<PromptFormat> = LazyLock::new(PromptFormat::alpaca);

/// Reads rows of one dataset.
#[derive(Clone, Copy)]
pub struct RecordParser<'a> {
    pub spec: &'a DatasetSpec,
    /// The same dataset, where a row is of ShareGPT's shape and nothing says what shape it is.
    pub sharegpt: &'a DatasetSpec,
    /// Whether the chat template itself names this role.
    pub accepts_role: &'a (dyn Fn(&str) -> bool + Sync),
    /// Whether everything is learned, so that nothing can be left out.
    pub train_on_inputs: bool,
    /// System message of conversations that have none.
    pub default_system: Option<&'a str>,
    /// Variables that the template sees in every conversation.
    pub variables: &'a Variables,
    /// Which names of the job rows have.
    pub met: &'a Met,
}

/// The column with what else a row gives its chat template (TRL's name).
const VARIABLES: &str = "chat_template_kwargs";

impl RecordParser<'_> {
    /// Parses a row; an error is its line and why it cannot be used.
    pub fn parse(&self, row: RawRow) -> Result<Row, (u64, String)> {
        let (line, json) = match row {
            RawRow::Unreadable(line, reason) => return Err((line, reason)),
            RawRow::Value(line, bytes) => match json::parse(&bytes) {
                Ok(json) => (line, json),
                Err(reason) => return Err((line, reason)),
            },
            RawRow::Parsed(line, json) => (line, json),
        };
        let Json::Object(row) = json else {
            return Err((
                line,
                format!("a row must be a JSON object, not {}", kind_of(&json)),
            ));
        };
        self.met.look_at_row(&row);
        let mut notes = Vec::new();
        let parser = match self.spec.kind == DatasetKind::Auto
            && sharegpt::is_one(&row, &self.spec.fields)
        {
            true => Self {
                spec: self.sharegpt,
                ..*self
            },
            false => *self,
        };
        match parser.record(&row, &mut notes) {
            Ok(record) => Ok(Row {
                line,
                record,
                notes,
            }),
            Err(reason) => Err((line, reason)),
        }
    }

    fn record(&self, row: &Map<String, Json>, notes: &mut Vec<Note>) -> Result<Record, String> {
        let fields = &self.spec.fields;
        let named = [
            &fields.messages,
            &fields.prompt,
            &fields.completion,
            &fields.text,
        ];
        let mut named: Vec<&str> = named.map(String::as_str).into();
        if matches!(
            self.spec.kind,
            DatasetKind::Alpaca | DatasetKind::Instructions
        ) {
            named = vec![&fields.instruction, &fields.input, &fields.output];
        }
        let kind = kind_of_row(self.spec, row);
        if kind == Ok(DatasetKind::Tokenized) {
            named.extend(tokenized::COLUMNS);
        }
        // Rows for another method have other columns, too.
        columns::refuse_other_methods(row, &named)?;
        let kind = kind?;
        let prompt = self.spec.prompt.as_ref().unwrap_or(&ALPACA);
        let mut read = self.columns_of(kind, prompt);
        let has_messages = |name: &&str| row.get(*name).is_some_and(Json::is_array);
        let is_text = matches!(kind, DatasetKind::Segments | DatasetKind::Tokenized);
        if kind == DatasetKind::Instructions || !is_text && read.iter().any(has_messages) {
            read.extend([fields.tools.as_str(), VARIABLES]);
        }
        for name in &read {
            if let Some(reason) = row.get(*name).and_then(json::unreadable_number) {
                return Err(format!("column `{name}` holds {reason}"));
            }
        }
        let (shape, record) = self.record_of(kind, row, prompt, notes)?;
        columns::refuse_unlike(row, &read, shape)?;
        notes.extend(columns::notes(row, &read));
        Ok(record)
    }

    /// The columns that make a row of this kind.
    fn columns_of<'b>(&'b self, kind: DatasetKind, prompt: &PromptFormat) -> Vec<&'b str> {
        let fields = &self.spec.fields;
        match kind {
            DatasetKind::Messages if self.spec.has_system_column => {
                vec![&fields.messages, &fields.system]
            }
            DatasetKind::Messages => vec![&fields.messages],
            DatasetKind::PromptCompletion => vec![&fields.prompt, &fields.completion],
            DatasetKind::Alpaca => prompted::columns_read(prompt, fields),
            DatasetKind::Segments => vec![segments::SEGMENTS],
            DatasetKind::Tokenized => tokenized::COLUMNS.to_vec(),
            DatasetKind::Instructions => vec![
                &fields.instruction,
                &fields.input,
                &fields.output,
                &fields.system,
                &fields.history,
            ],
            DatasetKind::Text | DatasetKind::Auto => vec![&fields.text],
        }
    }

    /// A row of this kind as a record, and what its other columns are judged by.
    fn record_of(
        &self,
        kind: DatasetKind,
        row: &Map<String, Json>,
        prompt: &PromptFormat,
        notes: &mut Vec<Note>,
    ) -> Result<(Shape, Record), String> {
        let fields = &self.spec.fields;
        Ok(match kind {
            DatasetKind::Messages => {
                let messages = column(row, &fields.messages)?;
                let messages = self.messages(messages, &fields.messages, notes)?;
                let conversation = self.conversation(messages, 0, row, notes)?;
                (Shape::Conversation, conversation)
            }
            DatasetKind::PromptCompletion => {
                (Shape::Completion, self.prompt_completion(row, notes)?)
            }
            DatasetKind::Alpaca => {
                let segments = prompted::prompt_and_answer(row, fields, prompt)?;
                (Shape::Completion, Record::Segments(segments))
            }
            DatasetKind::Segments => (Shape::Text, Record::Segments(segments::read(row)?)),
            DatasetKind::Tokenized => {
                notes.push(Note::Tokenized);
                (Shape::Text, tokenized::read(row)?)
            }
            DatasetKind::Instructions => {
                if self.spec.kind == DatasetKind::Auto {
                    notes.push(Note::Instructions);
                }
                let messages = instructions::messages(row, fields)?;
                let conversation = self.conversation(messages, 0, row, notes)?;
                (Shape::Conversation, conversation)
            }
            DatasetKind::Text | DatasetKind::Auto => (Shape::Text, self.text(row)?),
        })
    }

    fn text(&self, row: &Map<String, Json>) -> Result<Record, String> {
        let name = &self.spec.fields.text;
        match column(row, name)? {
            Json::String(text) if text.is_empty() => Err(format!("column `{name}` is empty")),
            Json::String(text) => Ok(Record::Text(text.clone())),
            other => Err(format!(
                "column `{name}` must be a string, not {}",
                kind_of(other)
            )),
        }
    }

    fn prompt_completion(
        &self,
        row: &Map<String, Json>,
        notes: &mut Vec<Note>,
    ) -> Result<Record, String> {
        let fields = &self.spec.fields;
        match (
            column(row, &fields.prompt)?,
            column(row, &fields.completion)?,
        ) {
            (Json::String(prompt), Json::String(completion)) => Ok(Record::Completion {
                prompt: prompt.clone(),
                completion: completion.clone(),
            }),
            (prompt @ Json::Array(_), completion @ Json::Array(_)) => {
                let mut messages = self.messages(prompt, &fields.prompt, notes)?;
                let trained_from = messages.len();
                if let Some(index) = messages.iter().position(|said| said.learned == Some(true)) {
                    return Err(format!(
                        "message {} of `{}` asks to be learned, but nothing of a prompt is: put the whole conversation under `{}`, \
                         where each message says for itself whether it is",
                        index + 1,
                        fields.prompt,
                        fields.messages
                    ));
                }
                messages.extend(self.messages(completion, &fields.completion, notes)?);
                self.conversation(messages, trained_from, row, notes)
            }
            (prompt, completion) => Err(format!(
                "`{}` and `{}` must both be strings or both lists of messages, not {} and {}",
                fields.prompt,
                fields.completion,
                kind_of(prompt),
                kind_of(completion)
            )),
        }
    }
}

fn column<'a>(row: &'a Map<String, Json>, name: &str) -> Result<&'a Json, String> {
    row.get(name)
        .ok_or_else(|| format!("no column `{name}`; {}", columns_found(row, &[name])))
}
