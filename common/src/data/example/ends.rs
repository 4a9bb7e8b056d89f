//! The tokens that end messages, and which of them are learned.
//!
//! Enters: the tokens of a conversation, and where messages end. Leaves: the tokens that end each of them, and labels by the
//! job's rules.

use std::ops::Range;

use super::super::record::Ends;
use super::super::tokenize::Tokenizer;
use super::is_blank;

/// The tokens of a conversation, to look for ends in.
pub struct EndTokens<'a> {
    pub tokenizer: &'a Tokenizer,
    pub text: &'a str,
    pub ids: &'a [u32],
    pub offsets: &'a [Range<usize>],
}

impl EndTokens<'_> {
    /// Marks those of the ends that were found which are learned: each with whether its message is.
    pub fn learn(&self, trained: &mut [bool], found: &[(usize, bool)], ends: Ends, has_last: bool) {
        let is_eos = |token: usize| self.tokenizer.eos_id() == Some(self.ids[token]);
        for (rule, wanted) in [(ends.eos, true), (ends.eot, false)] {
            let of_kind = || found.iter().filter(|(token, _)| is_eos(*token) == wanted);
            let last = of_kind().map(|(token, _)| *token).max();
            for (token, is_learned) in of_kind() {
                trained[*token] = rule.learns(*is_learned, has_last && Some(*token) == last);
            }
        }
    }

    /// The ends of a message that stand before token `end`, the last of them, with the white space between them.
    pub fn before(&self, end: usize) -> Range<usize> {
        let mut first = end - 1;
        loop {
            let previous = (0..first).rev().find(|token| !self.is_blank(*token));
            match previous {
                Some(token) if self.is_end(token) => first = token,
                _ => return first..end,
            }
        }
    }

    /// The token after the last of several ends that follow each other, of which the first ends before token `end`.
    pub fn last(&self, end: usize, limit: usize) -> usize {
        let mut last = end;
        loop {
            let mut after =
                (last..self.ids.len()).take_while(|token| self.offsets[*token].end <= limit);
            let next = after.find(|token| !self.is_blank(*token));
            match next {
                Some(token) if self.is_end(token) => last = token + 1,
                _ => return last,
            }
        }
    }

    fn is_end(&self, token: usize) -> bool {
        self.tokenizer.eos_ids().contains(&self.ids[token])
    }

    fn is_blank(&self, token: usize) -> bool {
        is_blank(self.text, self.offsets[token].clone())
    }
}
