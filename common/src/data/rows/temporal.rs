//! Dates, times and decimal numbers of columns, for which JSON has no values: texts, as Python writes them.
//!
//! Enters: a cell of an Arrow array. Leaves: its text, or a mark where it has none.

use arrow_array::Array;
use arrow_array::cast::AsArray;
use arrow_array::temporal_conversions::{
    date32_to_datetime, date64_to_datetime, timestamp_ms_to_datetime, timestamp_ns_to_datetime,
    timestamp_s_to_datetime, timestamp_us_to_datetime,
};
use arrow_array::types::{
    Date32Type, Date64Type, Decimal128Type, Decimal256Type, TimestampMicrosecondType,
    TimestampMillisecondType, TimestampNanosecondType, TimestampSecondType,
};
use arrow_schema::{DataType, TimeUnit};
use serde_json::Value as Json;

use crate::data::json::marked;

/// A date, time or decimal number as text.
pub fn temporal(array: &dyn Array, row: usize) -> Json {
    let text = match array.data_type() {
        DataType::Date32 => date32_to_datetime(array.as_primitive::<Date32Type>().value(row))
            .map(|time| time.date().to_string()),
        DataType::Date64 => date64_to_datetime(array.as_primitive::<Date64Type>().value(row))
            .map(|time| time.date().to_string()),
        DataType::Timestamp(unit, zone) => {
            let time = match unit {
                TimeUnit::Second => {
                    timestamp_s_to_datetime(array.as_primitive::<TimestampSecondType>().value(row))
                }
                TimeUnit::Millisecond => timestamp_ms_to_datetime(
                    array.as_primitive::<TimestampMillisecondType>().value(row),
                ),
                TimeUnit::Microsecond => timestamp_us_to_datetime(
                    array.as_primitive::<TimestampMicrosecondType>().value(row),
                ),
                TimeUnit::Nanosecond => timestamp_ns_to_datetime(
                    array.as_primitive::<TimestampNanosecondType>().value(row),
                ),
            };
            // A time with a zone is stored as one of UTC.
            let zone = if zone.is_some() { "+00:00" } else { "" };
            time.map(|time| {
                // As many digits as Python shows.
                let fraction = match time.and_utc().timestamp_subsec_nanos() {
                    0 => String::new(),
                    nanos if nanos % 1000 == 0 => format!(".{:06}", nanos / 1000),
                    nanos => format!(".{nanos:09}"),
                };
                format!("{}{fraction}{zone}", time.format("%Y-%m-%dT%H:%M:%S"))
            })
        }
        DataType::Decimal128(_, _) => {
            Some(array.as_primitive::<Decimal128Type>().value_as_string(row))
        }
        DataType::Decimal256(_, _) => {
            Some(array.as_primitive::<Decimal256Type>().value_as_string(row))
        }
        _ => None,
    };
    match text {
        Some(text) => Json::String(text),
        None => marked(&format!("a value of the type {}", array.data_type())),
    }
}
