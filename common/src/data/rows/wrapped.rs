//! One JSON object that holds the rows of a file as a list: `{"version": 1, "data": [{...}, {...}]}`.
//!
//! Enters: a file named .json that begins with an object. Leaves: where in it the list of rows is, or nothing where the object is a row
//! itself. Never holds more than the first item of a list.
//!
//! The object holds rows if it is all that there is in the file, none of its keys is that of a column of rows, and one of them has a
//! list whose first item is an object, though no message of a conversation. Several such lists are an error.

use std::io::{self, BufRead};

use serde::de::IgnoredAny;

use super::content::{Counted, TextContent};
use super::json::{Scan, skip_space, take_value};
use super::row::line_ends;
use super::source::Source;

/// Keys of rows, so that an object with one of them is a row.
const COLUMNS: [&str; 16] = [
    "text",
    "messages",
    "conversations",
    "conversation",
    "prompt",
    "completion",
    "response",
    "chosen",
    "rejected",
    "instruction",
    "input",
    "output",
    "question",
    "answer",
    "input_ids",
    "labels",
];

/// Most keys of an object that is looked through for a list of rows.
const MAX_KEYS: usize = 256;

/// A list of rows within an object.
#[derive(Debug, PartialEq, Eq)]
pub struct ListOfRows {
    pub key: String,
    /// Number of bytes of the text before its first item.
    pub start: u64,
    /// Line of the file in which it begins.
    pub line: u64,
    /// The other keys of the object.
    pub others: Vec<String>,
}

impl ListOfRows {
    /// What was taken for rows, and what is not read, for people.
    pub fn note(&self) -> String {
        let others: Vec<String> = self.others.iter().map(|key| format!("`{key}`")).collect();
        let beside = match others.is_empty() {
            true => String::new(),
            false => format!("; beside it {} is not read", others.join(", ")),
        };
        format!("the rows are the items of `{}`{beside}", self.key)
    }
}

/// Where a file's list of rows is, where the file is one object that holds it.
pub fn list_of_rows(source: &Source, text: &TextContent) -> Result<Option<ListOfRows>, String> {
    let is_json = source.name().to_lowercase().ends_with(".json");
    if !is_json || text.start.trim_ascii_start().first() != Some(&b'{') {
        return Ok(None);
    }
    let mut reader = TextContent::of(source.content()?).reader;
    let mut lists = Vec::new();
    let mut keys = Vec::new();
    // What is broken or cut off is told by who reads the rows.
    let is_whole = look_through(&mut reader, &mut keys, &mut lists).unwrap_or(true);
    let is_row = keys.iter().any(|key| COLUMNS.contains(&key.as_str()));
    if !is_whole || is_row {
        return Ok(None);
    }
    match lists.as_mut_slice() {
        [] => Ok(None),
        [list] => {
            list.others = keys.into_iter().filter(|key| *key != list.key).collect();
            Ok(lists.pop())
        }
        _ => {
            let names: Vec<String> = lists.iter().map(|list| format!("`{}`", list.key)).collect();
            Err(format!(
                "is one object with several lists of rows ({}): write each to a file of its own",
                names.join(", ")
            ))
        }
    }
}

/// Finds the keys and the lists of objects of the object with which the text begins. False where more follows behind it, or it is none.
fn look_through(
    reader: &mut Counted,
    keys: &mut Vec<String>,
    lists: &mut Vec<ListOfRows>,
) -> io::Result<bool> {
    let mut line = 1 + skip_space(reader)?;
    reader.consume(1);
    while keys.len() < MAX_KEYS {
        line += skip_space(reader)?;
        match reader.peek()? {
            Some(b'"') => {}
            Some(b'}') => break,
            _ => return Ok(false),
        }
        let mut key = Vec::new();
        take_value(reader, &mut key)?;
        let Ok(key) = serde_json::from_slice::<String>(&key) else {
            return Ok(false);
        };
        line += skip_space(reader)?;
        if reader.peek()? != Some(b':') {
            return Ok(false);
        }
        reader.consume(1);
        line += skip_space(reader)?;
        keys.push(key.clone());
        if reader.peek()? == Some(b'[') {
            reader.consume(1);
            let (start, start_line) = (reader.position, line);
            line += skip_space(reader)?;
            let mut first = Vec::new();
            if reader.peek()? == Some(b'{') {
                take_value(reader, &mut first)?;
            }
            if is_row(&first) {
                lists.push(ListOfRows {
                    key,
                    start,
                    line: start_line,
                    others: Vec::new(),
                });
            }
            line += line_ends(&first) + skip_value(reader, Scan::within())?;
        } else {
            line += skip_value(reader, Scan::default())?;
        }
        line += skip_space(reader)?;
        if reader.peek()? == Some(b',') {
            reader.consume(1);
        }
    }
    reader.consume(1);
    skip_space(reader)?;
    Ok(reader.peek()?.is_none())
}

/// Whether an item of a list is an object, but no message.
fn is_row(item: &[u8]) -> bool {
    let object = serde_json::from_slice::<std::collections::BTreeMap<String, IgnoredAny>>(item);
    object.is_ok_and(|object| !object.contains_key("role") && !object.contains_key("from"))
}

/// Skips what is left of a value. Returns the number of line ends in it.
fn skip_value(reader: &mut impl BufRead, mut scan: Scan) -> io::Result<u64> {
    let mut lines = 0;
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut used = buffer.len();
        let mut done = false;
        for (index, byte) in buffer.iter().enumerate() {
            if scan.ended_before(*byte) || (*byte == b'}' && scan.is_outside()) {
                (used, done) = (index, true);
                break;
            }
            if scan.ends_after(*byte) {
                (used, done) = (index + 1, true);
                break;
            }
        }
        lines += line_ends(&buffer[..used]);
        reader.consume(used);
        if done {
            return Ok(lines);
        }
    }
}
