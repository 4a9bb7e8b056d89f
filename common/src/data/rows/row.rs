//! A row as it comes out of a file, whatever the file's format.

use std::fmt;
use std::path::Path;

use serde_json::Value as Json;

use crate::job::STANDARD_INPUT;

/// One row before it is understood, with its number: see [`Unit`].
#[derive(Debug)]
pub enum RawRow {
    /// A row that is JSON text.
    Value(u64, Vec<u8>),
    /// A row whose format has values of its own.
    Parsed(u64, Json),
    /// The row is there but cannot be read.
    Unreadable(u64, String),
}

impl RawRow {
    /// About as many bytes as the row has as JSON.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Value(_, text) => text.len(),
            Self::Parsed(_, value) => size_of_value(value),
            Self::Unreadable(..) => 0,
        }
    }
}

/// What the number of a row counts, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Lines of the file, of which a row may take several.
    Line,
    /// Rows, where lines tell nobody anything or there are none.
    Row,
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Line => "line",
            Self::Row => "row",
        })
    }
}

/// Where a row is, for people: `data.jsonl:3`, `data.parquet: row 3`, `standard input, line 3`.
pub fn place_of(file: &Path, number: u64, unit: Unit) -> String {
    match unit {
        _ if file == Path::new(STANDARD_INPUT) => format!("{STANDARD_INPUT}, {unit} {number}"),
        Unit::Line => format!("{}:{number}", file.display()),
        Unit::Row => format!("{}: row {number}", file.display()),
    }
}

/// Longest row, in bytes.
pub(super) const MAX_ROW_BYTES: usize = 64 << 20;

/// The rows of one format.
pub(super) type Rows = Box<dyn Iterator<Item = RawRow> + Send>;

pub(super) fn line_ends(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|byte| **byte == b'\n').count() as u64
}

pub(super) fn too_long() -> String {
    format!("the row is longer than {MAX_ROW_BYTES} bytes: divide its text into several rows")
}

/// About as many bytes as a value has as JSON.
fn size_of_value(value: &Json) -> usize {
    match value {
        Json::Null | Json::Bool(_) | Json::Number(_) => 8,
        Json::String(text) => text.len(),
        Json::Array(items) => items.iter().map(size_of_value).sum(),
        Json::Object(fields) => fields
            .iter()
            .map(|(name, value)| name.len() + size_of_value(value))
            .sum(),
    }
}
