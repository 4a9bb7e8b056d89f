//! Reads a dataset file row by row: JSON Lines, one JSON array, or JSON objects over several lines.
//!
//! Enters: a path. Leaves: numbered rows as bytes, not understood yet. Never holds more than a row, and none that is longer
//! than a bound.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use super::format;

/// Longest row, in bytes.
const MAX_ROW_BYTES: usize = 64 << 20;

/// Number of bytes of a file that are looked at to tell what it is.
const BUFFER_BYTES: usize = 1 << 20;

/// One row before it is understood: its line (in an array, the number of the item) and its JSON.
pub enum RawRow {
    Value(u64, Vec<u8>),
    /// The row is there but cannot be read.
    Unreadable(u64, String),
}

/// The rows of one dataset, in order.
pub struct RowReader {
    reader: BufReader<File>,
    layout: Layout,
    /// Number of the next line; in an array, of the next item.
    number: u64,
    /// Line of the file, where that is an array.
    line: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// A value on each line.
    Lines,
    /// Values one after the other, each over as many lines as it likes.
    Values,
    /// The items of an array.
    Array(Place),
    Done,
}

/// Where in an array the reader is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Begin,
    BehindItem,
    BehindComma,
}

impl RowReader {
    /// Opens a dataset file. An error says what the file is instead, or why it cannot be read.
    pub fn open(path: &Path) -> Result<Self, String> {
        format::file_of_rows(path)?;
        let file = File::open(path).map_err(|error| error.to_string())?;
        let mut reader = BufReader::with_capacity(BUFFER_BYTES, file);
        let start = reader.fill_buf().map_err(|error| error.to_string())?;
        if let Some(what) = format::other_than_rows(path, start) {
            return Err(what);
        }
        let bom = if start.starts_with(b"\xef\xbb\xbf") {
            3
        } else {
            0
        };
        let layout = layout_of(&start[bom..]);
        let mut used = bom;
        let mut line = 1;
        if let Layout::Array(_) = layout {
            let space = start[bom..].iter();
            let space = space.take_while(|byte| byte.is_ascii_whitespace());
            line += line_ends(&start[bom..bom + space.clone().count()]);
            used += 1 + space.count();
        }
        reader.consume(used);
        Ok(Self {
            reader,
            layout,
            number: 1,
            line,
        })
    }

    fn next_line(&mut self) -> Option<RawRow> {
        loop {
            let line = self.number;
            self.number += 1;
            let mut bytes = Vec::new();
            let limit = MAX_ROW_BYTES as u64 + 1;
            let read = self
                .reader
                .by_ref()
                .take(limit)
                .read_until(b'\n', &mut bytes);
            return match read {
                Ok(0) => None,
                Ok(read) if read as u64 == limit => Some(match skip_line(&mut self.reader) {
                    Ok(()) => RawRow::Unreadable(line, too_long()),
                    Err(error) => RawRow::Unreadable(line, error.to_string()),
                }),
                Ok(_) if bytes.trim_ascii().is_empty() => continue,
                Ok(_) => Some(RawRow::Value(line, bytes)),
                Err(error) => {
                    self.layout = Layout::Done;
                    Some(RawRow::Unreadable(line, error.to_string()))
                }
            };
        }
    }

    fn next_value(&mut self) -> Option<RawRow> {
        let lines = match self.skip_space() {
            Ok(lines) => lines,
            Err(error) => return self.stop(error.to_string()),
        };
        self.line += lines;
        if self.layout == Layout::Values {
            self.number += lines;
        }
        let first = match self.peek() {
            Ok(first) => first,
            Err(error) => return self.stop(error.to_string()),
        };
        match (self.layout, first) {
            (Layout::Array(_), None) => {
                self.stop("the array has no end: is the file cut off?".to_owned())
            }
            (_, None) => {
                self.layout = Layout::Done;
                None
            }
            (Layout::Array(Place::BehindComma), Some(b']')) => self.stop_at_line(
                "broken JSON: a comma before the end of the array, with no item behind it: remove it",
            ),
            (Layout::Array(_), Some(b']')) => self.end_array(),
            (Layout::Array(Place::BehindItem), Some(b',')) => {
                self.reader.consume(1);
                self.layout = Layout::Array(Place::BehindComma);
                self.next_value()
            }
            (Layout::Array(Place::BehindItem), Some(_)) => {
                self.stop_at_line("broken JSON: no comma before this item of the array")
            }
            (_, Some(_)) => self.whole_value(),
        }
    }

    fn whole_value(&mut self) -> Option<RawRow> {
        let number = self.number;
        let mut bytes = Vec::new();
        match take_value(&mut self.reader, &mut bytes) {
            Ok(true) if bytes.is_empty() => {
                return self.stop("broken JSON: a value is expected here".to_owned());
            }
            Ok(true) => {}
            Ok(false) => return self.stop(too_long()),
            Err(error) => return self.stop(error.to_string()),
        }
        let lines = line_ends(&bytes);
        self.line += lines;
        match self.layout {
            Layout::Array(_) => {
                self.layout = Layout::Array(Place::BehindItem);
                self.number += 1;
            }
            _ => self.number += lines,
        }
        Some(RawRow::Value(number, bytes))
    }

    /// Ends an array, which nothing but white space may follow.
    fn end_array(&mut self) -> Option<RawRow> {
        self.reader.consume(1);
        self.layout = Layout::Done;
        match self.skip_space().and_then(|_| self.peek()) {
            Ok(None) => None,
            Ok(Some(_)) => self.stop("there is more after the end of the array".to_owned()),
            Err(error) => self.stop(error.to_string()),
        }
    }

    /// Ends the reading with an unreadable row: what follows cannot be told apart.
    fn stop(&mut self, reason: String) -> Option<RawRow> {
        self.layout = Layout::Done;
        Some(RawRow::Unreadable(self.number, reason))
    }

    /// [`stop`](Self::stop) in an array, whose items have numbers of their own.
    fn stop_at_line(&mut self, reason: &str) -> Option<RawRow> {
        self.stop(format!("{reason} (line {} of the file)", self.line))
    }

    fn peek(&mut self) -> io::Result<Option<u8>> {
        Ok(self.reader.fill_buf()?.first().copied())
    }

    /// Skips white space. Returns the number of line ends in it.
    fn skip_space(&mut self) -> io::Result<u64> {
        let mut lines = 0;
        loop {
            let buffer = self.reader.fill_buf()?;
            let space = buffer
                .iter()
                .take_while(|byte| byte.is_ascii_whitespace())
                .count();
            lines += line_ends(&buffer[..space]);
            let done = space < buffer.len() || buffer.is_empty();
            self.reader.consume(space);
            if done {
                return Ok(lines);
            }
        }
    }
}

impl Iterator for RowReader {
    type Item = RawRow;

    /// The next row; blank lines are none.
    fn next(&mut self) -> Option<RawRow> {
        match self.layout {
            Layout::Lines => self.next_line(),
            Layout::Values | Layout::Array(_) => self.next_value(),
            Layout::Done => None,
        }
    }
}

fn line_ends(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|byte| **byte == b'\n').count() as u64
}

fn too_long() -> String {
    format!("the row is longer than {MAX_ROW_BYTES} bytes: divide its text into several rows")
}

/// How the rows of a file that begins like this are laid out.
fn layout_of(start: &[u8]) -> Layout {
    let text = start.trim_ascii_start();
    match text.first() {
        Some(b'[') => Layout::Array(Place::Begin),
        Some(b'{') if is_spread(text) => Layout::Values,
        _ => Layout::Lines,
    }
}

/// Whether the first object goes over several lines. A line that is merely broken does not count as one.
fn is_spread(text: &[u8]) -> bool {
    let first_line = text.split(|byte| *byte == b'\n').next().unwrap_or(text);
    if first_line.trim_ascii() == b"{" {
        return true;
    }
    let mut scan = Scan::default();
    let end = text.iter().position(|byte| scan.ends_after(*byte));
    end.is_some_and(|end| {
        end >= first_line.len()
            && serde_json::from_slice::<serde::de::IgnoredAny>(&text[..=end]).is_ok()
    })
}

/// Scans for the end of a JSON value, byte by byte.
#[derive(Default)]
struct Scan {
    depth: usize,
    in_string: bool,
    is_escaped: bool,
}

impl Scan {
    /// Whether the value ends with this byte.
    fn ends_after(&mut self, byte: u8) -> bool {
        if self.in_string {
            match byte {
                _ if self.is_escaped => self.is_escaped = false,
                b'\\' => self.is_escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return !self.in_string && self.depth == 0;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }

    /// Whether the value, a number or a word, ended before this byte.
    fn ended_before(&self, byte: u8) -> bool {
        let ends = byte == b',' || byte == b']' || byte.is_ascii_whitespace();
        ends && self.depth == 0 && !self.in_string
    }
}

/// Reads one value, whatever it is. False where it is longer than a row may be.
fn take_value(reader: &mut impl BufRead, bytes: &mut Vec<u8>) -> io::Result<bool> {
    let mut scan = Scan::default();
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok(true);
        }
        let mut used = buffer.len();
        let mut done = false;
        for (index, byte) in buffer.iter().enumerate() {
            if scan.ended_before(*byte) {
                (used, done) = (index, true);
                break;
            }
            if scan.ends_after(*byte) {
                (used, done) = (index + 1, true);
                break;
            }
        }
        if bytes.len() + used > MAX_ROW_BYTES {
            return Ok(false);
        }
        bytes.extend_from_slice(&buffer[..used]);
        reader.consume(used);
        if done {
            return Ok(true);
        }
    }
}

fn skip_line(reader: &mut impl BufRead) -> io::Result<()> {
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The rows of a file, each with its number.
    fn rows(text: &str) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.jsonl");
        std::fs::write(&path, text).unwrap();
        let shown = RowReader::open(&path).unwrap().map(|row| match row {
            RawRow::Value(number, bytes) => {
                let text = String::from_utf8(bytes).unwrap();
                let text: Vec<&str> = text.split_whitespace().collect();
                format!("{number} {}", text.join(" "))
            }
            RawRow::Unreadable(number, reason) => format!("{number} ! {reason}"),
        });
        shown.collect()
    }

    #[test]
    fn rows_are_told_apart_in_every_layout() {
        let expected = [r#"1 {"a": "}\"]"}"#, r#"3 {"b": [1, {}]}"#];
        assert_eq!(rows("{\"a\": \"}\\\"]\"}\n\n{\"b\": [1, {}]}"), expected);
        let spread = "{\n  \"a\": \"}\\\"]\"\n}\n{\n  \"b\": [1, {}]\n}\n";
        assert_eq!(
            rows(spread),
            [r#"1 { "a": "}\"]" }"#, r#"4 { "b": [1, {}] }"#]
        );
        assert_eq!(
            rows("\n[ {\"a\": \"}\\\"]\"} ,\n{\"b\": [1,\n {}]}, 5, \"x,]\"]\n"),
            [
                r#"1 {"a": "}\"]"}"#,
                r#"2 {"b": [1, {}]}"#,
                "3 5",
                "4 \"x,]\""
            ]
        );
        assert_eq!(rows("[]"), Vec::<String>::new());
        assert_eq!(rows("\u{feff}{\"a\": 1}"), ["1 {\"a\": 1}"]);
    }

    #[test]
    fn a_broken_first_line_is_no_object_over_several() {
        assert_eq!(
            rows("{\"a\": [1\n{\"a\": [2]}\n"),
            ["1 {\"a\": [1", "2 {\"a\": [2]}"]
        );
    }

    #[test]
    fn broken_arrays_end_with_a_reason() {
        assert_eq!(
            rows("[{}"),
            ["1 {}", "2 ! the array has no end: is the file cut off?"]
        );
        assert_eq!(
            rows("[{} {}]"),
            [
                "1 {}",
                "2 ! broken JSON: no comma before this item of the array (line 1 of the file)"
            ]
        );
        assert_eq!(
            rows("\n[\n{\"a\":\n1},\n]\n"),
            [
                "1 {\"a\": 1}",
                "2 ! broken JSON: a comma before the end of the array, with no item behind it: remove it (line 5 of the file)"
            ]
        );
        assert_eq!(rows("[,]"), ["1 ! broken JSON: a value is expected here"]);
        assert_eq!(
            rows("[{}]\n{}"),
            ["1 {}", "2 ! there is more after the end of the array"]
        );
    }
}
