//! Rows of columns: batches of Arrow arrays as JSON values.
//!
//! Enters: batches of a Parquet or Arrow file. Leaves: a row for each of theirs, as `datasets` hands it out: a struct is an object, a
//! list a list, nothing is null. What no JSON holds (NaN, bytes that are no text) is a mark that whoever reads it refuses. Never holds
//! more than a batch.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use arrow_array::cast::AsArray;
use arrow_array::types::{
    Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type,
    UInt16Type, UInt32Type, UInt64Type,
};
use arrow_array::{Array, RecordBatch};
use arrow_schema::{ArrowError, DataType, Field, Fields, Schema};
use serde_json::{Map, Number, Value as Json};

use super::row::{MAX_ROW_BYTES, RawRow, too_long};
use super::temporal::temporal;
use crate::data::json::{self, marked};

/// Deepest nesting of a column's type.
const MAX_DEPTH: usize = 64;

/// Most columns of a table, those within columns too.
const MAX_COLUMNS: usize = 1 << 14;

/// Rows of batches, in order.
pub struct ColumnRows<B> {
    batches: B,
    batch: Option<RecordBatch>,
    /// Row of the batch that is next.
    next: usize,
    /// Number of rows before.
    number: u64,
    is_done: bool,
    /// What the file is, for messages.
    what: &'static str,
}

impl<B: Iterator<Item = Result<RecordBatch, ArrowError>>> ColumnRows<B> {
    pub fn new(batches: B, schema: &Schema, what: &'static str) -> Result<Self, String> {
        let mut count = 0;
        check(schema.fields(), 0, &mut count)?;
        let mut names: Vec<&String> = schema.fields().iter().map(|field| field.name()).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!(
                "has the column `{}` twice: give one of them another name",
                twice[0]
            ));
        }
        Ok(Self {
            batches,
            batch: None,
            next: 0,
            number: 0,
            is_done: false,
            what,
        })
    }

    fn row(&self, batch: &RecordBatch) -> Result<Json, String> {
        let mut room = MAX_ROW_BYTES;
        let mut row = Map::new();
        let schema = batch.schema_ref();
        for (field, column) in schema.fields().iter().zip(batch.columns()) {
            let value = value(field, column, self.next, &mut room).ok_or_else(too_long)?;
            row.insert(field.name().clone(), value);
        }
        Ok(Json::Object(row))
    }
}

impl<B: Iterator<Item = Result<RecordBatch, ArrowError>>> Iterator for ColumnRows<B> {
    type Item = RawRow;

    fn next(&mut self) -> Option<RawRow> {
        while !self.is_done {
            if let Some(batch) = self.batch.take_if(|batch| self.next < batch.num_rows()) {
                let row = guarded(self.what, || self.row(&batch)).and_then(|row| row);
                self.batch = Some(batch);
                self.next += 1;
                self.number += 1;
                return Some(match row {
                    Ok(row) => RawRow::Parsed(self.number, row),
                    Err(reason) => RawRow::Unreadable(self.number, reason),
                });
            }
            self.next = 0;
            let batches = &mut self.batches;
            let batch = guarded(self.what, || batches.next().transpose());
            let batch = batch.and_then(|batch| batch.map_err(|error| damaged(self.what, &error)));
            match batch {
                Ok(batch) => self.batch = Some(batch?),
                Err(reason) => {
                    self.is_done = true;
                    return Some(RawRow::Unreadable(self.number + 1, reason));
                }
            }
        }
        None
    }
}

thread_local! {
    /// Whether this thread is in [`guarded`], whose panics are told as errors.
    static IS_GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Lets panics in [`guarded`] print nothing, from the first call on.
fn quiet_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !IS_GUARDED.with(Cell::get) {
                usual(panic);
            }
        }));
    });
}

/// Does something with data that may be damaged: in some of it the Arrow libraries meet what they take for impossible, and panic.
pub fn guarded<T>(what: &str, work: impl FnOnce() -> T) -> Result<T, String> {
    quiet_panics();
    IS_GUARDED.with(|guarded| guarded.set(true));
    let result = catch_unwind(AssertUnwindSafe(work));
    IS_GUARDED.with(|guarded| guarded.set(false));
    result.map_err(|_| damaged(what, &"it contradicts itself"))
}

/// What to do with a file whose columns cannot be read.
pub fn damaged(what: &str, error: &dyn std::fmt::Display) -> String {
    let reason = error.to_string();
    let reason = reason.lines().next().unwrap_or_default();
    if reason.contains("IPC decompression requires") {
        return "is an Arrow file with compressed columns, which is not read: write it with `compression=\"uncompressed\"`, or as Parquet".to_owned();
    }
    if reason.contains("brotli") {
        return format!(
            "holds {what} data compressed with Brotli, which is not read: write it with Snappy or Zstandard"
        );
    }
    format!(
        "the {what} data cannot be read ({reason}): is it cut off or damaged? Copy or download it again"
    )
}

/// Checks that types are not nested without an end.
fn check(fields: &Fields, depth: usize, count: &mut usize) -> Result<(), String> {
    for field in fields {
        *count += 1;
        if depth > MAX_DEPTH || *count > MAX_COLUMNS {
            return Err(format!(
                "has more than {MAX_DEPTH} columns within each other, or more than {MAX_COLUMNS} in all"
            ));
        }
        match field.data_type() {
            DataType::Struct(fields) => check(fields, depth + 1, count)?,
            DataType::List(item)
            | DataType::LargeList(item)
            | DataType::FixedSizeList(item, _)
            | DataType::Map(item, _) => {
                check(&Fields::from(vec![item.clone()]), depth + 1, count)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// A cell as JSON. None where there is no room for it.
fn value(field: &Field, array: &dyn Array, row: usize, room: &mut usize) -> Option<Json> {
    *room = room.checked_sub(1)?;
    if array.is_null(row) {
        return Some(Json::Null);
    }
    let number = |number: i64| Json::Number(number.into());
    let float = |float: f64| {
        Number::from_f64(float).map_or_else(|| marked(float_name(float)), Json::Number)
    };
    Some(match array.data_type() {
        DataType::Null => Json::Null,
        DataType::Boolean => Json::Bool(array.as_boolean().value(row)),
        DataType::Int8 => number(array.as_primitive::<Int8Type>().value(row).into()),
        DataType::Int16 => number(array.as_primitive::<Int16Type>().value(row).into()),
        DataType::Int32 => number(array.as_primitive::<Int32Type>().value(row).into()),
        DataType::Int64 => number(array.as_primitive::<Int64Type>().value(row)),
        DataType::UInt8 => number(array.as_primitive::<UInt8Type>().value(row).into()),
        DataType::UInt16 => number(array.as_primitive::<UInt16Type>().value(row).into()),
        DataType::UInt32 => number(array.as_primitive::<UInt32Type>().value(row).into()),
        DataType::UInt64 => Json::Number(array.as_primitive::<UInt64Type>().value(row).into()),
        DataType::Float16 => float(array.as_primitive::<Float16Type>().value(row).into()),
        DataType::Float32 => float(array.as_primitive::<Float32Type>().value(row).into()),
        DataType::Float64 => float(array.as_primitive::<Float64Type>().value(row)),
        DataType::Utf8 => text(field, array.as_string::<i32>().value(row), room)?,
        DataType::LargeUtf8 => text(field, array.as_string::<i64>().value(row), room)?,
        DataType::Utf8View => text(field, array.as_string_view().value(row), room)?,
        DataType::Binary => bytes(array.as_binary::<i32>().value(row), room)?,
        DataType::LargeBinary => bytes(array.as_binary::<i64>().value(row), room)?,
        DataType::BinaryView => bytes(array.as_binary_view().value(row), room)?,
        DataType::FixedSizeBinary(_) => bytes(array.as_fixed_size_binary().value(row), room)?,
        DataType::List(item) => list(item, &array.as_list::<i32>().value(row), room)?,
        DataType::LargeList(item) => list(item, &array.as_list::<i64>().value(row), room)?,
        DataType::FixedSizeList(item, _) => {
            list(item, &array.as_fixed_size_list().value(row), room)?
        }
        DataType::Struct(fields) => {
            let mut object = Map::new();
            for (field, column) in fields.iter().zip(array.as_struct().columns()) {
                object.insert(field.name().clone(), value(field, column, row, room)?);
            }
            Json::Object(object)
        }
        DataType::Map(entries, _) => map(entries, array, row, room)?,
        DataType::Dictionary(_, _) => {
            let dictionary = array.as_any_dictionary();
            let key = value(field, dictionary.keys(), row, room)?;
            let key = key.as_u64().and_then(|key| usize::try_from(key).ok());
            let values = dictionary.values();
            match key.filter(|key| *key < values.len()) {
                Some(key) => value(field, values, key, room)?,
                None => marked("a value that its dictionary does not have"),
            }
        }
        _ => temporal(array, row),
    })
}

fn float_name(float: f64) -> &'static str {
    match float {
        float if float.is_nan() => "NaN",
        float if float > 0.0 => "Infinity",
        _ => "-Infinity",
    }
}

fn text(field: &Field, text: &str, room: &mut usize) -> Option<Json> {
    *room = room.checked_sub(text.len())?;
    let name = field.metadata().get("ARROW:extension:name");
    // What `datasets` writes where rows have values of several types.
    if name.is_some_and(|name| name == "arrow.json")
        && let Ok(json) = json::parse_text(text)
    {
        return Some(json);
    }
    Some(Json::String(text.to_owned()))
}

fn bytes(bytes: &[u8], room: &mut usize) -> Option<Json> {
    *room = room.checked_sub(bytes.len())?;
    // Old writers do not say of text that it is text.
    Some(match std::str::from_utf8(bytes) {
        Ok(text) => Json::String(text.to_owned()),
        Err(_) => marked("bytes that are no text"),
    })
}

fn list(item: &Field, items: &dyn Array, room: &mut usize) -> Option<Json> {
    let items = (0..items.len()).map(|index| value(item, items, index, room));
    items.collect::<Option<Vec<Json>>>().map(Json::Array)
}

/// A map as an object, whose keys are texts or become them.
fn map(entries: &Field, array: &dyn Array, row: usize, room: &mut usize) -> Option<Json> {
    let DataType::Struct(fields) = entries.data_type() else {
        return Some(marked("a map"));
    };
    let pairs = array.as_map().value(row);
    let [key_field, value_field] = fields.as_ref() else {
        return Some(marked("a map"));
    };
    let mut object = Map::new();
    for index in 0..pairs.len() {
        let key = match value(key_field, pairs.column(0), index, room)? {
            Json::String(key) => key,
            other => other.to_string(),
        };
        let value = value(value_field, pairs.column(1), index, room)?;
        object.insert(key, value);
    }
    Some(Json::Object(object))
}
