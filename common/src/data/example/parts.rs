//! Finds which parts of a conversation its chat template shows, and where.
//!
//! Enters: a conversation and its text. Leaves: each part that says something, whether it is in the text, and where it
//! begins and ends. Found by rendering the conversation once more with private characters at both ends of every part:
//! without them the text must be the same, else the places are not believed.

use std::collections::BTreeSet;
use std::ops::Range;

use serde_json::Value as Json;

use super::super::record::Chat;
use crate::job::REASONING;

/// Characters that mark ends of parts (a private plane of Unicode; those that the text has are not used).
const MARKS: std::ops::RangeInclusive<char> = '\u{f0000}'..='\u{ffffd}';

/// The first byte of each of them in UTF-8 (and of nothing but characters of four bytes).
const FIRST_BYTE: u8 = 0xf3;

/// Most renderings of one conversation to find out whether a part is shown, where one rendering does not tell of all.
const MAX_ATTEMPTS: usize = 8;

/// Kind of a part of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartKind {
    Content,
    Reasoning,
    ToolCall,
    ToolArguments,
    Tools,
}

/// A part of the conversation that is not blank.
#[derive(Clone, Debug)]
pub struct Part {
    /// Index of its message in the conversation. Tools come before the first.
    pub message: usize,
    pub kind: PartKind,
    pub text: String,
    pub is_shown: bool,
    /// The byte at which it begins, where it is shown once.
    pub start: Option<usize>,
    /// The byte after its last one, where it is shown once.
    pub end: Option<usize>,
}

/// The parts of a conversation, in its order.
#[derive(Debug, Default)]
pub struct Parts {
    parts: Vec<Part>,
    /// Whether it is known where parts begin and end.
    pub are_placed: bool,
    /// Whether white space at the ends of parts is not counted to them, because the template may cut it off.
    pub are_trimmed: bool,
}

/// Where marks are put in a text.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Placement {
    /// Marks at the very ends of the text.
    Ends,
    /// Marks inside the white space at its ends, which many templates trim.
    InsideSpace,
    /// A mark in the middle, for templates that look at how a text begins or ends.
    Middle,
}

impl Parts {
    /// Finds the parts of a conversation in its text. `render` writes a conversation like this one, with other messages and
    /// tools.
    pub fn find(
        chat: &Chat,
        text: &str,
        render: impl Fn(&[Json], Option<&Json>) -> Option<String>,
    ) -> Self {
        let attempt = |placement: Placement| {
            let mut marker = Marker::new(text, placement);
            let (messages, tools) = marker.marked(chat);
            if marker.is_exhausted {
                return None;
            }
            let marked = render(&messages, tools.as_ref())?;
            let found = take_out(&marked, text, &marker.marks)?;
            Some(Self::placed(marker.parts, &found, placement))
        };
        let placed = attempt(Placement::Ends).or_else(|| attempt(Placement::InsideSpace));
        let Some(mut placed) = placed else {
            let found = attempt(Placement::Middle);
            return found.unwrap_or_else(|| Self::without_marks(chat, text, &render));
        };
        // A template may show a part without its ends.
        let all_shown = placed.parts.iter().all(|part| part.is_shown);
        if let Some(inside) = (!all_shown).then(|| attempt(Placement::Middle)).flatten() {
            for (part, inside) in placed.parts.iter_mut().zip(inside.parts) {
                part.is_shown |= inside.is_shown;
            }
        }
        placed
    }

    /// Finds which parts are shown by a template that does something else with marked texts: what is not found as it is must at
    /// least change the text when it changes.
    fn without_marks(
        chat: &Chat,
        text: &str,
        render: impl Fn(&[Json], Option<&Json>) -> Option<String>,
    ) -> Self {
        let mut marker = Marker::new("", Placement::Middle);
        marker.marked(chat);
        let mut parts = marker.parts;
        let mut attempts = 0..MAX_ATTEMPTS;
        for (index, part) in parts.iter_mut().enumerate() {
            part.is_shown = text.contains(part.text.trim()) || attempts.next().is_none() || {
                let mut marker = Marker::new(text, Placement::Middle);
                marker.only = Some(index);
                let (messages, tools) = marker.marked(chat);
                render(&messages, tools.as_ref()).as_deref() != Some(text)
            };
        }
        Self {
            parts,
            are_placed: false,
            are_trimmed: false,
        }
    }

    /// The parts with what their marks tell: two for each, in order.
    fn placed(parts: Vec<Part>, found: &[Mark], placement: Placement) -> Self {
        let are_placed = placement != Placement::Middle;
        let parts = parts.into_iter().zip(found.chunks(2)).map(|(part, marks)| {
            let place = |mark: &Mark| (are_placed && mark.count == 1).then_some(mark.at);
            Part {
                is_shown: marks.iter().any(|mark| mark.count > 0),
                start: marks.first().and_then(place),
                end: marks.last().and_then(place),
                ..part
            }
        });
        Self {
            parts: parts.collect(),
            are_placed,
            are_trimmed: placement == Placement::InsideSpace,
        }
    }

    pub fn all(&self) -> &[Part] {
        &self.parts
    }

    /// The parts of one message, without tools.
    pub fn of(&self, message: usize) -> impl Iterator<Item = &Part> {
        let from = self.first_from(message);
        let to = self.first_from(message + 1);
        self.parts[from..to]
            .iter()
            .filter(|part| part.kind != PartKind::Tools)
    }

    /// The number of the first part of this message or a later one.
    fn first_from(&self, message: usize) -> usize {
        self.parts.partition_point(|part| part.message < message)
    }

    /// Bytes from the first to the last mark of a message. None where one of its shown parts has an end that is not known.
    pub fn bounds(&self, message: usize) -> Option<Range<usize>> {
        let mut bounds: Option<Range<usize>> = None;
        for part in self.of(message).filter(|part| part.is_shown) {
            let (start, end) = (part.start?, part.end?);
            let known = bounds.unwrap_or(start..end);
            bounds = Some(known.start.min(start)..known.end.max(end));
        }
        bounds
    }

    /// Byte at which the next message that is shown begins to say something, or the end of the text.
    pub fn next_start(&self, message: usize, text_len: usize) -> Option<usize> {
        let later = &self.parts[self.first_from(message + 1)..];
        match later.iter().find(|part| part.is_shown) {
            None => Some(text_len),
            Some(next) => self.bounds(next.message).map(|bounds| bounds.start),
        }
    }

    /// Byte at which the last message before this one that is shown ends, or the start of the text.
    pub fn previous_end(&self, message: usize) -> Option<usize> {
        let mut earlier = self.parts[..self.first_from(message)].iter().rev();
        let is_shown = |part: &&Part| part.is_shown && part.kind != PartKind::Tools;
        match earlier.find(is_shown) {
            None => Some(0),
            Some(previous) => self.bounds(previous.message).map(|bounds| bounds.end),
        }
    }
}

/// A mark as it was found in a text.
#[derive(Clone, Copy, Debug, Default)]
struct Mark {
    count: usize,
    /// Byte of the text at which it was found last, marks not counted.
    at: usize,
}

/// Finds the marks in a text. None where the text is another one without them.
fn take_out(marked: &str, text: &str, marks: &[char]) -> Option<Vec<Mark>> {
    let mut found = vec![Mark::default(); marks.len()];
    let (mut rest, mut marked) = (text, marked);
    // What is between two of these characters is compared at once.
    while let Some(at) = marked.bytes().position(|byte| byte == FIRST_BYTE) {
        let (plain, tail) = marked.split_at(at);
        rest = rest.strip_prefix(plain)?;
        let c = tail.chars().next()?;
        match marks.binary_search(&c) {
            Ok(index) => {
                found[index].count += 1;
                found[index].at = text.len() - rest.len();
            }
            Err(_) => rest = rest.strip_prefix(c)?,
        }
        marked = &tail[c.len_utf8()..];
    }
    (rest == marked).then_some(found)
}

/// Puts marks into copies of a conversation.
struct Marker {
    placement: Placement,
    used: BTreeSet<char>,
    free: std::ops::RangeInclusive<char>,
    /// Marks in rising order: those of the first part, of the second ...
    marks: Vec<char>,
    parts: Vec<Part>,
    /// Whether there are more parts than marks.
    is_exhausted: bool,
    /// The only part that gets its marks, by its number.
    only: Option<usize>,
}

impl Marker {
    fn new(text: &str, placement: Placement) -> Self {
        // Most texts have none of them.
        let text = match text.as_bytes().contains(&FIRST_BYTE) {
            true => text,
            false => "",
        };
        Self {
            placement,
            used: text.chars().filter(|c| MARKS.contains(c)).collect(),
            free: MARKS,
            marks: Vec::new(),
            parts: Vec::new(),
            is_exhausted: false,
            only: None,
        }
    }

    fn marked(&mut self, chat: &Chat) -> (Vec<Json>, Option<Json>) {
        let tools = chat.tools.clone().map(|mut tools| {
            for tool in tools.as_array_mut().into_iter().flatten() {
                self.mark_name(tool, 0, PartKind::Tools);
            }
            tools
        });
        let messages = chat.messages.iter().enumerate();
        let messages = messages.map(|(index, message)| {
            let mut message = message.clone();
            self.mark_message(&mut message, index);
            message
        });
        (messages.collect(), tools)
    }

    fn mark_message(&mut self, message: &mut Json, index: usize) {
        self.mark_reasoning(message, index);
        match message.get_mut("content") {
            Some(Json::String(text)) => self.mark_text(text, index, PartKind::Content),
            Some(Json::Array(parts)) => {
                for part in parts {
                    match part {
                        Json::String(text) => self.mark_text(text, index, PartKind::Content),
                        part => {
                            if let Some(Json::String(text)) = part.get_mut("text") {
                                self.mark_text(text, index, PartKind::Content);
                            }
                        }
                    }
                }
            }
            _ => {}
        }
        let calls = message.get_mut("tool_calls").and_then(Json::as_array_mut);
        for call in calls.into_iter().flatten() {
            self.mark_name(call, index, PartKind::ToolCall);
            let holder = match call.get("function") {
                Some(Json::Object(_)) => call.get_mut("function"),
                _ => Some(call),
            };
            if let Some(arguments) = holder.and_then(|holder| holder.get_mut("arguments")) {
                self.mark_leaf(arguments, index);
            }
        }
    }

    /// All names of a message's reasoning are the same part.
    fn mark_reasoning(&mut self, message: &mut Json, index: usize) {
        let mut original: Option<String> = None;
        let mut marked = String::new();
        for name in REASONING {
            let Some(Json::String(text)) = message.get_mut(name) else {
                continue;
            };
            if original.is_none() {
                original = Some(text.clone());
                marked.clone_from(text);
                self.mark_text(&mut marked, index, PartKind::Reasoning);
            }
            if original.as_ref() == Some(text) {
                text.clone_from(&marked);
            }
        }
    }

    /// The name of a tool or of a call, in either of the two places where it can be.
    fn mark_name(&mut self, holder: &mut Json, index: usize, kind: PartKind) {
        let name = match holder.get("function") {
            Some(Json::Object(_)) => holder["function"].get_mut("name"),
            _ => holder.get_mut("name"),
        };
        if let Some(Json::String(name)) = name {
            self.mark_text(name, index, kind);
        }
    }

    /// The first text inside a value; a template that shows the value shows it.
    fn mark_leaf(&mut self, value: &mut Json, index: usize) -> bool {
        match value {
            // Arguments that are JSON in a string stay JSON, because templates parse them.
            Json::String(text) if text.trim().starts_with('{') => {
                let Some(range) = first_string_value(text) else {
                    return false;
                };
                let mut inside = text[range.clone()].to_owned();
                self.mark_text(&mut inside, index, PartKind::ToolArguments);
                text.replace_range(range, &inside);
                true
            }
            Json::String(text) if !text.trim().is_empty() => {
                self.mark_text(text, index, PartKind::ToolArguments);
                true
            }
            Json::Array(items) => items.iter_mut().any(|item| self.mark_leaf(item, index)),
            Json::Object(fields) => fields
                .values_mut()
                .any(|value| self.mark_leaf(value, index)),
            _ => false,
        }
    }

    fn mark_text(&mut self, text: &mut String, message: usize, kind: PartKind) {
        if text.trim().is_empty() {
            return;
        }
        self.parts.push(Part {
            message,
            kind,
            text: text.clone(),
            is_shown: false,
            start: None,
            end: None,
        });
        let (Some(start), Some(end)) = (self.next_mark(), self.next_mark()) else {
            self.is_exhausted = true;
            return;
        };
        if self.only.is_some_and(|only| only + 1 != self.parts.len()) {
            return;
        }
        let (head, tail) = match self.placement {
            Placement::Ends => (0, text.len()),
            Placement::InsideSpace => {
                let body = text.trim_start();
                let head = text.len() - body.len();
                (head, head + body.trim_end().len())
            }
            Placement::Middle => {
                let middle = middle_of(text);
                (middle, middle)
            }
        };
        if self.placement != Placement::Middle {
            text.insert(tail, end);
        }
        text.insert(head, start);
    }

    fn next_mark(&mut self) -> Option<char> {
        let used = &self.used;
        let mark = self.free.find(|mark| !used.contains(mark))?;
        self.marks.push(mark);
        Some(mark)
    }
}

/// Where the first string stands that is a value in a JSON text, without its quotes. One with escapes is passed over:
/// a mark could part an escape.
fn first_string_value(json: &str) -> Option<Range<usize>> {
    serde_json::from_str::<serde::de::IgnoredAny>(json).ok()?;
    let mut from = 0;
    while let Some(quote) = json[from..].find('"') {
        let start = from + quote + 1;
        let length = string_length(&json[start..])?;
        let end = start + length;
        from = end + 1;
        let is_key = json[from..].trim_start().starts_with(':');
        let inside = &json[start..end];
        if !is_key && !inside.trim().is_empty() && !inside.contains('\\') {
            return Some(start..end);
        }
    }
    None
}

/// Bytes up to the quote that ends a JSON string.
fn string_length(rest: &str) -> Option<usize> {
    let mut is_escaped = false;
    rest.bytes().position(|byte| {
        let ends = byte == b'"' && !is_escaped;
        is_escaped = byte == b'\\' && !is_escaped;
        ends
    })
}

/// Inside the text, not in its white space.
fn middle_of(text: &str) -> usize {
    let body = text.trim_start();
    let head = text.len() - body.len();
    let mut middle = head + body.trim_end().len() / 2;
    while !text.is_char_boundary(middle) {
        middle += 1;
    }
    middle
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often each mark was found, and where last.
    fn found(marked: &str, text: &str) -> Option<Vec<(usize, usize)>> {
        let marks = ['\u{f0001}', '\u{f0002}'];
        let found = take_out(marked, text, &marks)?;
        Some(found.iter().map(|mark| (mark.count, mark.at)).collect())
    }

    #[test]
    fn marks_are_found_beside_characters_that_begin_with_the_same_byte() {
        assert_eq!(found("ab", "ab"), Some(vec![(0, 0), (0, 0)]));
        assert_eq!(
            found("a\u{f0001}\u{e9}\u{f0002}", "a\u{e9}"),
            Some(vec![(1, 1), (1, 3)])
        );
        assert_eq!(
            found(
                "\u{f0001}\u{f0000}\u{c0001}\u{f0001}b",
                "\u{f0000}\u{c0001}b"
            ),
            Some(vec![(2, 8), (0, 0)])
        );
    }

    #[test]
    fn a_text_that_differs_without_its_marks_is_not_believed() {
        for marked in ["a", "abc", "a\u{f0001}c", "a\u{f0000}b", "\u{f0001}", ""] {
            assert_eq!(found(marked, "ab"), None, "{marked:?}");
        }
        assert_eq!(found("ab", "ab\u{f0000}"), None);
    }
}
