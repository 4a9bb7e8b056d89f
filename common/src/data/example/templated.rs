//! The tokens of a conversation's text, and which of them are learned.
//!
//! Enters: a text with the bytes that are learned. Leaves: its example, each answer with the token that ends it.

use std::ops::Range;

use super::super::record::Ends;
use super::super::tokenize::Encoded;
use super::answer::{Learned, What};
use super::conversation::Draft;
use super::ends::EndTokens;
use super::{Example, ExampleMaker, is_blank, masked};

impl ExampleMaker<'_> {
    /// The example of a text; `earlier` is another one of the same conversation.
    pub(super) fn templated(
        &self,
        draft: Draft,
        earlier: Option<&Example>,
    ) -> Result<Example, String> {
        let Draft {
            text,
            learned,
            ends,
            has_last,
            is_exact,
        } = draft;
        let earlier = earlier.and_then(Example::as_earlier);
        let encoded = self.tokenizer.encode_after(&text, earlier);
        let Encoded { ids, offsets } = encoded.map_err(|error| error.to_string())?;
        let mut trained = vec![false; ids.len()];
        let end_tokens = EndTokens {
            tokenizer: self.tokenizer,
            text: &text,
            ids: &ids,
            offsets: &offsets,
        };
        let mut found_ends = Vec::new();
        let mut ends_open = false;
        let mut last = ids.len();
        for answer in &learned {
            let placed = self.place(&end_tokens, answer, is_exact)?;
            for stretch in learned_stretches(&end_tokens, answer, &placed) {
                trained[stretch].fill(true);
            }
            let end = match answer.what {
                What::Answer => placed.end,
                _ => placed.end.map(|end| end_tokens.last(end, answer.limit)),
            };
            if let Some(end) = end
                && (ends != Ends::default() || answer.what != What::Answer)
            {
                let tail = end_tokens.before(end);
                trained[tail.clone()].fill(false);
                let of_answer = tail.filter(|token| self.ends_a_turn(ids[*token]));
                let is_learned = answer.what != What::Nothing;
                found_ends.extend(of_answer.map(|token| (token, is_learned)));
            }
            let rest = answer.span.end..text.len();
            ends_open = answer.is_answer
                && ends.eos.learns(true, has_last)
                && !placed.ends
                && !placed.covered.is_empty()
                && (rest.is_empty() || (is_exact && is_blank(&text, rest)));
            last = placed.covered.end;
        }
        end_tokens.learn(&mut trained, &found_ends, ends, has_last);
        let mut example = Example {
            text,
            ids,
            trained,
            offsets,
            templated: true,
            ..Example::default()
        };
        if ends_open && let Some(eos) = self.tokenizer.eos_id() {
            // White space behind the answer, which nobody learns to write, would stand between it and its end.
            example.ids.truncate(last);
            example.trained.truncate(last);
            example.offsets.truncate(last);
            example.push_eos(eos);
        }
        Ok(example.without_first())
    }

    /// Which tokens an answer has.
    fn place(
        &self,
        tokens: &EndTokens,
        answer: &Learned,
        is_exact: bool,
    ) -> Result<Placed, String> {
        let covered = tokens_in(tokens.offsets, &answer.span);
        let end_of_turn = tokens.ids[covered.clone()]
            .iter()
            .rposition(|id| self.ends_a_turn(*id))
            .map(|at| covered.start + at)
            .filter(|at| is_blank(tokens.text, tokens.offsets[*at].end..answer.span.end));
        let end = match end_of_turn {
            Some(at) if answer.span != (0..tokens.text.len()) && !is_exact => Some(at + 1),
            None if !is_exact => self.end_that_follows(tokens, answer)?,
            _ => None,
        };
        Ok(Placed {
            covered,
            end,
            ends: end.is_some() || end_of_turn.is_some(),
        })
    }

    /// The end token after an answer that some templates write only when the next message comes. Returns the token after
    /// it.
    fn end_that_follows(
        &self,
        tokens: &EndTokens,
        answer: &Learned,
    ) -> Result<Option<usize>, String> {
        let EndTokens {
            text, ids, offsets, ..
        } = *tokens;
        let Learned {
            span,
            limit,
            is_open,
            ..
        } = answer;
        let from = offsets.partition_point(|covered| covered.start < span.end);
        let end = (from..ids.len())
            .take_while(|token| offsets[*token].end <= *limit)
            .take_while(|token| *is_open || is_blank(text, span.end..offsets[*token].start))
            .find(|token| self.tokenizer.eos_ids().contains(&ids[*token]))
            .map(|token| token + 1);
        if end.is_none() && *is_open {
            return Err(format!(
                "the chat template does not show where this answer ends: {:?}",
                excerpt(text.get(span.clone()).unwrap_or_default())
            ));
        }
        Ok(end)
    }
}

/// The tokens of an answer.
struct Placed {
    /// Those of its text.
    covered: Range<usize>,
    /// The token behind its end, where that is learned with it.
    end: Option<usize>,
    /// Whether the text ends the answer's turn at all.
    ends: bool,
}

/// The tokens of an answer that are learned.
fn learned_stretches(tokens: &EndTokens, answer: &Learned, placed: &Placed) -> Vec<Range<usize>> {
    let covered = placed.covered.clone();
    match &answer.what {
        What::Answer => {
            let stretch = covered.start..placed.end.unwrap_or(covered.end);
            vec![stretch]
        }
        What::Message => vec![covered],
        What::Parts(parts) => {
            let of_part = |part| masked::learned_tokens(part, tokens.text, tokens.offsets);
            let learned = parts.iter().flat_map(of_part);
            learned.map(|token| token..token + 1).collect()
        }
        What::Nothing => Vec::new(),
    }
}

/// The tokens that cover any byte of the span (several may cover the bytes of one character).
pub fn tokens_in(offsets: &[Range<usize>], span: &Range<usize>) -> Range<usize> {
    let first = offsets.partition_point(|covered| covered.end <= span.start);
    let last = offsets.partition_point(|covered| covered.start < span.end);
    first..last.max(first)
}

/// The beginning of a text, for a message.
fn excerpt(text: &str) -> String {
    const SHOWN: usize = 40;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}
