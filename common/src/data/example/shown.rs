//! Finds what of a conversation its text does not show.
//!
//! Enters: a conversation, its parts, and the texts of answers that are learned apart. Leaves: notes on parts that reach no
//! example, or why an answer cannot be learned: a text in which nothing of it is there would teach to say nothing.

use serde_json::Value as Json;

use super::super::notes::Note;
use super::super::record::Chat;
use super::super::template::ChatTemplate;
use super::parts::{Part, PartKind, Parts};
use crate::job::REASONING;

/// Answers with a text of their own: the message, and what that text has from the answer on.
pub type Apart<'a> = [(usize, &'a str)];

/// Notes every part that is in no text.
pub fn note_hidden(chat: &Chat, parts: &Parts, apart: &Apart, notes: &mut Vec<Note>) {
    for part in parts.all() {
        if is_in_a_text(part, apart) || is_of_a_hidden_call(part, parts) {
            continue;
        }
        let message = &chat.messages[part.message];
        notes.push(Note::NotShown(name_of(part.kind, message)));
    }
}

/// Refuses answers of which nothing is shown.
pub fn check_answers(
    chat: &Chat,
    parts: &Parts,
    turns: &[usize],
    apart: &Apart,
    notes: &mut Vec<Note>,
) -> Result<(), String> {
    for turn in turns {
        let mut all = parts.of(*turn).peekable();
        if all.peek().is_none() {
            notes.push(Note::EmptyAnswer);
        } else if !all.any(|part| is_in_a_text(part, apart)) {
            let hint = hint(&chat.messages[*turn]);
            return Err(format!(
                "the chat template shows nothing of the answer in message {}{hint}",
                turn + 1
            ));
        }
    }
    Ok(())
}

/// Notes on keys of messages that the template never asks for.
pub fn unread_keys(chat: &Chat, template: &ChatTemplate) -> Vec<Note> {
    let fields = chat.messages.iter().filter_map(Json::as_object).flatten();
    let asks = |name: &str| {
        ["role", "content", "tool_calls"].contains(&name)
            || REASONING.contains(&name)
            || template.source().contains(name)
    };
    let unread = fields.filter(|(name, value)| !value.is_null() && !asks(name));
    let mut names: Vec<&String> = unread.map(|(name, _)| name).collect();
    names.sort_unstable();
    names.dedup();
    let notes = names.into_iter().cloned().map(Note::MessageKey);
    notes.collect()
}

fn is_in_a_text(part: &Part, apart: &Apart) -> bool {
    let own = apart.iter().find(|(turn, _)| *turn == part.message);
    part.is_shown || own.is_some_and(|(_, text)| text.contains(part.text.trim()))
}

/// Whether the part is the arguments of a call that is not shown, which need no note of their own.
fn is_of_a_hidden_call(part: &Part, parts: &Parts) -> bool {
    let is_hidden = |part: &Part| part.kind == PartKind::ToolCall && !part.is_shown;
    part.kind == PartKind::ToolArguments && parts.of(part.message).any(is_hidden)
}

fn name_of(kind: PartKind, message: &Json) -> &'static str {
    let has_calls = |message: &Json| {
        let calls = message["tool_calls"].as_array();
        calls.is_some_and(|calls| !calls.is_empty())
    };
    match (kind, message["role"].as_str().unwrap_or_default()) {
        (PartKind::Tools, _) => "names of tools",
        (PartKind::ToolCall, _) => "names of called tools",
        (PartKind::ToolArguments, _) => "arguments of tool calls",
        (PartKind::Reasoning, _) => "reasoning",
        (PartKind::Content, "assistant") if has_calls(message) => "text beside a tool call",
        (PartKind::Content, "assistant") => "the content of answers",
        (PartKind::Content, "user") => "the content of user messages",
        (PartKind::Content, "system") => "system messages",
        (PartKind::Content, "developer") => "developer messages",
        (PartKind::Content, "tool") => "results of tools",
        (PartKind::Content, _) => "messages of other roles",
    }
}

/// A hint on why nothing of an answer is shown, where that can be told, else nothing.
fn hint(message: &Json) -> &'static str {
    if message["content"].is_array() {
        return ": its content is a list of parts; write it as one string";
    }
    if message["tool_calls"].is_array() {
        return ": it is a tool call, for which the template has no place; use a model whose template has, or leave such rows out";
    }
    ""
}
