//! Rows of JSON: JSON Lines, one JSON array, or JSON objects over several lines.
//!
//! Enters: text. Leaves: numbered rows as bytes, not understood yet. Never holds more than a row, and none that is longer than a
//! bound.

use std::io::{self, BufRead, Read};

use super::content::{Counted, TextContent};
use super::encoding::not_utf8;
use super::row::{MAX_ROW_BYTES, RawRow, Unit, line_ends, too_long};
use super::text::{Line, next_line};
use super::wrapped::ListOfRows;

/// The rows of a JSON file, in order.
pub struct JsonRows {
    reader: Counted,
    of: &'static str,
    layout: Layout,
    /// Number of the next line; in an array, of the next item.
    number: u64,
    /// Line of the file, where that is an array.
    line: u64,
    /// Whether the array is part of something else, which follows.
    is_within: bool,
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

impl JsonRows {
    /// Tells by how the text begins how its rows are laid out.
    pub fn new(text: TextContent) -> Self {
        let TextContent {
            start,
            mut reader,
            of,
        } = text;
        let layout = layout_of(&start);
        let mut line = 1;
        if let Layout::Array(_) = layout {
            let space = start.iter().take_while(|byte| byte.is_ascii_whitespace());
            let space = space.count();
            line += line_ends(&start[..space]);
            reader.consume(space + 1);
        }
        Self {
            reader,
            of,
            layout,
            number: 1,
            line,
            is_within: false,
        }
    }

    /// The items of a list within the text.
    pub fn from_list(text: TextContent, list: &ListOfRows) -> Result<Self, String> {
        let TextContent { mut reader, of, .. } = text;
        let before = list.start.saturating_sub(reader.position);
        let skipped = io::copy(&mut reader.by_ref().take(before), &mut io::sink());
        if skipped.map_err(|error| error.to_string())? != before {
            return Err("the file changed while it was read".to_owned());
        }
        Ok(Self {
            reader,
            of,
            layout: Layout::Array(Place::Begin),
            number: 1,
            line: list.line,
            is_within: true,
        })
    }

    /// What the numbers of the rows count.
    pub fn unit(&self) -> Unit {
        match self.layout {
            Layout::Array(_) => Unit::Row,
            _ => Unit::Line,
        }
    }

    fn next_line(&mut self) -> Option<RawRow> {
        loop {
            let (line, at) = (self.number, self.reader.position);
            self.number += 1;
            return match next_line(&mut self.reader) {
                Ok(Line::End) => None,
                Ok(Line::TooLong) => Some(RawRow::Unreadable(line, too_long())),
                Ok(Line::Blank) => continue,
                Ok(Line::Text(bytes)) => Some(self.row(line, bytes, at)),
                Err(error) => {
                    self.layout = Layout::Done;
                    Some(RawRow::Unreadable(line, error.to_string()))
                }
            };
        }
    }

    /// The row of these bytes, which begin behind `at` others.
    fn row(&self, number: u64, bytes: Vec<u8>, at: u64) -> RawRow {
        match not_utf8(&bytes, at, self.of) {
            None => RawRow::Value(number, bytes),
            Some(reason) => RawRow::Unreadable(number, reason),
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
        let first = match self.reader.peek() {
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
        let (number, at) = (self.number, self.reader.position);
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
        Some(self.row(number, bytes, at))
    }

    /// Ends an array, which nothing but white space may follow.
    fn end_array(&mut self) -> Option<RawRow> {
        self.reader.consume(1);
        self.layout = Layout::Done;
        if self.is_within {
            return None;
        }
        match self.skip_space().and_then(|_| self.reader.peek()) {
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

    fn skip_space(&mut self) -> io::Result<u64> {
        skip_space(&mut self.reader)
    }
}

/// Skips white space. Returns the number of line ends in it.
pub fn skip_space(reader: &mut impl BufRead) -> io::Result<u64> {
    let mut lines = 0;
    loop {
        let buffer = reader.fill_buf()?;
        let space = buffer
            .iter()
            .take_while(|byte| byte.is_ascii_whitespace())
            .count();
        lines += line_ends(&buffer[..space]);
        let done = space < buffer.len() || buffer.is_empty();
        reader.consume(space);
        if done {
            return Ok(lines);
        }
    }
}

impl Iterator for JsonRows {
    type Item = RawRow;

    fn next(&mut self) -> Option<RawRow> {
        match self.layout {
            Layout::Lines => self.next_line(),
            Layout::Values | Layout::Array(_) => self.next_value(),
            Layout::Done => None,
        }
    }
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
pub struct Scan {
    depth: usize,
    in_string: bool,
    is_escaped: bool,
}

impl Scan {
    /// A scan of a value whose first bracket was read already.
    pub fn within() -> Self {
        Self {
            depth: 1,
            ..Self::default()
        }
    }

    /// Whether what comes next is in no string, list or object of the value.
    pub fn is_outside(&self) -> bool {
        self.depth == 0 && !self.in_string
    }

    /// Whether the value ends with this byte.
    pub fn ends_after(&mut self, byte: u8) -> bool {
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
    pub fn ended_before(&self, byte: u8) -> bool {
        let ends = byte == b',' || byte == b']' || byte.is_ascii_whitespace();
        ends && self.depth == 0 && !self.in_string
    }
}

/// Reads one value, whatever it is. False where it is longer than a row may be.
pub fn take_value(reader: &mut impl BufRead, bytes: &mut Vec<u8>) -> io::Result<bool> {
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::RowReader;
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
            RawRow::Parsed(number, _) => panic!("row {number} is no text"),
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
