//! The words that a thread has seen, with their tokens.
//!
//! Enters: words. Leaves: their tokens, computed once. Bounded: a full one begins anew.

use std::any::Any;
use std::cell::RefCell;
use std::collections::HashMap;

use foldhash::fast::RandomState;

/// Most words that are remembered. Those of a few megabytes of text, at most some 20 MB a thread.
const MAX_WORDS: usize = 1 << 17;

/// Longest word that is remembered, in bytes.
pub(super) const MAX_WORD_BYTES: usize = 96;

/// Words that are looked for first, by a place that each has: those that come again and again, which the nearest memory of a
/// processor holds. A power of two.
const NEAR_WORDS: usize = 1 << 14;

/// Stands for the end of a word's tokens where it has only one, whose id then stands for their start.
const ONE: u32 = u32::MAX;

/// Words of one tokenizer.
pub(super) struct Words {
    /// Short words that were looked for last, each at its place, with what `short` has of it; no word is 0.
    near: Vec<(u128, (u32, u32))>,
    /// Where the tokens of a word are: of a short one by its bytes, which stand in the map itself.
    short: HashMap<u128, (u32, u32), RandomState>,
    long: HashMap<Box<str>, (u32, u32), RandomState>,
    /// The tokens of all words with their bytes.
    tokens: Vec<(u32, u32)>,
    /// The tokens of a word that is not remembered.
    last: Vec<(u32, u32)>,
    /// The token of a word that has only one.
    one: [(u32, u32); 1],
}

impl Default for Words {
    fn default() -> Self {
        Self {
            near: vec![(0, (0, 0)); NEAR_WORDS],
            short: HashMap::default(),
            long: HashMap::default(),
            tokens: Vec::new(),
            last: Vec::new(),
            one: [(0, 0)],
        }
    }
}

/// The tokens of a word: ids, and how many bytes each has.
pub(super) struct Tokens<'a>(&'a [(u32, u32)]);

impl Tokens<'_> {
    pub fn iter(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.0.iter().copied()
    }
}

impl Words {
    /// The tokens of a word; `make` finds them where it was not seen. None where `make` has none.
    pub fn get<E>(
        &mut self,
        word: &str,
        make: impl FnOnce() -> Result<Option<Vec<(u32, u32)>>, E>,
    ) -> Result<Option<Tokens<'_>>, E> {
        let packed = packed(word);
        let known = match packed {
            Some(packed) => self.short_word(packed),
            None => self.long.get(word).copied(),
        };
        if let Some(place) = known {
            return Ok(Some(self.tokens_at(place, word)));
        }
        let Some(made) = make()? else {
            return Ok(None);
        };
        if word.len() > MAX_WORD_BYTES {
            self.last = made;
            return Ok(Some(Tokens(&self.last)));
        }
        if self.short.len() + self.long.len() >= MAX_WORDS {
            self.near.fill((0, (0, 0)));
            self.short.clear();
            self.long.clear();
            self.tokens.clear();
        }
        let place = match made[..] {
            [(id, bytes)] if bytes as usize == word.len() => (id, ONE),
            _ => {
                let start = self.tokens.len() as u32;
                self.tokens.extend(made);
                (start, self.tokens.len() as u32)
            }
        };
        match packed {
            Some(packed) => self.short.insert(packed, place),
            None => self.long.insert(word.into(), place),
        };
        Ok(Some(self.tokens_at(place, word)))
    }

    /// Where the tokens of a short word are.
    #[inline]
    fn short_word(&mut self, packed: u128) -> Option<(u32, u32)> {
        let near = &mut self.near[near_place(packed)];
        if near.0 == packed {
            return Some(near.1);
        }
        let place = *self.short.get(&packed)?;
        *near = (packed, place);
        Some(place)
    }

    #[inline]
    fn tokens_at(&mut self, (start, end): (u32, u32), word: &str) -> Tokens<'_> {
        if end == ONE {
            self.one = [(start, word.len() as u32)];
            return Tokens(&self.one);
        }
        Tokens(&self.tokens[start as usize..end as usize])
    }
}

/// Where a short word is among those that are looked for first.
#[inline]
fn near_place(packed: u128) -> usize {
    const BITS: u32 = NEAR_WORDS.trailing_zeros();
    // Odd numbers without a pattern in their bits: those of the golden ratio and of the square root of 3.
    let low = (packed as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let high = ((packed >> 64) as u64).wrapping_mul(0xbb67_ae85_84ca_a73b);
    ((low ^ high.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - BITS)) as usize
}

/// The bytes of a short word, and how many they are, in one number. Not 0 for any word. None for longer words.
#[inline]
fn packed(word: &str) -> Option<u128> {
    let bytes = word.as_bytes();
    let length = bytes.len();
    let eight = |at: usize| {
        let eight = bytes
            .get(at..at + 8)
            .and_then(|eight| eight.try_into().ok());
        eight.map_or(0, u64::from_le_bytes)
    };
    let four = |at: usize| {
        let four = bytes.get(at..at + 4).and_then(|four| four.try_into().ok());
        u64::from(four.map_or(0, u32::from_le_bytes))
    };
    // Two reads that overlap, less what both have, are cheaper than a copy of unknown length.
    let (low, high) = match length {
        0 => (0, 0),
        1..=3 => {
            let [first, middle, last] = [0, length / 2, length - 1].map(|at| u64::from(bytes[at]));
            (first | middle << 8 | last << 16, 0)
        }
        4..=7 => (four(0) | four(length - 4) >> (8 * (8 - length)) << 32, 0),
        8 => (eight(0), 0),
        9..=15 => (eight(0), eight(length - 8) >> (8 * (16 - length))),
        _ => return None,
    };
    let high = high | (length as u64 + 1) << 56;
    Some(u128::from(low) | u128::from(high) << 64)
}

/// An encoder's number, its words, and what else a thread holds for it.
type Remembered = (u64, Words, Box<dyn Any>);

/// Calls `work` with the words that this thread remembers of an encoder, and with something that `new` makes once for both.
pub(super) fn with_words_of<C: 'static, T>(
    encoder: u64,
    new: impl Fn() -> C,
    work: impl FnOnce(&mut Words, &mut C) -> T,
) -> T {
    thread_local! {
        static WORDS: RefCell<Option<Remembered>> = const { RefCell::new(None) };
    }
    WORDS.with(|held| {
        let mut held = held.try_borrow_mut().ok();
        let remembered = held.as_mut().and_then(|held| {
            if held.as_ref().is_none_or(|(owner, ..)| *owner != encoder) {
                **held = Some((encoder, Words::default(), Box::new(new())));
            }
            let (_, words, other) = held.as_mut()?;
            Some((words, other.downcast_mut::<C>()?))
        });
        match remembered {
            Some((words, other)) => work(words, other),
            None => work(&mut Words::default(), &mut new()),
        }
    })
}
