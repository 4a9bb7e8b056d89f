//! Rows of separated values: CSV, and TSV.
//!
//! Enters: text whose first row names the columns. Leaves: a row for each further one, in which every cell is a string, and an empty
//! one is null. No cell ever becomes a number, a boolean or, because it reads `None` or `NA`, nothing.

use std::collections::HashSet;
use std::io::{self, BufRead};

use csv_core::ReadRecordResult;
use serde_json::{Map, Value as Json};

use super::content::{Counted, TextContent};
use super::encoding::not_utf8;
use super::format::is_header;
use super::row::{MAX_ROW_BYTES, RawRow, line_ends, too_long};

/// Most columns of a table.
const MAX_COLUMNS: usize = 1 << 16;

/// Rows of a table of separated values.
pub struct CsvRows {
    table: Table,
    columns: Vec<String>,
    is_done: bool,
}

impl CsvRows {
    /// Reads the header. The name of the file says what separates the values.
    pub fn open(text: TextContent, name: &str) -> Result<Self, String> {
        let is_tabbed = name.to_lowercase();
        let is_tabbed = is_tabbed.ends_with(".tsv") || is_tabbed.ends_with(".tab");
        let separator = if is_tabbed { b'\t' } else { b',' };
        let of = text.of;
        let mut table = Table::new(text.reader, separator);
        let header = match table.next_record().map_err(|error| error.to_string())? {
            Record::Fields => table.fields().map(<[u8]>::to_vec).collect(),
            Record::End => Vec::new(),
            Record::TooLong => return Err(format!("its header: {}", too_long())),
            Record::OpenQuote => return Err(open_quote()),
        };
        if let Some(reason) = other_separator(&header, separator) {
            return Err(reason);
        }
        Ok(Self {
            table,
            columns: columns(header, of)?,
            is_done: false,
        })
    }

    fn row(&self) -> Result<Json, String> {
        let found = self.table.field_count;
        if found != self.columns.len() {
            return Err(format!(
                "has {found} values, but the header names {} columns: is a separator or a quote missing or too much?",
                self.columns.len()
            ));
        }
        let mut row = Map::new();
        for (name, cell) in self.columns.iter().zip(self.table.fields()) {
            let cell = std::str::from_utf8(cell).map_err(|_| {
                let column = not_utf8(cell, 0, &format!("column `{name}`"));
                let column = column.unwrap_or_else(|| "not UTF-8".to_owned());
                format!(
                    "the row that begins at byte {} is {column}",
                    self.table.start + 1
                )
            })?;
            let cell = match cell {
                "" => Json::Null,
                cell => Json::String(cell.to_owned()),
            };
            row.insert(name.clone(), cell);
        }
        Ok(Json::Object(row))
    }
}

impl Iterator for CsvRows {
    type Item = RawRow;

    fn next(&mut self) -> Option<RawRow> {
        if self.is_done {
            return None;
        }
        let record = self.table.next_record();
        let line = self.table.start_line;
        Some(match record {
            Ok(Record::Fields) => match self.row() {
                Ok(row) => RawRow::Parsed(line, row),
                Err(reason) => RawRow::Unreadable(line, reason),
            },
            Ok(Record::TooLong) => RawRow::Unreadable(line, too_long()),
            Ok(Record::OpenQuote) => {
                self.is_done = true;
                RawRow::Unreadable(line, open_quote())
            }
            Ok(Record::End) => {
                self.is_done = true;
                return None;
            }
            Err(error) => {
                self.is_done = true;
                RawRow::Unreadable(line, error.to_string())
            }
        })
    }
}

fn open_quote() -> String {
    "a quote is opened that no other one closes: write a quote within a value twice (`\"\"`); or is the file cut off?"
        .to_owned()
}

/// What to do with a table that something else separates.
fn other_separator(header: &[Vec<u8>], separator: u8) -> Option<String> {
    let [only] = header else {
        return None;
    };
    let what = match only {
        only if only.contains(&b';') => "semicolons",
        only if only.contains(&b'\t') => "tabs",
        only if only.contains(&b',') => "commas",
        _ => return None,
    };
    let hint = match separator {
        b'\t' => "commas want the ending .csv",
        _ => "tabs want the ending .tsv, and semicolons are to be written as commas",
    };
    is_header(only).then(|| format!("seems to be a table of values apart by {what}: {hint}"))
}

/// The names of the columns, of which each must be another.
fn columns(header: Vec<Vec<u8>>, of: &str) -> Result<Vec<String>, String> {
    let mut names = HashSet::new();
    let mut columns = Vec::new();
    for (index, name) in header.into_iter().enumerate() {
        let name = match String::from_utf8(name) {
            // As pandas calls the column of an index that was written without a name.
            Ok(name) if name.is_empty() => format!("Unnamed: {index}"),
            Ok(name) => name,
            Err(error) => {
                let reason = not_utf8(error.as_bytes(), 0, &format!("a name in {of}'s header"));
                return Err(reason.unwrap_or_else(|| "not UTF-8".to_owned()));
            }
        };
        if !names.insert(name.clone()) {
            return Err(format!(
                "names the column `{name}` twice: give one of them another name"
            ));
        }
        columns.push(name);
    }
    Ok(columns)
}

/// What was read of a table.
enum Record {
    /// The fields are in the table.
    Fields,
    TooLong,
    OpenQuote,
    End,
}

/// A table, record by record.
struct Table {
    reader: Counted,
    parser: csv_core::Reader,
    /// The fields of the record, one behind the other, and where each ends.
    text: Vec<u8>,
    ends: Vec<usize>,
    field_count: usize,
    /// Line of the next record, and of the last one.
    line: u64,
    start_line: u64,
    /// Number of bytes before the last record.
    start: u64,
}

impl Table {
    fn new(reader: Counted, separator: u8) -> Self {
        Self {
            reader,
            parser: csv_core::ReaderBuilder::new().delimiter(separator).build(),
            text: vec![0; 1 << 10],
            ends: vec![0; 16],
            field_count: 0,
            line: 1,
            start_line: 1,
            start: 0,
        }
    }

    fn fields(&self) -> impl Iterator<Item = &[u8]> {
        let mut from = 0;
        self.ends[..self.field_count].iter().map(move |end| {
            let field = &self.text[from..*end];
            from = *end;
            field
        })
    }

    /// Skips blank lines, so that a record's line is that on which it begins.
    fn skip_blank(&mut self) -> io::Result<bool> {
        loop {
            match self.reader.peek()? {
                Some(byte @ (b'\n' | b'\r')) => {
                    self.line += u64::from(byte == b'\n');
                    self.reader.consume(1);
                }
                first => return Ok(first.is_some()),
            }
        }
    }

    fn next_record(&mut self) -> io::Result<Record> {
        let has_more = self.skip_blank()?;
        (self.start_line, self.start) = (self.line, self.reader.position);
        if !has_more {
            return Ok(Record::End);
        }
        let (mut text, mut ends) = (0, 0);
        let mut is_too_long = false;
        loop {
            let input = self.reader.fill_buf()?;
            let is_end = input.is_empty();
            // Behind the end another line end closes the record, unless a quote is open.
            let input = if is_end { b"\n" } else { input };
            let (result, read, written, ended) =
                self.parser
                    .read_record(input, &mut self.text[text..], &mut self.ends[ends..]);
            if !is_end {
                self.line += line_ends(&input[..read]);
                self.reader.consume(read);
            }
            (text, ends) = (text + written, ends + ended);
            match result {
                ReadRecordResult::InputEmpty if is_end => return Ok(Record::OpenQuote),
                ReadRecordResult::InputEmpty => {}
                ReadRecordResult::OutputFull if self.text.len() >= MAX_ROW_BYTES => {
                    (text, is_too_long) = (0, true);
                }
                ReadRecordResult::OutputFull => self.text.resize(self.text.len() * 2, 0),
                ReadRecordResult::OutputEndsFull if self.ends.len() >= MAX_COLUMNS => {
                    (ends, is_too_long) = (0, true);
                }
                ReadRecordResult::OutputEndsFull => self.ends.resize(self.ends.len() * 2, 0),
                ReadRecordResult::Record | ReadRecordResult::End if is_too_long => {
                    return Ok(Record::TooLong);
                }
                ReadRecordResult::Record | ReadRecordResult::End => {
                    self.field_count = ends;
                    return Ok(Record::Fields);
                }
            }
        }
    }
}
