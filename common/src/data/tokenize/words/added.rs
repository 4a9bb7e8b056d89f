//! Finds a tokenizer's added tokens in a text.
//!
//! Enters: the tokens that stand for themselves wherever they appear. Leaves: a text in parts, some of which are one of them.
//! As the library does: first those that are looked for in the text as it is, then, between them, the others.

use std::ops::Range;

use aho_corasick::{AhoCorasick, MatchKind};
use tokenizers::{AddedToken, Tokenizer};

/// A part of a text, and which added token it is, if it is one.
pub(super) type Part = (Range<usize>, Option<u32>);

/// The added tokens, ready to be found.
#[derive(Debug)]
pub(super) struct AddedTokens {
    /// Those that are found before normalising, and those after.
    kinds: [Option<Finder>; 2],
}

#[derive(Debug)]
struct Finder {
    automaton: AhoCorasick,
    ids: Vec<u32>,
}

impl AddedTokens {
    /// None where one of them takes white space along or has to be a word of its own.
    pub fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let added = tokenizer.get_added_tokens_decoder();
        let is_plain = |token: &AddedToken| {
            !token.lstrip && !token.rstrip && !token.single_word && !token.content.is_empty()
        };
        let is_known = added.values().all(is_plain);
        if !is_known || tokenizer.get_encode_special_tokens() {
            return None;
        }
        let finder = |normalized: bool| {
            let of_kind = added
                .iter()
                .filter(|(_, token)| token.normalized == normalized);
            let (ids, texts): (Vec<u32>, Vec<&str>) = of_kind
                .map(|(id, token)| (*id, token.content.as_str()))
                .unzip();
            let is_alike = !normalized || texts.iter().all(|text| text.is_ascii());
            let automaton = AhoCorasick::builder()
                .match_kind(MatchKind::LeftmostLongest)
                .build(&texts)
                .ok()?;
            is_alike.then_some(Finder { automaton, ids })
        };
        Some(Self {
            kinds: [Some(finder(false)?), Some(finder(true)?)]
                .map(|finder| finder.filter(|finder| !finder.ids.is_empty())),
        })
    }

    /// The text in parts, and which of them are an added token.
    pub fn divide(&self, text: &str) -> Vec<Part> {
        let mut parts = vec![(0..text.len(), None)];
        for finder in self.kinds.iter().flatten() {
            parts = finder.divide(text, parts);
        }
        parts
    }
}

impl Finder {
    fn divide(&self, text: &str, parts: Vec<Part>) -> Vec<Part> {
        let mut divided = Vec::with_capacity(parts.len());
        for (part, added) in parts {
            if added.is_some() {
                divided.push((part, added));
                continue;
            }
            let mut at = part.start;
            for found in self.automaton.find_iter(&text[part.clone()]) {
                let found_at = part.start + found.start()..part.start + found.end();
                if at < found_at.start {
                    divided.push((at..found_at.start, None));
                }
                at = found_at.end;
                divided.push((found_at, Some(self.ids[found.pattern().as_usize()])));
            }
            if at < part.end {
                divided.push((at..part.end, None));
            }
        }
        divided
    }
}
