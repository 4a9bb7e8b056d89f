//! Byte-level tokenizers word by word: most words of a text were seen before, and their tokens are remembered.
//!
//! Enters: a tokenizer of the library, and text. Leaves: the same tokens and offsets as the library's own `encode`, many times
//! sooner, because nothing keeps account of how normalisers and pre-tokenizers move characters. Never guesses: a tokenizer with
//! any part that is not known here, and a text that would be normalised, are left to the library.

mod added;
mod cache;
mod shared;
mod split;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use tokenizers::{Model, ModelWrapper, NormalizerWrapper, Tokenizer};
use unicode_normalization_alignments::{IsNormalized, is_nfc_quick};

use super::{Earlier, Encoded};
use added::{AddedTokens, Part};
use cache::{Tokens, Words};
use shared::SharedWords;
use split::{Caches, Splitter};

/// A text with most of what the known pre-tokenizers and models could treat differently.
const PROBE: &str = "The river's  1234 bends,\r\n\n\t don't YOU'LL x=y+2;  \u{e9}\u{1f980}\u{65e5}\u{672c}\u{8a9e} 12.5% \u{a0}a\u{3000} _b_  \n ";

/// What of a tokenizer decides its tokens, made ready for going through texts quickly.
#[derive(Debug)]
pub(super) struct WordEncoder {
    /// Which encoder's words a thread remembers.
    number: u64,
    added: AddedTokens,
    is_normalised: bool,
    splitter: Splitter,
    shared: SharedWords,
}

impl WordEncoder {
    /// None where the tokenizer has a part that is not known here.
    pub fn of(tokenizer: &Tokenizer) -> Option<Self> {
        static ENCODERS: AtomicU64 = AtomicU64::new(0);
        let is_normalised = match tokenizer.get_normalizer() {
            None => false,
            Some(NormalizerWrapper::NFC(_)) => true,
            Some(_) => return None,
        };
        let ModelWrapper::BPE(model) = tokenizer.get_model() else {
            return None;
        };
        let is_affix = |affix: &Option<String>| affix.as_ref().is_some_and(|text| !text.is_empty());
        if model.dropout.is_some()
            || is_affix(&model.continuing_subword_prefix)
            || is_affix(&model.end_of_word_suffix)
        {
            return None;
        }
        let encoder = Self {
            number: ENCODERS.fetch_add(1, Ordering::Relaxed),
            added: AddedTokens::of(tokenizer)?,
            is_normalised,
            splitter: Splitter::of(tokenizer.get_pre_tokenizer()?)?,
            shared: SharedWords::default(),
        };
        encoder.agrees_on(tokenizer, PROBE).then_some(encoder)
    }

    /// The tokens of a text, and for each its bytes (where several share a character, all of that). None where only the library
    /// can tell them.
    ///
    /// Tokens of `earlier` are taken over as far as both texts are the same, up to the last added token there.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
        earlier: Option<Earlier>,
    ) -> Result<Option<Encoded>, String> {
        if self.is_normalised && !is_nfc(text) {
            return Ok(None);
        }
        let mut encoded = Encoded::default();
        // A token takes four bytes of English, and between two and three of programs.
        encoded.ids.reserve(text.len() / 2);
        encoded.offsets.reserve(text.len() / 2);
        let parts = self.added.divide(text);
        let known = earlier.map_or(0, |earlier| {
            let known = self.known_parts(text, &parts, &earlier, &mut encoded);
            known.unwrap_or(0)
        });
        let new_caches = || self.splitter.new_caches();
        let is_whole = cache::with_words_of(self.number, new_caches, |words, caches| {
            for (range, added) in parts.into_iter().skip(known) {
                if let Some(id) = added {
                    encoded.ids.push(id);
                    encoded.offsets.push(range);
                } else if !self.encode_part(
                    tokenizer,
                    (text, range),
                    (words, caches),
                    &mut encoded,
                )? {
                    return Ok(false);
                }
            }
            Ok::<bool, String>(true)
        })?;
        Ok(is_whole.then_some(encoded))
    }

    /// Adds the tokens of the parts with which both texts begin, and tells how many parts these are: each is tokenised for
    /// itself, whatever comes after it.
    fn known_parts(
        &self,
        text: &str,
        parts: &[Part],
        earlier: &Earlier,
        encoded: &mut Encoded,
    ) -> Option<usize> {
        let shared = shared_bytes(text, earlier.text);
        let may_share = parts.first().is_some_and(|(range, _)| range.end <= shared);
        if !may_share || (self.is_normalised && !is_nfc(earlier.text)) {
            return None;
        }
        let theirs = self.added.divide(earlier.text);
        let known = parts.iter().zip(&theirs);
        let known = known
            .take_while(|(ours, theirs)| ours == theirs && ours.0.end <= shared)
            .count();
        let end = parts[..known].last()?.0.end;
        let tokens = earlier
            .offsets
            .partition_point(|covered| covered.end <= end);
        // Tokens may have been taken off its end.
        if earlier.offsets[..tokens].last()?.end != end {
            return None;
        }
        encoded.ids.extend_from_slice(earlier.ids.get(..tokens)?);
        encoded
            .offsets
            .extend_from_slice(&earlier.offsets[..tokens]);
        Some(known)
    }

    /// Adds the tokens of a part without added tokens. False where they do not cover it.
    fn encode_part(
        &self,
        tokenizer: &Tokenizer,
        (text, part): (&str, Range<usize>),
        (words, caches): (&mut Words, &mut Caches),
        encoded: &mut Encoded,
    ) -> Result<bool, String> {
        let (mut is_whole, mut failed) = (true, None);
        self.splitter.split(text, part, caches, &mut |range| {
            if !is_whole || failed.is_some() {
                return;
            }
            let word = &text[range.clone()];
            let tokens = words.get(word, || {
                self.shared.get(word, || tokens_of(tokenizer, word))
            });
            match tokens {
                Ok(Some(tokens)) => add(tokens, text, range.start, encoded),
                Ok(None) => is_whole = false,
                Err(reason) => failed = Some(reason),
            }
        });
        failed.map_or(Ok(is_whole), Err)
    }

    fn agrees_on(&self, tokenizer: &Tokenizer, text: &str) -> bool {
        let Ok(theirs) = tokenizer.encode(text, false) else {
            return false;
        };
        let Ok(Some(ours)) = self.encode(tokenizer, text, None) else {
            return false;
        };
        let offsets = theirs.get_offsets().iter().map(|(start, end)| *start..*end);
        ours.ids == theirs.get_ids() && ours.offsets.iter().cloned().eq(offsets)
    }
}

/// Adds a word's tokens, which begin at this byte of the text.
fn add(tokens: Tokens, text: &str, start: usize, encoded: &mut Encoded) {
    let mut at = start;
    for (id, bytes) in tokens.iter() {
        let end = at + bytes as usize;
        let (mut from, mut to) = (at, end);
        while !text.is_char_boundary(from) {
            from -= 1;
        }
        while !text.is_char_boundary(to) {
            to += 1;
        }
        encoded.ids.push(id);
        encoded.offsets.push(from..to);
        at = end;
    }
}

/// The tokens of a word and how many bytes each has, from the model. None where they are not all of the word.
fn tokens_of(tokenizer: &Tokenizer, word: &str) -> Result<Option<Vec<(u32, u32)>>, String> {
    let written: String = word.bytes().map(split::character_of).collect();
    let tokens = tokenizer.get_model().tokenize(&written);
    let tokens = tokens.map_err(|error| error.to_string())?;
    let mut bytes = 0;
    let tokens = tokens.into_iter().map(|token| {
        let length = token.value.chars().count();
        bytes += length;
        (token.id, u32::try_from(length).unwrap_or(u32::MAX))
    });
    let tokens: Vec<(u32, u32)> = tokens.collect();
    Ok((bytes == word.len()).then_some(tokens))
}

/// Number of bytes with which both texts begin.
fn shared_bytes(one: &str, two: &str) -> usize {
    const AT_ONCE: usize = 64;
    let (one, two) = (one.as_bytes(), two.as_bytes());
    let chunks = one.chunks_exact(AT_ONCE).zip(two.chunks_exact(AT_ONCE));
    let same = AT_ONCE * chunks.take_while(|(one, two)| one == two).count();
    let rest = one[same..].iter().zip(&two[same..]);
    same + rest.take_while(|(one, two)| one == two).count()
}

/// Whether it is certain that normalising leaves the text as it is.
fn is_nfc(text: &str) -> bool {
    text.is_ascii() || is_nfc_quick(text.chars()) == IsNormalized::Yes
}

#[cfg(test)]
mod tests;
