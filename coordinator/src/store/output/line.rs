//! A line of `metrics.jsonl` as JSON.

use serde_json::{Map, Value};

/// A line of `metrics.jsonl`.
pub type Line = Map<String, Value>;

/// A JSON object as a line; anything else becomes an empty one.
pub(super) fn object(value: Value) -> Line {
    match value {
        Value::Object(line) => line,
        _ => Line::new(),
    }
}
