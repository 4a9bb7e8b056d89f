//! Converts JSON to what templates see.

use serde_json::Value as Json;

use super::super::json;
use super::jinja::{Dict, Integer, Value};

/// A message as templates see it: keys whose value is null are left out, and reasoning is there under every name that
/// templates read it by (`_alias_reasoning_fields` in Transformers).
pub fn message_value(message: &Json) -> Value {
    let Json::Object(fields) = message else {
        return to_value(message);
    };
    let reasoning = ["reasoning_content", "thinking", "reasoning"]
        .iter()
        .find_map(|name| fields.get(*name).filter(|value| !value.is_null()));
    let mut pairs: Vec<(Value, Value)> = Vec::with_capacity(fields.len() + 2);
    if let Some(reasoning) = reasoning {
        for name in ["thinking", "reasoning_content"] {
            if fields.get(name).is_none_or(Json::is_null) {
                pairs.push((Value::text(name), to_value(reasoning)));
            }
        }
    }
    let fields = fields.iter().filter(|(_, value)| !value.is_null());
    pairs.extend(fields.map(|(name, value)| (Value::text(name.as_str()), to_value(value))));
    object(pairs)
}

/// JSON as a template value.
pub fn to_value(json: &Json) -> Value {
    match json {
        Json::Null => Value::None,
        Json::Bool(value) => Value::Bool(*value),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(value), _) => Value::int(value),
            (None, Some(value)) => Value::Int(Integer::from_i128(i128::from(value))),
            (None, None) => Value::Float(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::text(text.as_str()),
        Json::Array(items) => {
            // Only values deeper than any JSON that can be read are refused.
            Value::list(items.iter().map(to_value).collect()).unwrap_or(Value::None)
        }
        Json::Object(fields) => object(
            fields
                .iter()
                .map(|(key, value)| (Value::text(key.as_str()), to_value(value))),
        ),
    }
}

fn object(pairs: impl IntoIterator<Item = (Value, Value)>) -> Value {
    Dict::new(pairs).map_or(Value::None, Value::Dict)
}

/// The messages with the arguments of tool calls parsed where they are JSON text (OpenAI's wire form), for templates that
/// fail on text. None where no message has such arguments.
pub(super) fn with_parsed_arguments(messages: &[Value]) -> Option<Vec<Value>> {
    let mut changed = false;
    let parsed = messages
        .iter()
        .map(|message| {
            replaced(message, "tool_calls", &mut |calls| {
                let Value::List(calls) = calls else {
                    return None;
                };
                let calls = calls.iter().map(|call| parsed_call(call, &mut changed));
                Value::list(calls.collect()).ok()
            })
        })
        .collect();
    changed.then_some(parsed)
}

fn parsed_call(call: &Value, changed: &mut bool) -> Value {
    let mut parse = |arguments: &Value| {
        let json = json::parse_text(arguments.as_str()?).ok()?;
        let is_exact = json.is_object() && json::unreadable_number(&json).is_none();
        let value = is_exact.then(|| to_value(&json))?;
        *changed = true;
        Some(value)
    };
    let direct = replaced(call, "arguments", &mut parse);
    replaced(&direct, "function", &mut |function| {
        Some(replaced(function, "arguments", &mut parse))
    })
}

/// The object with another value at this key, if `change` has one for it.
fn replaced(value: &Value, key: &str, change: &mut dyn FnMut(&Value) -> Option<Value>) -> Value {
    let Value::Dict(dict) = value else {
        return value.clone();
    };
    let Some(other) = dict.get_str(key).and_then(change) else {
        return value.clone();
    };
    let pairs = dict.pairs().iter().cloned();
    object(pairs.chain([(Value::text(key), other)]))
}
