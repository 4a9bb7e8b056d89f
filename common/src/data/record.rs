//! Rows of a dataset, as read.
//!
//! Enters: a JSON Lines file (or one JSON array) and the names of its columns. Leaves: records, or for each row that
//! cannot be used its file, line and reason. Never skips a row in silence.

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};
use thiserror::Error;

use crate::job::{DatasetKind, DatasetSpec, FieldNames};

/// Longest row, in bytes.
const MAX_LINE_BYTES: usize = 64 << 20;
/// Largest file that is one JSON array, in bytes: it is held whole.
const MAX_ARRAY_BYTES: u64 = 2 << 30;
/// Problems that are told one by one; the others are counted.
pub const MAX_PROBLEMS: usize = 20;

/// A row that can be used.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// A conversation. Only assistant turns from `trained_from` on are learned (those before belong to a prompt).
    Conversation {
        messages: Vec<Json>,
        trained_from: usize,
        tools: Option<Json>,
    },
    Completion {
        prompt: String,
        completion: String,
    },
    Text(String),
}

/// Why data cannot be used: every problem with file and line.
#[derive(Debug, Default, Error)]
pub struct DataErrors {
    /// The first [`MAX_PROBLEMS`].
    pub problems: Vec<Problem>,
    pub total: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub file: Option<PathBuf>,
    /// Counted from 1; in a JSON array the number of the item.
    pub line: Option<u64>,
    pub reason: String,
}

impl DataErrors {
    pub fn one(file: Option<&Path>, reason: impl Into<String>) -> Self {
        let mut errors = Self::default();
        errors.push(Problem {
            file: file.map(Path::to_owned),
            line: None,
            reason: reason.into(),
        });
        errors
    }

    pub fn push(&mut self, problem: Problem) {
        self.total += 1;
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(problem);
        }
    }

    pub fn merge(&mut self, other: Self) {
        let untold = other.total - other.problems.len();
        for problem in other.problems {
            self.push(problem);
        }
        self.total += untold;
    }

    pub fn is_empty(&self) -> bool {
        self.total == 0
    }

    /// `value`, unless there are problems.
    pub fn or<T>(self, value: T) -> Result<T, Self> {
        if self.is_empty() {
            Ok(value)
        } else {
            Err(self)
        }
    }
}

impl fmt::Display for DataErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            let separator = if index > 0 { "\n" } else { "" };
            write!(f, "{separator}{problem}")?;
        }
        match self.total - self.problems.len() {
            0 => Ok(()),
            more => write!(f, "\n... and {more} more rows that cannot be used"),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}:", file.display())?;
            match self.line {
                Some(line) => write!(f, "{line}: ")?,
                None => write!(f, " ")?,
            }
        }
        f.write_str(&self.reason)
    }
}

/// One row before it is understood: its line number and the line, or the item of an array.
pub enum RawRow {
    Line(u64, Vec<u8>),
    Item(u64, Json),
    /// The line is there but cannot be read.
    Unreadable(u64, String),
}

/// The rows of one dataset, in order.
pub struct RowReader {
    source: Source,
    line: u64,
}

enum Source {
    Lines(Box<BufReader<File>>),
    Array(std::vec::IntoIter<Json>),
}

impl RowReader {
    pub fn open(path: &Path) -> Result<Self, String> {
        let metadata = std::fs::metadata(path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => "no such file".to_owned(),
            _ => error.to_string(),
        })?;
        if metadata.is_dir() {
            return Err("is a folder: name a JSON Lines file".to_owned());
        }
        let file = File::open(path).map_err(|error| error.to_string())?;
        let mut reader = BufReader::with_capacity(1 << 20, file);
        let start = reader.fill_buf().map_err(|error| error.to_string())?;
        let bom = start.starts_with(b"\xef\xbb\xbf");
        let first = start[if bom { 3 } else { 0 }..]
            .iter()
            .find(|byte| !byte.is_ascii_whitespace())
            .copied();
        if bom {
            reader.consume(3);
        }
        let source = match first {
            Some(b'[') => Source::Array(read_array(reader, metadata.len())?.into_iter()),
            Some(b'P') if path.extension().is_some_and(|end| end == "parquet") => {
                return Err(
                    "Parquet files are not read: write it as JSON Lines (`Dataset.to_json`)"
                        .to_owned(),
                );
            }
            _ => Source::Lines(Box::new(reader)),
        };
        Ok(Self { source, line: 0 })
    }

    fn next_line(reader: &mut impl BufRead, line: u64) -> Option<RawRow> {
        let mut bytes = Vec::new();
        let limit = MAX_LINE_BYTES as u64 + 1;
        match reader.take(limit).read_until(b'\n', &mut bytes) {
            Ok(0) => None,
            Ok(read) if read as u64 == limit => {
                let reason = format!("the row is longer than {MAX_LINE_BYTES} bytes");
                Some(match skip_line(reader) {
                    Ok(()) => RawRow::Unreadable(line, reason),
                    Err(error) => RawRow::Unreadable(line, error.to_string()),
                })
            }
            Ok(_) => Some(RawRow::Line(line, bytes)),
            Err(error) => Some(RawRow::Unreadable(line, error.to_string())),
        }
    }
}

impl Iterator for RowReader {
    type Item = RawRow;

    /// Blank lines are no rows.
    fn next(&mut self) -> Option<RawRow> {
        loop {
            self.line += 1;
            match &mut self.source {
                Source::Array(items) => {
                    return items.next().map(|item| RawRow::Item(self.line, item));
                }
                Source::Lines(reader) => match Self::next_line(reader, self.line)? {
                    RawRow::Line(_, bytes) if bytes.trim_ascii().is_empty() => {}
                    row => return Some(row),
                },
            }
        }
    }
}

fn skip_line(reader: &mut impl BufRead) -> std::io::Result<()> {
    loop {
        let buffer = reader.fill_buf()?;
        let (used, done) = match buffer.iter().position(|byte| *byte == b'\n') {
            Some(end) => (end + 1, true),
            None => (buffer.len(), buffer.is_empty()),
        };
        reader.consume(used);
        if done {
            return Ok(());
        }
    }
}

fn read_array(reader: impl Read, size: u64) -> Result<Vec<Json>, String> {
    if size > MAX_ARRAY_BYTES {
        return Err(format!(
            "a JSON array of {size} bytes is too long to hold: write it as JSON Lines"
        ));
    }
    serde_json::from_reader(reader).map_err(|error| format!("not a valid JSON array: {error}"))
}

/// Reads rows of one dataset. `accepts_role` knows the roles beside system, user, assistant and tool.
pub struct RecordParser<'a> {
    pub spec: &'a DatasetSpec,
    pub accepts_role: &'a (dyn Fn(&str) -> bool + Sync),
}

impl RecordParser<'_> {
    /// The record, or its line and why it cannot be used.
    pub fn parse(&self, row: RawRow) -> Result<(u64, Record), (u64, String)> {
        let (line, json) = match row {
            RawRow::Unreadable(line, reason) => return Err((line, reason)),
            RawRow::Item(line, json) => (line, json),
            RawRow::Line(line, bytes) => match serde_json::from_slice(bytes.trim_ascii()) {
                Ok(json) => (line, json),
                Err(error) => return Err((line, broken_json(&error))),
            },
        };
        match json {
            Json::Object(row) => self
                .record(&row)
                .map(|record| (line, record))
                .map_err(|reason| (line, reason)),
            other => Err((
                line,
                format!("a row must be a JSON object, not {}", kind_of(&other)),
            )),
        }
    }

    fn record(&self, row: &Map<String, Json>) -> Result<Record, String> {
        let fields = &self.spec.fields;
        match self.kind(row)? {
            DatasetKind::Messages => {
                let messages = self.messages(column(row, &fields.messages)?, &fields.messages)?;
                self.conversation(messages, 0, row)
            }
            DatasetKind::PromptCompletion => self.prompt_completion(row),
            DatasetKind::Text | DatasetKind::Auto => match column(row, &fields.text)? {
                Json::String(text) if text.is_empty() => {
                    Err(format!("column `{}` is empty", fields.text))
                }
                Json::String(text) => Ok(Record::Text(text.clone())),
                other => Err(format!(
                    "column `{}` must be a string, not {}",
                    fields.text,
                    kind_of(other)
                )),
            },
        }
    }

    fn kind(&self, row: &Map<String, Json>) -> Result<DatasetKind, String> {
        let FieldNames {
            messages,
            prompt,
            completion,
            text,
            ..
        } = &self.spec.fields;
        if self.spec.kind != DatasetKind::Auto {
            return Ok(self.spec.kind);
        }
        let has = |name: &String| row.get(name).is_some_and(|value| !value.is_null());
        if has(messages) {
            Ok(DatasetKind::Messages)
        } else if has(prompt) || has(completion) {
            Ok(DatasetKind::PromptCompletion)
        } else if has(text) {
            Ok(DatasetKind::Text)
        } else {
            Err(format!(
                "no column `{messages}`, `{prompt}` and `{completion}`, or `{text}`; {}",
                columns_found(row, &[messages, prompt, completion, text])
            ))
        }
    }

    fn prompt_completion(&self, row: &Map<String, Json>) -> Result<Record, String> {
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
                let mut messages = self.messages(prompt, &fields.prompt)?;
                let trained_from = messages.len();
                messages.extend(self.messages(completion, &fields.completion)?);
                self.conversation(messages, trained_from, row)
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

    fn conversation(
        &self,
        messages: Vec<Json>,
        trained_from: usize,
        row: &Map<String, Json>,
    ) -> Result<Record, String> {
        if !messages[trained_from..]
            .iter()
            .any(|message| message["role"] == "assistant")
        {
            return Err("no assistant turn: nothing to learn from".to_owned());
        }
        let name = &self.spec.fields.tools;
        let tools = match row.get(name) {
            None | Some(Json::Null) => None,
            // Datasets keep tools as JSON in a string, since their schemas differ from row to row.
            Some(Json::String(text)) => Some(
                serde_json::from_str(text)
                    .map_err(|error| format!("column `{name}`: {}", broken_json(&error)))?,
            ),
            Some(tools) => Some(tools.clone()),
        };
        match tools {
            None | Some(Json::Array(_)) => Ok(Record::Conversation {
                messages,
                trained_from,
                tools,
            }),
            Some(other) => Err(format!(
                "column `{name}` must be a list of tools, not {}",
                kind_of(&other)
            )),
        }
    }

    fn messages(&self, value: &Json, name: &str) -> Result<Vec<Json>, String> {
        let Json::Array(list) = value else {
            return Err(format!(
                "column `{name}` must be a list of messages, not {}",
                kind_of(value)
            ));
        };
        if list.is_empty() {
            return Err(format!("column `{name}` has no messages"));
        }
        list.iter()
            .enumerate()
            .map(|(index, message)| {
                self.message(message)
                    .map_err(|reason| format!("message {} of `{name}`: {reason}", index + 1))
            })
            .collect()
    }

    /// The message with the template's own names for role and content.
    fn message(&self, message: &Json) -> Result<Json, String> {
        let Json::Object(fields) = message else {
            return Err(format!(
                "must be an object with role and content, not {}",
                kind_of(message)
            ));
        };
        let names = &self.spec.fields;
        let role = match fields.get(&names.role) {
            Some(Json::String(role)) => role,
            Some(other) => {
                return Err(format!(
                    "`{}` must be a string, not {}",
                    names.role,
                    kind_of(other)
                ));
            }
            None => {
                return Err(format!(
                    "no `{}`; {}",
                    names.role,
                    columns_found(fields, &[&names.role])
                ));
            }
        };
        self.check_role(role)?;
        if !fields.contains_key(&names.content)
            && !["tool_calls", "reasoning_content", "thinking", "reasoning"]
                .iter()
                .any(|name| fields.contains_key(*name))
        {
            return Err(format!(
                "no `{}`; {}",
                names.content,
                columns_found(fields, &[&names.content])
            ));
        }
        let renamed = fields
            .iter()
            .map(|(name, value)| {
                let name = match name {
                    name if *name == names.role => "role",
                    name if *name == names.content => "content",
                    name => name,
                };
                (name.to_owned(), value.clone())
            })
            .collect();
        Ok(Json::Object(renamed))
    }

    fn check_role(&self, role: &str) -> Result<(), String> {
        const ROLES: [&str; 4] = ["system", "user", "assistant", "tool"];
        if ROLES.contains(&role) || (self.accepts_role)(role) {
            return Ok(());
        }
        let meant = match role.to_lowercase().as_str() {
            "human" | "prompter" => Some("user"),
            "gpt" | "bot" | "ai" | "model" => Some("assistant"),
            "function" | "observation" | "ipython" => Some("tool"),
            lower => nearest(lower, &ROLES),
        };
        Err(match meant {
            Some(meant) => format!("unknown role `{role}` (did you mean `{meant}`?)"),
            None => format!("unknown role `{role}` (known: {})", ROLES.join(", ")),
        })
    }
}

fn column<'a>(row: &'a Map<String, Json>, name: &str) -> Result<&'a Json, String> {
    row.get(name)
        .ok_or_else(|| format!("no column `{name}`; {}", columns_found(row, &[name])))
}

/// What the row has instead, and which of it was probably meant.
fn columns_found(row: &Map<String, Json>, wanted: &[&str]) -> String {
    let names: Vec<&str> = row.keys().map(String::as_str).collect();
    if names.is_empty() {
        return "the row is empty".to_owned();
    }
    let listed: Vec<String> = names
        .iter()
        .take(12)
        .map(|name| format!("`{name}`"))
        .collect();
    let more = if names.len() > 12 { ", ..." } else { "" };
    let meant = names
        .iter()
        .find(|name| nearest(&name.to_lowercase(), wanted).is_some())
        .map(|name| format!(" (did you mean `{name}`?)"))
        .unwrap_or_default();
    format!("found {}{more}{meant}", listed.join(", "))
}

fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .map(|name| (strsim::damerau_levenshtein(word, name), *name))
        .filter(|(distance, name)| *distance <= name.len().max(word.len()).div_ceil(3))
        .min()
        .map(|(_, name)| name)
}

fn kind_of(value: &Json) -> &'static str {
    match value {
        Json::Null => "null",
        Json::Bool(_) => "a boolean",
        Json::Number(_) => "a number",
        Json::String(_) => "a string",
        Json::Array(_) => "a list",
        Json::Object(_) => "an object",
    }
}

/// serde_json's reason with the column; its line number is always 1 here.
fn broken_json(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let reason = text.split(" at line ").next().unwrap_or(&text);
    format!("broken JSON: {reason} (column {})", error.column())
}
