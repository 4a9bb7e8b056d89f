//! What an answer is: a range of a text to learn. `conversation.rs` finds it.

use std::ops::Range;

use super::parts::Parts;

/// A range of bytes to learn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Learned {
    pub span: Range<usize>,
    /// Byte up to which an end token that follows the span belongs to it.
    pub limit: usize,
    /// Whether all that is known of the end is that an end token comes there.
    pub is_open: bool,
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
