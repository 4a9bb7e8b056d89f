//! How LLaMA-Factory says what a dataset's rows look like: `formatting`, `columns`, `tags`.
//!
//! Source of the names: LLaMA-Factory, `data/README.md` (0.9.5).

use super::did_you_mean::did_you_mean;
use super::quote::shorten;
use super::yaml::{Key, Node, Value};

/// Columns that LLaMA-Factory names in `columns`, and the fields that are the same.
const COLUMNS: [(&str, &str); 10] = [
    ("prompt", "field_instruction"),
    ("query", "field_input"),
    ("response", "field_output"),
    ("system", "field_system"),
    ("history", "field_history"),
    ("messages", "field_messages"),
    ("tools", "field_tools"),
    ("chosen", "field_chosen"),
    ("rejected", "field_rejected"),
    ("kto_tag", "field_rejected"),
];

/// Keys and roles that it names in `tags`: a field, or a role.
const TAGS: [(&str, &str); 8] = [
    ("role_tag", "field_role"),
    ("content_tag", "field_content"),
    ("user_tag", "user"),
    ("assistant_tag", "assistant"),
    ("observation_tag", "tool"),
    ("function_tag", "function_call"),
    ("system_tag", "system"),
    ("tool_tag", "tool"),
];

/// What `formatting`, `columns` or `tags` of a dataset says, in the fields of a dataset.
pub(super) fn dataset_fields(key: &Key, node: Node) -> Result<Vec<(Key, Node)>, String> {
    if node.is_null() {
        return Ok(Vec::new());
    }
    let origin = node.origin.clone();
    let key_of = |text: &str| Key {
        text: text.to_owned(),
        origin: origin.clone(),
    };
    if key.text == "formatting" {
        let kind = match &node.value {
            Value::Scalar { text, .. } if text == "alpaca" => "instructions",
            Value::Scalar { text, .. } if text == "sharegpt" => "sharegpt",
            Value::Scalar { text, .. } if text == "openai" => "messages",
            _ => {
                return Err(format!(
                    "`formatting` must be one of alpaca, sharegpt, openai, found {}",
                    node.describe()
                ));
            }
        };
        return Ok(vec![(key_of("type"), Node::scalar(kind, true, &origin))]);
    }
    let Value::Mapping(entries) = node.value else {
        return Err(format!(
            "`{}` is a mapping of LLaMA-Factory's names to the data's",
            key.text
        ));
    };
    let table: &[(&str, &str)] = match key.text.as_str() {
        "columns" => &COLUMNS,
        _ => &TAGS,
    };
    let mut fields = Vec::new();
    let mut roles = Vec::new();
    for (name, node) in entries {
        let Some((_, field)) = table.iter().find(|(known, _)| *known == name.text) else {
            let hint = did_you_mean(&name.text, table.iter().map(|(known, _)| *known));
            return Err(format!(
                "`{}` has no `{}`{hint}",
                key.text,
                shorten(&name.text)
            ));
        };
        if node.is_null() {
            continue;
        }
        match field.starts_with("field_") {
            true => fields.push((key_of(field), node)),
            false => roles.push((key_of(field), node)),
        }
    }
    if !roles.is_empty() {
        let value = Value::Mapping(roles);
        fields.push((
            key_of("roles"),
            Node {
                origin: origin.clone(),
                value,
            },
        ));
    }
    Ok(fields)
}
