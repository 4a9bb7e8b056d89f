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
const MAX_WORD_BYTES: usize = 96;

/// Words of one tokenizer.
#[derive(Default)]
pub(super) struct Words {
    /// Where the tokens of a word are: of a short one by its bytes, which stand in the map itself.
    short: HashMap<u128, (u32, u32), RandomState>,
    long: HashMap<Box<str>, (u32, u32), RandomState>,
    /// The tokens of all words with their bytes.
    tokens: Vec<(u32, u32)>,
    /// The tokens of a word that is not remembered.
    last: Vec<(u32, u32)>,
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
            Some(packed) => self.short.get(&packed),
            None => self.long.get(word),
        };
        if let Some((start, end)) = known {
            return Ok(Some(Tokens(&self.tokens[*start as usize..*end as usize])));
        }
        let Some(made) = make()? else {
            return Ok(None);
        };
        if word.len() > MAX_WORD_BYTES {
            self.last = made;
            return Ok(Some(Tokens(&self.last)));
        }
        if self.short.len() + self.long.len() >= MAX_WORDS {
            self.short.clear();
            self.long.clear();
            self.tokens.clear();
        }
        let start = self.tokens.len();
        self.tokens.extend(made);
        let place = (start as u32, self.tokens.len() as u32);
        match packed {
            Some(packed) => self.short.insert(packed, place),
            None => self.long.insert(word.into(), place),
        };
        Ok(Some(Tokens(&self.tokens[start..])))
    }
}

/// The bytes of a short word and how many they are, in one number.
fn packed(word: &str) -> Option<u128> {
    let mut bytes = [0; size_of::<u128>()];
    let (length, room) = bytes.split_first_mut()?;
    room.get_mut(..word.len())?.copy_from_slice(word.as_bytes());
    *length = word.len() as u8;
    Some(u128::from_le_bytes(bytes))
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
