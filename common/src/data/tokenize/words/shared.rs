//! The words that any thread has seen, with their tokens: a thread asks here for what it does not remember itself.
//!
//! Enters: words. Leaves: their tokens, computed once for all threads. Bounded, however many threads there are: what is full
//! begins anew.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::sync::{Mutex, PoisonError};

use foldhash::fast::RandomState;

use super::cache::MAX_WORD_BYTES;

/// Parts of the words, each behind a lock of its own. A power of two.
const PARTS: usize = 64;

/// Most words of a part: those of some hundred megabytes of text in all parts together, in at most some 80 MB.
const MAX_WORDS: usize = 1 << 13;

/// The tokens of words: ids, and how many bytes each has.
type Part = HashMap<Box<str>, Box<[(u32, u32)]>, RandomState>;

/// Words of one tokenizer.
#[derive(Debug)]
pub(super) struct SharedWords {
    hasher: RandomState,
    parts: Vec<Mutex<Part>>,
}

impl Default for SharedWords {
    fn default() -> Self {
        Self {
            hasher: RandomState::default(),
            parts: (0..PARTS).map(|_| Mutex::default()).collect(),
        }
    }
}

impl SharedWords {
    /// The tokens of a word; `make` finds them where nobody has seen it. None where `make` has none.
    pub fn get<E>(
        &self,
        word: &str,
        make: impl FnOnce() -> Result<Option<Vec<(u32, u32)>>, E>,
    ) -> Result<Option<Vec<(u32, u32)>>, E> {
        if word.len() > MAX_WORD_BYTES {
            return make();
        }
        let part = &self.parts[self.hasher.hash_one(word) as usize % PARTS];
        // Nothing is left half done in a part, whatever happens to the thread that has it.
        let part = || part.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tokens) = part().get(word) {
            return Ok(Some(tokens.to_vec()));
        }
        // Two threads may find the same.
        let Some(tokens) = make()? else {
            return Ok(None);
        };
        let mut part = part();
        if part.len() >= MAX_WORDS {
            part.clear();
        }
        part.insert(word.into(), tokens.as_slice().into());
        Ok(Some(tokens))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_made_once_until_its_part_is_full() {
        let words = SharedWords::default();
        let get = |word: &str, tokens: Option<u32>| {
            let made = || Ok::<_, ()>(tokens.map(|id| vec![(id, word.len() as u32)]));
            words.get(word, made)
        };
        assert_eq!(get("river", None), Ok(None));
        assert_eq!(get("river", Some(1)), Ok(Some(vec![(1, 5)])));
        assert_eq!(get("river", Some(2)), Ok(Some(vec![(1, 5)])));
        let long = "x".repeat(MAX_WORD_BYTES + 1);
        assert_eq!(
            get(&long, Some(3)).map(|made| made.map(|made| made[0].0)),
            Ok(Some(3))
        );
        assert_eq!(
            get(&long, Some(4)).map(|made| made.map(|made| made[0].0)),
            Ok(Some(4))
        );
        for number in 0..2 * PARTS * MAX_WORDS {
            assert!(get(&number.to_string(), Some(0)).is_ok());
        }
        let held = words
            .parts
            .iter()
            .map(|part| part.lock().map_or(0, |part| part.len()));
        assert!(held.sum::<usize>() <= PARTS * MAX_WORDS);
    }
}
