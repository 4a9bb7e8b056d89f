//! Finds where the answers of a conversation are in its text.
//!
//! Enters: a conversation and its chat template. Leaves: texts with the bytes of the answers to learn. An answer begins
//! where the prompt ends that a model would get, and ends where the conversation up to it ends: both are found by
//! rendering, never by searching the text for markers. An answer that the whole conversation shows otherwise than the
//! conversation up to it has a text of its own.

use std::cell::OnceCell;
use std::ops::Range;

use serde_json::{Value as Json, json};

use super::super::record::{Chat, Ends};
use super::super::template::{
    ChatTemplate, RenderInput, TemplateError, Value, message_value, to_value,
};
use super::answer::{Answer, Learned, limit};
use super::parts::{PartKind, Parts};
use super::places::infer;
use crate::job::REASONING;

/// A rendered text and the parts of it to learn.
#[derive(Debug, PartialEq)]
pub struct Draft {
    pub text: String,
    pub learned: Vec<Learned>,
    /// Which of the tokens that end messages are learned.
    pub ends: Ends,
    /// Whether it has the last message of which the end may be learned.
    pub has_last: bool,
    /// Whether the template itself says what is learned, so that nothing is taken off its end.
    pub is_exact: bool,
}

/// Stands for an answer while looking for where the template puts it. Private-use characters: no data has them.
const STAND_IN: &str = "\u{F4D1}\u{F4D2}\u{F4D3}";

/// A conversation and the template that renders it.
pub struct Conversation<'a> {
    template: &'a ChatTemplate,
    chat: &'a Chat,
    messages: Vec<Value>,
    tools: Option<Value>,
    /// The text of no messages at all.
    nothing: OnceCell<Option<String>>,
}

impl<'a> Conversation<'a> {
    pub fn new(template: &'a ChatTemplate, chat: &'a Chat) -> Self {
        Self {
            template,
            chat,
            messages: chat.messages.iter().map(message_value).collect(),
            tools: chat.tools.as_ref().map(to_value),
            nothing: OnceCell::new(),
        }
    }

    /// Number of messages.
    pub fn len(&self) -> usize {
        self.messages.len()
    }

    /// Renders the whole conversation.
    pub fn text(&self) -> Result<String, String> {
        self.render(self.messages.len(), false)
            .map_err(|error| self.explained(&error))
    }

    /// The parts of the conversation, and where its text shows them.
    pub fn parts(&self, text: &str) -> Parts {
        self.parts_of(self.chat, text)
    }

    fn parts_of(&self, chat: &Chat, text: &str) -> Parts {
        Parts::find(chat, text, |messages, tools| {
            let messages: Vec<Value> = messages.iter().map(message_value).collect();
            let tools = tools.map(to_value);
            self.template
                .render_input(self.input(&messages, tools.as_ref(), false))
                .ok()
        })
    }

    /// The parts of the first `count` messages, and where `text`, which is theirs alone, shows them.
    pub fn parts_up_to(&self, count: usize, text: &str) -> Parts {
        let chat = Chat {
            messages: self.chat.messages[..count].to_vec(),
            tools: self.chat.tools.clone(),
            ..Chat::default()
        };
        self.parts_of(&chat, text)
    }

    /// Whether `text`, that of the first `count` messages, is another one where a message has this content.
    pub fn changes_with(&self, count: usize, turn: usize, content: &str, text: &str) -> bool {
        let mut message = self.chat.messages[turn].clone();
        if let Some(own) = message.get_mut("content") {
            *own = json!(content);
        }
        self.render_with(count, turn, &message).as_deref() != Some(text)
    }

    /// Finds each of these answers.
    pub fn answers(
        &self,
        full: &str,
        parts: &Parts,
        turns: &[usize],
    ) -> Result<Vec<Answer>, String> {
        infer(self.chat, full, parts, turns, |turn| {
            self.answer(full, parts, turn)
        })
    }

    /// Whether the template says itself what is learned.
    pub fn has_generation_marks(&self) -> bool {
        self.template.has_generation_marks(self.tools.as_ref())
    }

    /// The bytes that the template marks as generated, in this text of the first `count` messages. None where it has no
    /// such marks.
    pub fn generated(&self, count: usize, text: &str) -> Result<Option<Vec<Range<usize>>>, String> {
        if !self.has_generation_marks() {
            return Ok(None);
        }
        self.template
            .render_marked(
                self.input(&self.messages[..count], self.tools.as_ref(), false),
                text,
            )
            .map(|rendered| Some(rendered.generated))
            .map_err(|error| error.to_string())
    }

    fn input<'b>(
        &'b self,
        messages: &'b [Value],
        tools: Option<&'b Value>,
        add_generation_prompt: bool,
    ) -> RenderInput<'b> {
        RenderInput {
            messages,
            tools,
            variables: &self.chat.variables,
            add_generation_prompt,
        }
    }

    /// Renders the first `count` messages.
    fn render(&self, count: usize, add_generation_prompt: bool) -> Result<String, TemplateError> {
        let messages = &self.messages[..count];
        self.template
            .render_input(self.input(messages, self.tools.as_ref(), add_generation_prompt))
    }

    /// The template's error in words, and what of the row may be the cause.
    fn explained(&self, error: &TemplateError) -> String {
        let cause = match error {
            TemplateError::Failed(_) => self.chat.messages.iter().zip(1..).find_map(suspect),
            _ => None,
        };
        match cause {
            Some(cause) => format!("{error}; {cause}"),
            None => error.to_string(),
        }
    }

    fn answer(&self, full: &str, parts: &Parts, turn: usize) -> Result<Answer, String> {
        let is_last = turn + 1 == self.messages.len();
        let own = match is_last {
            true => Ok(full.to_owned()),
            false => self.render(turn + 1, false),
        };
        let own = match own {
            Ok(own) => own,
            // The template wants more of a conversation than what comes before this answer.
            Err(error) => {
                return self
                    .answer_between(full, parts, turn)
                    .map(Answer::Whole)
                    .ok_or_else(|| {
                        format!(
                            "the conversation up to message {} alone cannot be rendered: {error}",
                            turn + 1
                        )
                    });
            }
        };
        let start = self.start_in_own(&own, full, parts, turn)?;
        Ok(match self.span_in_full(full, &own, start, turn) {
            Some(span) => {
                let limit = limit(full, parts, turn, span.end);
                Answer::Whole(Learned::answer(span, limit))
            }
            None => Answer::Apart { text: own, start },
        })
    }

    /// Finds an answer by what the whole conversation shows before and after it.
    fn answer_between(&self, full: &str, parts: &Parts, turn: usize) -> Option<Learned> {
        let bounds = parts.bounds(turn)?;
        let previous = parts.previous_end(turn)?;
        let limit = parts.next_start(turn, full.len())?;
        let prompted = self.render(self.messages.len(), true).ok();
        let prompt = prompted
            .as_deref()
            .and_then(|prompted| prompted.strip_prefix(full))
            .filter(|prompt| !prompt.trim().is_empty());
        // Between two messages there is nothing but the template's own text.
        let between = full.get(previous..bounds.start)?;
        let prompted = prompt.and_then(|prompt| Some(between.rfind(prompt)? + prompt.len()));
        let begins_with_text = parts.of(turn).any(|part| {
            part.start == Some(bounds.start)
                && matches!(part.kind, PartKind::Content | PartKind::Reasoning)
        });
        let start = match prompted {
            Some(after) => previous + after,
            None if begins_with_text => bounds.start,
            None => return None,
        };
        Some(Learned {
            is_open: true,
            ..Learned::answer(start..bounds.end, limit)
        })
    }

    /// Byte at which the turn begins in `own`, the text of the conversation that ends with it.
    fn start_in_own(
        &self,
        own: &str,
        full: &str,
        parts: &Parts,
        turn: usize,
    ) -> Result<usize, String> {
        let prompt = self.render(turn, true).ok();
        let prompt = prompt.filter(|prompt| self.shows_something(prompt));
        if let Some(prompt) = prompt.as_deref().filter(|prompt| own.starts_with(prompt)) {
            // A template may hold back what comes before (a system message, until somebody speaks).
            let is_held_back = full.starts_with(own)
                && parts.all().iter().any(|part| {
                    part.message < turn && part.start.is_some_and(|start| start >= prompt.len())
                });
            if !is_held_back {
                return Ok(prompt.len());
            }
        }
        // What the template puts before an answer is not what it prompts with (DeepSeek-R1 prompts with <think>).
        let before = self.before_turn(own, turn).ok_or_else(|| {
            format!(
                "the chat template does not show where the answer in message {} begins",
                turn + 1
            )
        })?;
        let after_prompt = prompt.and_then(|prompt| after_prompt(&before, &prompt));
        Ok(after_prompt.unwrap_or(before.len()))
    }

    /// Whether the prompt is more than what the template writes without any message.
    fn shows_something(&self, prompt: &str) -> bool {
        let nothing = self.nothing.get_or_init(|| {
            self.template
                .render_nothing(self.tools.as_ref(), &self.chat.variables)
        });
        !prompt.trim().is_empty() && nothing.as_deref() != Some(prompt)
    }

    /// Bytes at which the whole conversation shows the turn, if it shows it as it was when the turn was the last.
    fn span_in_full(
        &self,
        full: &str,
        own: &str,
        start: usize,
        turn: usize,
    ) -> Option<Range<usize>> {
        if full.starts_with(own) {
            return Some(start..own.len());
        }
        if !full.starts_with(&own[..start]) {
            return None;
        }
        // The template shows this turn differently now. That is fine if all that differs is the template's own (Qwen3
        // puts an empty <think> block before the last answer only) and not something the row says.
        let (own_before, own_after) = self.render_around(turn + 1, turn)?;
        let (full_before, full_after) = self.render_around(self.messages.len(), turn)?;
        if !full_after.starts_with(&own_after) {
            return None;
        }
        let own_answer = own.strip_prefix(&own_before)?.strip_suffix(&own_after)?;
        let full_answer = full.strip_prefix(&full_before)?.strip_suffix(&full_after)?;
        if own_answer != full_answer || full_before.len() < start {
            return None;
        }
        let end = full.len() - full_after.len() + own_after.len();
        Some(start..end)
    }

    /// The text that `own`, which ends with the turn, has before the turn's content.
    fn before_turn(&self, own: &str, turn: usize) -> Option<String> {
        if let Some((before, _)) = self.render_around(turn + 1, turn)
            && own.starts_with(&before)
        {
            return Some(before);
        }
        // Some templates show no content beside tool calls: up to where an answer without calls would differ, then.
        let answer = json!({"role": "assistant", "content": STAND_IN});
        let other = self.render_with(turn + 1, turn, &answer)?;
        let context = self.render(turn, false).unwrap_or_default();
        let shared = shared_prefix(own, &other);
        let is_after_context = !other.starts_with(&context) || shared >= context.len();
        (other.contains(STAND_IN) && shared > 0 && is_after_context)
            .then(|| own[..shared].to_owned())
    }

    /// Renders the first `count` messages with the content of `turn` replaced, and returns the text before and after it. None
    /// where the template does not show the content exactly once.
    fn render_around(&self, count: usize, turn: usize) -> Option<(String, String)> {
        let mut stand_in = self.chat.messages[turn].clone();
        if let Json::Object(fields) = &mut stand_in {
            for name in REASONING {
                fields.remove(name);
            }
            fields.insert("content".to_owned(), json!(STAND_IN));
        }
        let text = self.render_with(count, turn, &stand_in)?;
        let (before, after) = text.split_once(STAND_IN)?;
        (!after.contains(STAND_IN)).then(|| (before.to_owned(), after.to_owned()))
    }

    /// Renders the first `count` messages with another one in place of `turn`.
    fn render_with(&self, count: usize, turn: usize, message: &Json) -> Option<String> {
        let mut messages = self.messages[..count].to_vec();
        messages[turn] = message_value(message);
        self.template
            .render_input(self.input(&messages, self.tools.as_ref(), false))
            .ok()
    }
}

/// A line on something in a message that templates are known to stumble over, if it has that.
fn suspect((message, number): (&Json, usize)) -> Option<String> {
    let calls = message["tool_calls"].as_array();
    if calls.is_some() && message["content"].is_null() {
        return Some(format!(
            "message {number} has no `content` (null), which not every template can take: write \"\""
        ));
    }
    let is_text =
        |call: &Json| call["function"]["arguments"].is_string() || call["arguments"].is_string();
    calls.into_iter().flatten().any(is_text).then(|| {
        format!(
            "`arguments` of a tool call in message {number} are a string, which not every template can take: write the object itself"
        )
    })
}

/// Byte of `before` after which all of the prompt has been seen, white space aside. None where `before` is something else.
fn after_prompt(before: &str, prompt: &str) -> Option<usize> {
    let mut shown = before.char_indices().filter(|(_, c)| !c.is_whitespace());
    let mut end = 0;
    for wanted in prompt.chars().filter(|c| !c.is_whitespace()) {
        let (at, found) = shown.next()?;
        if found != wanted {
            return None;
        }
        end = at + found.len_utf8();
    }
    // White space that both have is the prompt's; what the turn has beyond it is part of the answer.
    let space = &prompt[prompt.trim_end().len()..];
    Some(end + shared_prefix(&before[end..], space))
}

/// Number of bytes that both texts begin with, ending between two characters.
fn shared_prefix(one: &str, two: &str) -> usize {
    one.chars()
        .zip(two.chars())
        .take_while(|(a, b)| a == b)
        .map(|(a, _)| a.len_utf8())
        .sum()
}
