//! Rows of ShareGPT's shape, told by their columns where the job names none.

use serde_json::{Map, Value as Json};

use crate::job::{DatasetKind, DatasetSpec, FieldNames};

/// The dataset as one of rows of this shape.
pub fn spec(dataset: &DatasetSpec) -> DatasetSpec {
    let usual = FieldNames::sharegpt();
    let mut spec = dataset.clone();
    spec.kind = DatasetKind::Messages;
    spec.fields.messages = usual.messages;
    spec.fields.role = usual.role;
    spec.fields.content = usual.content;
    spec
}

/// Whether a row has this shape, and the job names no columns of its own.
pub fn is_one(row: &Map<String, Json>, fields: &FieldNames) -> bool {
    let (usual, sharegpt) = (FieldNames::default(), FieldNames::sharegpt());
    let is_open = fields.messages == usual.messages
        && fields.role == usual.role
        && fields.content == usual.content;
    let has_own = row
        .get(&fields.messages)
        .is_some_and(|value| !value.is_null());
    let first = row.get(&sharegpt.messages).and_then(|list| list.get(0));
    let has = |message: &Json, key: &str| message.get(key).is_some();
    is_open
        && !has_own
        && first.is_some_and(|message| {
            has(message, &sharegpt.role)
                && has(message, &sharegpt.content)
                && !has(message, &fields.role)
        })
}
