//! What an answer is: a range of a text to learn. `conversation.rs` finds it.

use std::ops::Range;

use super::super::record::Detail;
use super::parts::Parts;

/// A range of bytes to learn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Learned {
    pub span: Range<usize>,
    /// Byte up to which an end token that follows the span belongs to it.
    pub limit: usize,
    /// Whether all that is known of the end is that an end token comes there.
    pub is_open: bool,
    /// What of the span is learned.
    pub what: What,
    /// Whether it is the assistant's, so that an end is put behind it where the text ends without one.
    pub is_answer: bool,
}

/// What of a span is learned, its end token aside.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum What {
    /// All of it, and what the template writes before its end.
    #[default]
    Answer,
    /// What a message says, and nothing that the template writes around it.
    Message,
    /// Some characters of texts in it.
    Parts(Vec<Stretch>),
    /// Nothing but the end behind it, perhaps.
    Nothing,
}

/// A text of a message as it stands in the text of the conversation, and which of its characters are learned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    pub span: Range<usize>,
    /// Number of characters that the template cut off before it.
    pub cut: usize,
    /// Number of characters that the message has there.
    pub length: usize,
    pub details: Vec<Detail>,
}

impl Learned {
    /// An answer that is learned whole.
    pub fn answer(span: Range<usize>, limit: usize) -> Self {
        Self {
            span,
            limit,
            is_open: false,
            what: What::Answer,
            is_answer: true,
        }
    }
}

/// Which text an answer is learned in, and where.
#[derive(Clone, Debug)]
pub enum Answer {
    Whole(Learned),
    /// It is learned in the text of the conversation up to it, from byte `start` on.
    Apart {
        text: String,
        start: usize,
    },
}

/// Byte up to which an end token that follows the answer may be.
pub fn limit(full: &str, parts: &Parts, turn: usize, end: usize) -> usize {
    let next = parts.next_start(turn, full.len());
    next.filter(|next| *next >= end && parts.are_placed)
        .unwrap_or(end)
}
