//! A record becomes examples: tokens, and which of them are learned.
//!
//! Enters: one record. Leaves: usually one example; several where the template shows an answer differently once the
//! conversation goes on (as Qwen3 does, which removes earlier thinking). Which text is learned is found by rendering
//! the conversation up to a turn, never by searching the text for markers.

use std::ops::Range;

use serde_json::{Value as Json, json};

use super::record::Record;
use super::template::{ChatTemplate, Value, message_value, to_value};
use super::tokenize::{Encoded, Tokenizer};

/// One tokenised text with its loss mask. `offsets` are the bytes of `text` that each token covers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Example {
    pub text: String,
    pub ids: Vec<u32>,
    pub trained: Vec<bool>,
    pub offsets: Vec<Range<usize>>,
    /// The end of the text had no end token of its own, and EOS was added to what is learned.
    pub added_eos: bool,
    /// The text comes from a chat template.
    pub templated: bool,
    /// The row's first example.
    pub starts_row: bool,
    /// Which of the job's datasets the row is in, and in which line of its file.
    pub dataset: usize,
    pub line: u64,
}

/// One fault of the model, not one of each row.
pub const NO_TEMPLATE: &str = "the model has no chat template, which rows of messages need: use a chat model, or data with `text` or `prompt` and `completion`";

/// Makes examples of records.
pub struct ExampleMaker<'a> {
    pub tokenizer: &'a Tokenizer,
    pub template: Option<&'a ChatTemplate>,
    pub train_on_inputs: bool,
}

/// A rendered text and the parts of it to learn, in bytes.
#[derive(Debug, PartialEq)]
struct Draft {
    text: String,
    trained: Vec<Range<usize>>,
}

impl ExampleMaker<'_> {
    pub fn examples(&self, record: &Record) -> Result<Vec<Example>, String> {
        let mut examples = self.examples_of(record)?;
        if let Some(first) = examples.first_mut() {
            first.starts_row = true;
        }
        Ok(examples)
    }

    fn examples_of(&self, record: &Record) -> Result<Vec<Example>, String> {
        match record {
            Record::Text(text) => Ok(vec![self.plain(text.clone(), 0)?]),
            Record::Completion { prompt, completion } => {
                let start = if self.train_on_inputs {
                    0
                } else {
                    prompt.len()
                };
                Ok(vec![self.plain(format!("{prompt}{completion}"), start)?])
            }
            Record::Conversation {
                messages,
                trained_from,
                tools,
            } => {
                let template = self.template.ok_or(NO_TEMPLATE)?;
                let conversation = Conversation {
                    template,
                    json: messages,
                    messages: messages.iter().map(message_value).collect(),
                    tools: tools.as_ref().map(to_value),
                };
                let drafts = if self.train_on_inputs {
                    let text = conversation.render(messages.len(), false)?;
                    let all = 0..text.len();
                    vec![Draft {
                        text,
                        trained: vec![all],
                    }]
                } else {
                    conversation.drafts(*trained_from)?
                };
                drafts
                    .into_iter()
                    .map(|draft| self.templated(draft))
                    .collect()
            }
        }
    }

    /// Text without a template: everything from byte `start` on is learned, and EOS after it.
    fn plain(&self, text: String, start: usize) -> Result<Example, String> {
        let Encoded {
            mut ids,
            mut offsets,
        } = self.encode(&text, true)?;
        let mut added_eos = false;
        if let Some(eos) = self.tokenizer.eos_id()
            && ids.last() != Some(&eos)
        {
            ids.push(eos);
            offsets.push(text.len()..text.len());
            added_eos = true;
        }
        // A token that reaches over the start counts as learned; what comes after the text too.
        let first = offsets
            .iter()
            .position(|covered| covered.end > start || covered.start >= text.len())
            .unwrap_or(ids.len());
        let trained = (0..ids.len())
            .map(|token| token >= first.max(1))
            .collect::<Vec<_>>();
        Ok(Example {
            text,
            ids,
            trained,
            offsets,
            added_eos,
            templated: false,
            ..Example::default()
        })
    }

    fn templated(&self, draft: Draft) -> Result<Example, String> {
        let Draft {
            text,
            trained: spans,
        } = draft;
        let Encoded {
            mut ids,
            mut offsets,
        } = self.encode(&text, false)?;
        let mut trained = vec![false; ids.len()];
        let mut ends_open = false;
        for span in spans {
            let covered = tokens_in(&offsets, &span);
            let end_of_turn = ids[covered.clone()]
                .iter()
                .rposition(|id| self.ends_a_turn(*id))
                .map(|at| covered.start + at)
                .filter(|at| text[offsets[*at].end..span.end].trim().is_empty());
            let last = match end_of_turn {
                Some(at) if span != (0..text.len()) => at + 1,
                _ => covered.end,
            };
            trained[covered.start..last].fill(true);
            ends_open = end_of_turn.is_none() && !covered.is_empty() && span.end == text.len();
        }
        let mut added_eos = false;
        if ends_open && let Some(eos) = self.tokenizer.eos_id() {
            ids.push(eos);
            trained.push(true);
            offsets.push(text.len()..text.len());
            added_eos = true;
        }
        if let Some(first) = trained.first_mut() {
            *first = false;
        }
        Ok(Example {
            text,
            ids,
            trained,
            offsets,
            added_eos,
            templated: true,
            ..Example::default()
        })
    }

    fn ends_a_turn(&self, id: u32) -> bool {
        self.tokenizer.special_ids().contains(&id) || self.tokenizer.eos_ids().contains(&id)
    }

    fn encode(&self, text: &str, add_special: bool) -> Result<Encoded, String> {
        self.tokenizer
            .encode(text, add_special)
            .map_err(|error| error.to_string())
    }
}

/// The tokens that cover any byte of the span (several may cover the bytes of one character).
fn tokens_in(offsets: &[Range<usize>], span: &Range<usize>) -> Range<usize> {
    let first = offsets
        .iter()
        .position(|covered| covered.end > span.start)
        .unwrap_or(offsets.len());
    let last = offsets
        .iter()
        .rposition(|covered| covered.start < span.end)
        .map_or(first, |last| last + 1);
    first..last.max(first)
}

/// Stands for an answer while looking for where the template puts it. Private-use characters: no data has them.
const STAND_IN: &str = "\u{F4D1}\u{F4D2}\u{F4D3}";

struct Conversation<'a> {
    template: &'a ChatTemplate,
    json: &'a [Json],
    messages: Vec<Value>,
    tools: Option<Value>,
}

impl Conversation<'_> {
    /// The first `count` messages.
    fn render(&self, count: usize, add_generation_prompt: bool) -> Result<String, String> {
        self.template
            .render_values(
                &self.messages[..count],
                self.tools.clone(),
                add_generation_prompt,
            )
            .map_err(|error| error.to_string())
    }

    /// The first `count` messages with the content of `turn` replaced: what comes before and after it. None where the
    /// template does not show the content exactly once.
    fn render_around(&self, count: usize, turn: usize) -> Option<(String, String)> {
        let mut stand_in = self.json[turn].clone();
        if let Json::Object(fields) = &mut stand_in {
            for name in ["reasoning_content", "thinking", "reasoning"] {
                fields.remove(name);
            }
            fields.insert("content".to_owned(), json!(STAND_IN));
        }
        let text = self.render_with(count, turn, &stand_in)?;
        let (before, after) = text.split_once(STAND_IN)?;
        (!after.contains(STAND_IN)).then(|| (before.to_owned(), after.to_owned()))
    }

    /// The first `count` messages with another one in place of `turn`.
    fn render_with(&self, count: usize, turn: usize, message: &Json) -> Option<String> {
        let mut messages = self.messages[..count].to_vec();
        messages[turn] = message_value(message);
        self.template
            .render_values(&messages, self.tools.clone(), false)
            .ok()
    }

    /// The whole conversation with its learned parts; and for each turn that it does not show as the model would
    /// write it, the conversation up to that turn.
    fn drafts(&self, trained_from: usize) -> Result<Vec<Draft>, String> {
        let count = self.json.len();
        let full = self.render(count, false)?;
        let mut whole = Draft {
            text: String::new(),
            trained: Vec::new(),
        };
        let mut separate = Vec::new();
        for turn in trained_from..count {
            if self.json[turn]["role"] != "assistant" {
                continue;
            }
            let prompt = self.render(turn, true).ok();
            let own = if turn + 1 == count {
                full.clone()
            } else {
                self.render(turn + 1, false)?
            };
            let start = self.start_in_own(&own, prompt.as_deref(), turn)?;
            if let Some(span) = self.span_in_full(&full, &own, start, turn) {
                whole.trained.push(span);
                continue;
            }
            let span = start..own.len();
            separate.push(Draft {
                text: own,
                trained: vec![span],
            });
        }
        if !whole.trained.is_empty() {
            whole.text = full;
            separate.push(whole);
        }
        Ok(separate)
    }

    /// Where the whole conversation shows the turn, if it shows it as it was when the turn was the last.
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
        let (full_before, full_after) = self.render_around(self.json.len(), turn)?;
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

    /// Where the turn begins in the conversation that ends with it.
    fn start_in_own(&self, own: &str, prompt: Option<&str>, turn: usize) -> Result<usize, String> {
        if let Some(prompt) = prompt.filter(|prompt| own.starts_with(prompt)) {
            return Ok(prompt.len());
        }
        // What the template puts before an answer is not what it prompts with (DeepSeek-R1 prompts with <think>).
        let before = self.before_turn(own, turn).ok_or_else(|| {
            format!(
                "the chat template does not show where the answer in message {} begins",
                turn + 1
            )
        })?;
        let context = self.render(turn, false).unwrap_or_default();
        let shared = prompt.map_or(0, |prompt| shared_prefix(prompt, &before));
        Ok(if shared >= context.len() && shared > 0 {
            shared
        } else {
            before.len()
        })
    }

    /// What `own`, which ends with the turn, has before the turn's content.
    fn before_turn(&self, own: &str, turn: usize) -> Option<String> {
        if let Some((before, _)) = self.render_around(turn + 1, turn)
            && own.starts_with(&before)
        {
            return Some(before);
        }
        // Some templates show no content beside tool calls: up to where an answer without calls would differ, then.
        let answer = json!({"role": "assistant", "content": STAND_IN});
        let other = self.render_with(turn + 1, turn, &answer)?;
        let shared = shared_prefix(own, &other);
        (other.contains(STAND_IN) && shared > 0).then(|| own[..shared].to_owned())
    }
}

/// Bytes that both texts begin with, ending between two characters.
fn shared_prefix(one: &str, two: &str) -> usize {
    one.chars()
        .zip(two.chars())
        .take_while(|(a, b)| a == b)
        .map(|(a, _)| a.len_utf8())
        .sum()
}
