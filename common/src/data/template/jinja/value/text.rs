//! Strings: shared, counted, and marked where they are Markup (text that is safe in HTML, so that what is added to it
//! gets escaped).

use std::sync::Arc;

use super::super::failure::Result;
use super::super::meter::{Held, reserve, spend};

#[derive(Clone, Debug)]
pub struct Text(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    text: Box<str>,
    ascii: bool,
    markup: bool,
    _held: Held,
}

impl Text {
    pub fn new(text: String) -> Self {
        Self::with_markup(text, false)
    }

    pub fn with_markup(text: String, markup: bool) -> Self {
        Self(Arc::new(Inner {
            ascii: text.is_ascii(),
            markup,
            _held: Held::new(text.len() + size_of::<Inner>()),
            text: text.into_boxed_str(),
        }))
    }

    pub fn as_str(&self) -> &str {
        &self.0.text
    }

    pub fn is_markup(&self) -> bool {
        self.0.markup
    }

    pub fn char_count(&self) -> usize {
        if self.0.ascii {
            self.0.text.len()
        } else {
            self.0.text.chars().count()
        }
    }

    /// The character at a place, counted from 0.
    pub fn char_at(&self, place: usize) -> Option<char> {
        if self.0.ascii {
            return self
                .0
                .text
                .as_bytes()
                .get(place)
                .map(|byte| char::from(*byte));
        }
        self.0.text.chars().nth(place)
    }

    /// Both are the same object.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// Pieces that cost as much as one step.
const PUSHES_PER_STEP: usize = 16;

/// A string that is built within the bounds.
#[derive(Default)]
pub struct Builder {
    text: String,
    pushes: usize,
}

impl Builder {
    pub fn push(&mut self, text: &str) -> Result<()> {
        self.pushes += 1;
        if self.pushes.is_multiple_of(PUSHES_PER_STEP) {
            spend(1)?;
        }
        let room = self.text.capacity();
        if self.text.len() + text.len() > room {
            // A string doubles as it grows.
            reserve((self.text.len() + text.len()).saturating_mul(2))?;
        }
        self.text.push_str(text);
        Ok(())
    }

    pub fn push_char(&mut self, c: char) -> Result<()> {
        self.push(c.encode_utf8(&mut [0; 4]))
    }

    pub fn repeat(&mut self, text: &str, count: usize) -> Result<()> {
        let more = text.len().saturating_mul(count);
        reserve(self.text.len().saturating_add(more))?;
        spend(count / PUSHES_PER_STEP)?;
        self.text.extend(std::iter::repeat_n(text, count));
        Ok(())
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub fn finish(self) -> String {
        self.text
    }
}
