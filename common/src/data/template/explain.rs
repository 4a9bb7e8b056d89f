//! Which part of a row a template stumbled over.
//!
//! Enters: a failure and what the template was given. Leaves: the failure with the number of the message and its field in
//! it. Values are found again by being the same object, never by their text.

use super::input::RenderInput;
use super::jinja::{Failure, Reason, Value};

/// The failure, naming what is at fault in the row if that can be told.
pub(super) fn explain(mut failure: Box<Failure>, input: &RenderInput) -> Box<Failure> {
    let Reason::Failed(text) = &failure.reason else {
        return failure;
    };
    let told = failure
        .blamed
        .iter()
        .find_map(|blamed| told(text, blamed, input));
    if let Some(told) = told {
        failure.reason = Reason::Failed(told);
    }
    failure
}

fn told(text: &str, blamed: &Value, input: &RenderInput) -> Option<String> {
    if let Value::Undefined(undefined) = blamed {
        let owner = undefined.owner.as_ref()?;
        let place = place_of(owner, input)?;
        let name = undefined.name.as_deref()?;
        let has_not = format!("{place}: its `{name}` is null or missing");
        let reason = undefined.reason();
        return Some(match text.strip_prefix(&reason) {
            Some(rest) => format!("{has_not}{rest}"),
            None => format!("{has_not}: {text}"),
        });
    }
    let place = place_of(blamed, input)?;
    Some(format!("{place} is {}: {text}", blamed.described()))
}

fn place_of(wanted: &Value, input: &RenderInput) -> Option<String> {
    let mut messages = input.messages.iter().zip(1..);
    let in_messages = messages
        .find_map(|(message, number)| path_to(wanted, message, &format!("message {number}")));
    in_messages.or_else(|| match input.tools? {
        Value::List(tools) => {
            let mut tools = tools.iter().zip(1..);
            tools.find_map(|(tool, number)| path_to(wanted, tool, &format!("tool {number}")))
        }
        _ => None,
    })
}

/// Where the value is inside of another one, for people.
fn path_to(wanted: &Value, value: &Value, place: &str) -> Option<String> {
    if is_same(wanted, value) {
        return Some(place.to_owned());
    }
    match value {
        Value::List(items) => {
            let mut items = items.iter().zip(1..);
            items.find_map(|(item, number)| path_to(wanted, item, &numbered(place, number)))
        }
        Value::Dict(dict) => dict.pairs().iter().find_map(|(key, item)| {
            let place = match key.as_str()? {
                "function" => place.to_owned(),
                key => format!("{place}: `{key}`"),
            };
            path_to(wanted, item, &place)
        }),
        _ => None,
    }
}

fn numbered(place: &str, number: usize) -> String {
    match place.strip_suffix("`tool_calls`") {
        Some(before) => format!("{before}tool call {number}"),
        None => format!("{place}, item {number}"),
    }
}

fn is_same(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Text(a), Value::Text(b)) => a.is_same(b),
        (Value::List(a), Value::List(b)) => a.is_same(b),
        (Value::Dict(a), Value::Dict(b)) => a.is_same(b),
        _ => false,
    }
}
