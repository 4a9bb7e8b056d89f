//! A dataset file, row by row: JSON Lines, or one JSON array.
//!
//! Enters: a path. Leaves: numbered lines, not understood yet. No line is held that is longer than a bound.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde_json::Value as Json;

use crate::progress::Progress;

/// Longest row, in bytes.
const MAX_LINE_BYTES: usize = 64 << 20;
/// Largest file that is one JSON array, in bytes: it is held whole.
const MAX_ARRAY_BYTES: u64 = 2 << 30;

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
    item_bytes: u64,
}

enum Source {
    Lines(Box<BufReader<File>>),
    Array(std::vec::IntoIter<Json>),
}

impl RowReader {
    /// An array is held whole; reading it stops once `progress` is cancelled.
    pub fn open(path: &Path, progress: &Progress) -> Result<Self, String> {
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
        let mut item_bytes = 0;
        let source = match first {
            Some(b'[') => {
                let items = read_array(progress.while_wanted(reader), metadata.len())?;
                item_bytes = metadata.len() / items.len().max(1) as u64;
                Source::Array(items.into_iter())
            }
            Some(b'P') if path.extension().is_some_and(|end| end == "parquet") => {
                return Err(
                    "Parquet files are not read: write it as JSON Lines (`Dataset.to_json`)"
                        .to_owned(),
                );
            }
            _ => Source::Lines(Box::new(reader)),
        };
        Ok(Self {
            source,
            line: 0,
            item_bytes,
        })
    }

    /// Mean size of an item of an array; 0 where the rows are lines.
    pub fn item_bytes(&self) -> u64 {
        self.item_bytes
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
