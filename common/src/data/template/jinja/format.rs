//! `text.format(..)` and its fields, and what `%` shares with them.

mod fields;
mod numbers;

use super::arguments::Args;
use super::failure::{Result, fail};
use super::interpreter::items;
use super::print::{escape, repr, to_text};
use super::value::{Builder, Text, Value};
use fields::format_value;
pub use fields::{Alignment, Spec, write_padded};
pub use numbers::{integer_digits, write_float};

/// Fields within fields, as in `{:{width}}`.
const MAX_LEVELS: usize = 2;

pub fn format(text: &Text, args: &Args) -> Result<Value> {
    let mut formatter = Formatter {
        args,
        next: 0,
        markup: text.is_markup(),
    };
    let mut out = Builder::default();
    formatter.write(&mut out, text.as_str(), MAX_LEVELS)?;
    Ok(Value::Text(Text::with_markup(
        out.finish(),
        text.is_markup(),
    )))
}

struct Formatter<'a> {
    args: &'a Args,
    /// The place of the next value that is not named.
    next: usize,
    markup: bool,
}

impl Formatter<'_> {
    fn write(&mut self, out: &mut Builder, text: &str, levels: usize) -> Result<()> {
        if levels == 0 {
            return fail("the fields of `format` are too deep in each other");
        }
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            out.push(&rest[..at])?;
            let brace = &rest[at..=at];
            rest = &rest[at + 1..];
            if let Some(after) = rest.strip_prefix(brace) {
                out.push(brace)?;
                rest = after;
            } else if brace == "}" {
                return fail("a single `}` in the text of `format`");
            } else {
                let end = field_end(rest)?;
                self.field(out, &rest[..end], levels)?;
                rest = &rest[end + 1..];
            }
        }
        out.push(rest)
    }

    fn field(&mut self, out: &mut Builder, field: &str, levels: usize) -> Result<()> {
        let (name, spec) = match split_outside(field, ':') {
            Some((name, spec)) => (name, spec),
            None => (field, ""),
        };
        let (name, conversion) = match name.split_once('!') {
            Some((name, conversion)) => (name, Some(conversion)),
            None => (name, None),
        };
        let mut value = self.lookup(name)?;
        let mut inner = Builder::default();
        if spec.contains('{') {
            self.write(&mut inner, spec, levels - 1)?;
        } else {
            inner.push(spec)?;
        }
        value = match conversion {
            None => value,
            Some("s") => Value::Text(to_text(&value)?),
            Some("r") => Value::text(repr(&value)?),
            Some(other) => return fail(format!("`!{other}` is no conversion of `format`")),
        };
        let text = format_value(&value, inner.as_str())?;
        if self.markup && !value.is_markup() {
            out.push(&escape(&text)?)
        } else {
            out.push(&text)
        }
    }

    /// `name.attribute[index]`
    fn lookup(&mut self, name: &str) -> Result<Value> {
        let end = name.find(['.', '[']).unwrap_or(name.len());
        let (first, mut rest) = name.split_at(end);
        let place = match first {
            "" => {
                self.next += 1;
                Some(self.next - 1)
            }
            digits => digits.parse().ok(),
        };
        let found = match place {
            Some(place) => self.args.positional.get(place),
            None => {
                let mut named = self.args.keyword.iter();
                named
                    .find(|(known, _)| known == first)
                    .map(|(_, value)| value)
            }
        };
        let Some(mut value) = found.cloned() else {
            return fail(format!("`format` has no value `{first}`"));
        };
        while !rest.is_empty() {
            if let Some(after) = rest.strip_prefix('.') {
                let end = after.find(['.', '[']).unwrap_or(after.len());
                value = items::attribute(&value, &after[..end])?;
                rest = &after[end..];
                continue;
            }
            let inside = rest[1..].split_once(']');
            let Some((index, after)) = inside else {
                return fail("an index in the text of `format` has no end");
            };
            let index = index
                .parse::<i64>()
                .map_or_else(|_| Value::text(index), Value::int);
            value = items::item(&value, &index)?;
            rest = after;
        }
        value.defined().cloned()
    }
}

/// Where the field ends that begins with the text.
fn field_end(text: &str) -> Result<usize> {
    let mut open = 0_usize;
    for (at, c) in text.char_indices() {
        match c {
            '{' => open += 1,
            '}' if open == 0 => return Ok(at),
            '}' => open -= 1,
            _ => {}
        }
    }
    fail("a single `{` in the text of `format`")
}

/// The text before and after a character that is in no brackets.
fn split_outside(text: &str, at: char) -> Option<(&str, &str)> {
    let mut open = 0_usize;
    for (place, c) in text.char_indices() {
        match c {
            '[' => open += 1,
            ']' => open = open.saturating_sub(1),
            c if c == at && open == 0 => {
                return Some((&text[..place], &text[place + c.len_utf8()..]));
            }
            _ => {}
        }
    }
    None
}
