//! Rows of plain text: each line is one, under the column `text`.
//!
//! Enters: text. Leaves: its lines without their ends. Blank lines are no rows, as in JSON Lines; a line is not trimmed.

use std::io::{BufRead, Read};

use serde_json::json;

use super::content::{Counted, TextContent};
use super::encoding::not_utf8;
use super::row::{MAX_ROW_BYTES, RawRow, too_long};

/// A line of a text file.
pub enum Line {
    Text(Vec<u8>),
    TooLong,
    Blank,
    End,
}

/// Lines of plain text as rows.
pub struct TextRows {
    reader: Counted,
    of: &'static str,
    /// Number of the next line.
    line: u64,
    is_done: bool,
}

impl TextRows {
    pub fn new(text: TextContent) -> Self {
        Self {
            reader: text.reader,
            of: text.of,
            line: 1,
            is_done: false,
        }
    }
}

impl Iterator for TextRows {
    type Item = RawRow;

    fn next(&mut self) -> Option<RawRow> {
        while !self.is_done {
            let (line, at) = (self.line, self.reader.position);
            self.line += 1;
            let bytes = match next_line(&mut self.reader) {
                Ok(Line::Blank) => continue,
                Ok(Line::Text(bytes)) => bytes,
                Ok(Line::TooLong) => return Some(RawRow::Unreadable(line, too_long())),
                Ok(Line::End) => break,
                Err(error) => {
                    self.is_done = true;
                    return Some(RawRow::Unreadable(line, error.to_string()));
                }
            };
            let bytes = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
            let bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
            return Some(match std::str::from_utf8(bytes) {
                Ok(text) => RawRow::Parsed(line, json!({ "text": text })),
                Err(_) => RawRow::Unreadable(
                    line,
                    not_utf8(bytes, at, self.of).unwrap_or_else(|| "not UTF-8".to_owned()),
                ),
            });
        }
        None
    }
}

/// Reads a line with its end. One that is too long is read to its end and dropped.
pub fn next_line(reader: &mut impl BufRead) -> std::io::Result<Line> {
    let mut bytes = Vec::new();
    let limit = MAX_ROW_BYTES as u64 + 1;
    let read = reader.by_ref().take(limit).read_until(b'\n', &mut bytes)?;
    if read == 0 {
        return Ok(Line::End);
    }
    if read as u64 == limit && bytes.last() != Some(&b'\n') {
        skip_line(reader)?;
        return Ok(Line::TooLong);
    }
    match bytes.trim_ascii().is_empty() {
        true => Ok(Line::Blank),
        false => Ok(Line::Text(bytes)),
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
