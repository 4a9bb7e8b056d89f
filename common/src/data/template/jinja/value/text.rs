//! Strings: shared, counted, and marked where they are Markup (text that is safe in HTML, so that what is added to it
//! gets escaped).

use std::sync::Arc;

use super::super::failure::Result;
use super::super::meter::{Held, reserve, spend};

#[derive(Clone, Debug)]
pub struct Text(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    text: String,
    ascii: bool,
    markup: bool,
    held: Held,
}

impl Text {
    pub fn new(text: String) -> Self {
        Self::with_markup(text, false)
    }

    pub fn with_markup(text: String, markup: bool) -> Self {
        Self(Arc::new(Inner {
            ascii: text.is_ascii(),
            markup,
            held: Held::new(text.capacity() + size_of::<Inner>()),
            text,
        }))
    }

    /// Puts plain text at the end of a plain text that nobody else holds. False where it is not such a one.
    pub fn append(&mut self, more: &Self) -> Result<bool> {
        let Some(inner) = Arc::get_mut(&mut self.0) else {
            return Ok(false);
        };
        if inner.markup || more.is_markup() {
            return Ok(false);
        }
        let length = inner.text.len() + more.as_str().len();
        if length > inner.text.capacity() {
            // A string doubles as it grows.
            reserve(length.saturating_mul(2))?;
        }
        inner.text.push_str(more.as_str());
        inner.ascii &= more.0.ascii;
        inner.held = Held::new(inner.text.capacity() + size_of::<Inner>());
        Ok(true)
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
    /// All that was pushed, where that is one text which can be shared.
    only: Option<Text>,
}

impl Builder {
    /// One that has room for so many bytes.
    pub fn with_room(bytes: usize) -> Result<Self> {
        reserve(bytes)?;
        Ok(Self {
            text: String::with_capacity(bytes),
            ..Self::default()
        })
    }

    /// [`Builder::push`] of a text that others hold, too.
    pub fn push_text(&mut self, text: &Text) -> Result<()> {
        if self.pushes == 0 && self.text.is_empty() && !text.is_markup() {
            self.pushes = 1;
            self.only = Some(text.clone());
            return Ok(());
        }
        self.push(text.as_str())
    }

    pub fn push(&mut self, text: &str) -> Result<()> {
        if let Some(only) = self.only.take() {
            self.push(only.as_str())?;
        }
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
        self.push("")?;
        let more = text.len().saturating_mul(count);
        reserve(self.text.len().saturating_add(more))?;
        spend(count / PUSHES_PER_STEP)?;
        self.text.extend(std::iter::repeat_n(text, count));
        Ok(())
    }

    pub fn as_str(&self) -> &str {
        self.only.as_ref().map_or(&self.text, Text::as_str)
    }

    pub fn finish(self) -> String {
        match self.only {
            Some(only) => only.as_str().to_owned(),
            None => self.text,
        }
    }

    /// What was built, as plain text.
    pub fn finish_text(self) -> Text {
        self.only.unwrap_or_else(|| Text::new(self.text))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_a_text_that_nobody_else_holds_grows() {
        let text = |text: &str| Text::new(text.to_owned());
        let (mut own, more) = (text("a"), text("\u{e9}"));
        assert!(own.append(&more).unwrap());
        assert_eq!((own.as_str(), own.char_count()), ("a\u{e9}", 2));
        let held = own.clone();
        assert!(!own.append(&more).unwrap());
        assert_eq!((own.as_str(), held.as_str()), ("a\u{e9}", "a\u{e9}"));
        let markup = Text::with_markup("<".to_owned(), true);
        assert!(!text("a").append(&markup).unwrap());
        assert!(!markup.clone().append(&text("a")).unwrap());
    }

    #[test]
    fn one_text_that_is_built_stays_the_same_and_more_are_put_together() {
        let text = Text::new("river".to_owned());
        let built = |pushes: &[&str]| {
            let mut builder = Builder::default();
            builder.push_text(&text).unwrap();
            assert_eq!(builder.as_str(), "river");
            pushes.iter().for_each(|more| builder.push(more).unwrap());
            builder.finish_text()
        };
        assert!(built(&[]).is_same(&text));
        assert_eq!(built(&[" ", "bend"]).as_str(), "river bend");
        let mut repeated = Builder::default();
        repeated.push_text(&text).unwrap();
        repeated.repeat("!", 2).unwrap();
        assert_eq!(repeated.finish(), "river!!");
    }
}
