//! What of single messages is learned: those of other roles than the assistant, and those of which only some characters are.
//!
//! Enters: a conversation and what its text shows of it. Leaves: the bytes of each message that is learned, and of those whose
//! end is. Where a message begins and ends is known from rendering, never from searching the text; what is not known is
//! refused.

use std::ops::Range;

use super::super::notes::Note;
use super::super::record::{Chat, Detail, PartialMask};
use super::answer::{Answer, Learned, Stretch, What, limit};
use super::conversation::{Conversation, Draft};
use super::parts::{Part, PartKind, Parts};
use super::templated::tokens_in;
use crate::job::EndOfTurn;

/// Whether a conversation asks for more than that the assistant's messages are learned, or not.
pub fn is_special(chat: &Chat) -> bool {
    let is_usual = |end: EndOfTurn| end == EndOfTurn::Turn;
    let mut messages = chat.messages.iter().zip(&chat.learned);
    !chat.partial.is_empty()
        || !is_usual(chat.ends.eos)
        || !is_usual(chat.ends.eot)
        || messages.any(|(message, learned)| *learned && message["role"] != "assistant")
}

/// The messages to learn as texts with the bytes that are learned, where more is asked for than whole answers with their ends.
/// A template's own marks, which know of nothing else, are put aside.
pub fn drafts(
    conversation: &Conversation,
    chat: &Chat,
    text: String,
    parts: &Parts,
    answers: impl Iterator<Item = (usize, Answer)>,
    messages: &[usize],
    notes: &mut Vec<Note>,
) -> Result<Vec<Draft>, String> {
    if conversation.has_generation_marks() {
        notes.push(Note::MarksPutAside);
    }
    let mut apart = Vec::new();
    let mut whole = Vec::new();
    let shown = Shown {
        conversation,
        count: chat.messages.len(),
        text: &text,
        parts,
    };
    for turn in messages {
        whole.push((*turn, shown.message(*turn)?));
    }
    for (turn, answer) in answers {
        match answer {
            Answer::Whole(learned) => whole.push((turn, learned)),
            Answer::Apart { text, start } => {
                let mut learned = Learned::answer(start..text.len(), text.len());
                if let Some(mask) = chat.partial.get(&turn) {
                    let shown = Shown {
                        conversation,
                        count: turn + 1,
                        text: &text,
                        parts: &conversation.parts_up_to(turn + 1, &text),
                    };
                    learned.what = What::Parts(shown.stretches(mask, turn)?);
                }
                apart.push((turn, text, learned));
            }
        }
    }
    for (turn, learned) in &mut whole {
        if let Some(mask) = chat.partial.get(turn) {
            learned.what = What::Parts(shown.stretches(mask, *turn)?);
        }
    }
    whole.extend(shown.ends_of_others(chat)?);
    whole.sort_by_key(|(turn, _)| *turn);
    let turns = whole.iter().map(|(turn, _)| *turn);
    let last = turns.chain(apart.iter().map(|(turn, ..)| *turn)).max();
    let mut drafts: Vec<Draft> = Vec::new();
    for (turn, text, learned) in apart {
        drafts.push(Draft {
            text,
            learned: vec![learned],
            ends: chat.ends,
            has_last: Some(turn) == last,
            is_exact: false,
        });
    }
    if !whole.is_empty() || drafts.is_empty() {
        let has_last = whole.iter().any(|(turn, _)| Some(*turn) == last);
        drafts.push(Draft {
            text,
            learned: whole.into_iter().map(|(_, learned)| learned).collect(),
            ends: chat.ends,
            has_last,
            is_exact: false,
        });
    }
    Ok(drafts)
}

/// The first `count` messages of a conversation as their text shows them.
struct Shown<'a> {
    conversation: &'a Conversation<'a>,
    count: usize,
    text: &'a str,
    parts: &'a Parts,
}

impl Shown<'_> {
    /// A message that is learned by what it says, with nothing of the template's but its end.
    fn message(&self, turn: usize) -> Result<Learned, String> {
        let bounds = self.parts.bounds(turn).filter(|_| self.parts.are_placed);
        let mut bounds = bounds.ok_or_else(|| {
            format!(
                "the chat template does not show where message {} begins and ends, so that it cannot be told apart from the template's own text",
                turn + 1
            )
        })?;
        for part in self.parts.of(turn).filter(|part| part.is_shown) {
            if let Some(own) = self.span(part, turn) {
                bounds = bounds.start.min(own.start)..bounds.end.max(own.end);
            }
        }
        Ok(Learned {
            what: What::Message,
            is_answer: false,
            limit: limit(self.text, self.parts, turn, bounds.end),
            ..Learned::answer(bounds, 0)
        })
    }

    /// The other messages of a conversation, of which the ends are learned.
    fn ends_of_others(&self, chat: &Chat) -> Result<Vec<(usize, Learned)>, String> {
        if ![chat.ends.eos, chat.ends.eot].contains(&EndOfTurn::All) {
            return Ok(Vec::new());
        }
        let others = (0..self.count).filter(|turn| !chat.learned[*turn]);
        // A message that is not shown has no end.
        let others = others.filter(|turn| self.parts.of(*turn).any(|part| part.is_shown));
        let ends = others.map(|turn| {
            let learned = Learned {
                what: What::Nothing,
                ..self.message(turn)?
            };
            Ok((turn, learned))
        });
        ends.collect()
    }

    /// The characters of a message that are learned.
    fn stretches(&self, mask: &PartialMask, turn: usize) -> Result<Vec<Stretch>, String> {
        let of = [
            (PartKind::Content, &mask.content),
            (PartKind::Reasoning, &mask.reasoning),
        ];
        let learned = |details: &[Detail]| details.iter().any(|detail| detail.train);
        let of = of.into_iter().filter(|(_, details)| learned(details));
        let stretches = of.map(|(kind, details)| {
            self.stretch(kind, details, turn).ok_or_else(|| {
                format!(
                    "the chat template does not show the text of message {} as it is, so that no part of it can be learned by itself",
                    turn + 1
                )
            })
        });
        stretches.collect()
    }

    fn stretch(&self, kind: PartKind, details: &[Detail], turn: usize) -> Option<Stretch> {
        let mut own = self.parts.of(turn).filter(|part| part.kind == kind);
        let (Some(part), None) = (own.next(), own.next()) else {
            return None;
        };
        let span = self.span(part, turn)?;
        let shown = self.text.get(span.clone())?;
        // White space at its ends may be cut off, and nothing else.
        let at = part.text.find(shown)?;
        let rest = [&part.text[..at], &part.text[at + shown.len()..]];
        let is_whole = !shown.is_empty() && rest.iter().all(|rest| rest.trim().is_empty());
        is_whole.then(|| Stretch {
            span,
            cut: part.text[..at].chars().count(),
            length: part.text.chars().count(),
            details: details.to_vec(),
        })
    }

    /// The bytes of a part, with the white space at its ends where the template shows that.
    fn span(&self, part: &Part, turn: usize) -> Option<Range<usize>> {
        let (mut start, mut end) = (part.start?, part.end?);
        if !self.parts.are_trimmed || part.kind != PartKind::Content {
            return Some(start..end);
        }
        let text = part.text.as_str();
        let (without_lead, without_trail) = (text.trim_start(), text.trim_end());
        let shows = |content: &str| {
            content != text
                && self
                    .conversation
                    .changes_with(self.count, turn, content, self.text)
        };
        if shows(without_lead) {
            start = start.checked_sub(text.len() - without_lead.len())?;
        }
        if shows(without_trail) {
            end += text.len() - without_trail.len();
        }
        Some(start..end)
    }
}

/// The tokens of a stretch that are learned; `offsets` are the bytes of all tokens of the text.
///
/// A range takes in a token that it has whole, or more than one character of (Axolotl's rule); one that is learned goes before
/// one that is not. Tokens of the same character are learned together.
pub fn learned_tokens(stretch: &Stretch, text: &str, offsets: &[Range<usize>]) -> Vec<usize> {
    let tokens = tokens_in(offsets, &stretch.span);
    let Stretch {
        span, cut, length, ..
    } = stretch;
    let starts: Vec<usize> = offsets[tokens.clone()]
        .iter()
        .map(|covered| {
            let before = text.get(span.start..covered.start.max(span.start));
            cut + before.map_or(0, |before| before.chars().count())
        })
        .collect();
    // The last character of each token.
    let mut ends = vec![length.saturating_sub(1); starts.len()];
    for index in (0..starts.len().saturating_sub(1)).rev() {
        ends[index] = match starts[index + 1] > starts[index] {
            true => starts[index + 1] - 1,
            false => ends[index + 1],
        };
    }
    let mut learned = vec![false; starts.len()];
    for detail in stretch.details.iter().filter(|detail| detail.train) {
        for (index, is_learned) in learned.iter_mut().enumerate() {
            *is_learned |= takes_in(detail, starts[index], ends[index]);
        }
    }
    let learned = learned.into_iter().zip(tokens);
    learned
        .filter(|(is_learned, _)| *is_learned)
        .map(|(_, token)| token)
        .collect()
}

/// Whether a range takes in the token of these characters.
fn takes_in(detail: &Detail, first: usize, last: usize) -> bool {
    let begins_inside = first >= detail.begin || last > detail.begin;
    let ends_inside = last <= detail.end || first < detail.end;
    begins_inside && ends_inside
}
