//! Methods of `str`, and of Markup, whose results are Markup and which escapes what comes in.

mod search;
mod split;

pub use split::split_lines;

use super::super::arguments::{Args, count_or, text_or, truth_or};
use super::super::characters::{
    capitalize, decimal_digit, is_cased, is_name_part, is_name_start, is_other_digit, is_printable,
    is_space, is_title, title,
};
use super::super::failure::{Result, fail};
use super::super::meter::reserve;
use super::super::print::{escape, to_text};
use super::super::value::{Builder, Text, Value};

pub const METHODS: [&str; 45] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "encode",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "upper",
    "zfill",
    "striptags",
];

/// A string, and what becomes of what its methods return.
#[derive(Clone, Copy)]
pub(super) struct Receiver<'a> {
    pub text: &'a str,
    pub markup: bool,
}

impl Receiver<'_> {
    pub fn value(&self, text: impl Into<String>) -> Value {
        Value::Text(Text::with_markup(text.into(), self.markup))
    }

    /// Text that is put into this one.
    pub fn escaped(&self, value: &Value) -> Result<String> {
        let text = to_text(value)?;
        if self.markup && !text.is_markup() {
            escape(text.as_str())
        } else {
            Ok(text.as_str().to_owned())
        }
    }
}

pub fn call(text: &Text, name: &str, args: Args) -> Result<Value> {
    let receiver = Receiver {
        text: text.as_str(),
        markup: text.is_markup(),
    };
    // Upper and lower case can be three times as long.
    reserve(receiver.text.len().saturating_mul(3))?;
    if let Some(value) = split::call(receiver, name, &args)? {
        return Ok(value);
    }
    if let Some(value) = search::call(receiver, name, &args)? {
        return Ok(value);
    }
    if name.starts_with("is") {
        args.none(name)?;
        return Ok(Value::Bool(is(name, receiver.text)));
    }
    match name {
        "strip" | "lstrip" | "rstrip" => strip(receiver, name, args),
        "center" | "ljust" | "rjust" => adjust(receiver, name, args),
        "replace" => {
            let [old, new, count] = args.bind(name, ["old", "new", "count"])?;
            let (Some(old), Some(new)) = (old, new) else {
                return fail("`replace` needs what to replace, and what with");
            };
            let old = text_or(Some(&old), "", "what `replace` looks for")?.to_owned();
            text_or(Some(&new), "", "what `replace` puts in")?;
            let count = count_or(count.as_ref(), -1, "the count of `replace`")?;
            let new = receiver.escaped(&new)?;
            Ok(receiver.value(replace(receiver.text, &old, &new, count)?))
        }
        "join" => {
            let [items] = args.bind_all(name, ["iterable"])?;
            let mut out = Builder::default();
            for (index, item) in items.items()?.iter().enumerate() {
                if item.as_str().is_none() && !receiver.markup {
                    let text = format!(
                        "`join` puts text together, and item {} is {}",
                        index + 1,
                        item.described()
                    );
                    return Err(item.blamed(text));
                }
                if index > 0 {
                    out.push(receiver.text)?;
                }
                out.push(&receiver.escaped(item)?)?;
            }
            Ok(receiver.value(out.finish()))
        }
        "zfill" => {
            let [width] = args.bind_all(name, ["width"])?;
            let width = usize::try_from(width.to_count("the width of `zfill`")?).unwrap_or(0);
            let missing = width.saturating_sub(receiver.text.chars().count());
            let at = usize::from(receiver.text.starts_with(['+', '-']));
            let mut out = Builder::default();
            out.push(&receiver.text[..at])?;
            out.repeat("0", missing)?;
            out.push(&receiver.text[at..])?;
            Ok(receiver.value(out.finish()))
        }
        "expandtabs" => {
            let [size] = args.bind(name, ["tabsize"])?;
            let size = count_or(size.as_ref(), 8, "the width of a tab")?;
            Ok(receiver.value(expand_tabs(
                receiver.text,
                usize::try_from(size).unwrap_or(0),
            )?))
        }
        "encode" => fail("bytes (`encode`) are not known here"),
        "striptags" if receiver.markup => {
            args.none(name)?;
            Ok(Value::text(super::super::filters::strip_tags(
                receiver.text,
            )))
        }
        _ => {
            args.none(name)?;
            Ok(receiver.value(changed_case(name, receiver.text)))
        }
    }
}

fn changed_case(name: &str, text: &str) -> String {
    match name {
        "upper" => text.to_uppercase(),
        "lower" => text.to_lowercase(),
        // Full case folding differs from lower case for few letters.
        "casefold" => text
            .chars()
            .flat_map(|c| match c {
                'ß' | 'ẞ' => vec!['s', 's'],
                'ς' => vec!['σ'],
                'ſ' => vec!['s'],
                c => c.to_lowercase().collect(),
            })
            .collect(),
        "capitalize" => capitalize(text),
        "title" => title(text),
        _ => text
            .chars()
            .flat_map(|c| -> Vec<char> {
                if c.is_uppercase() {
                    c.to_lowercase().collect()
                } else {
                    c.to_uppercase().collect()
                }
            })
            .collect(),
    }
}

fn is(name: &str, text: &str) -> bool {
    let all = |test: fn(char) -> bool| !text.is_empty() && text.chars().all(test);
    let cased = |wanted: fn(char) -> bool, other: fn(char) -> bool| {
        text.chars().any(wanted) && !text.chars().any(|c| other(c) || is_title(c))
    };
    match name {
        "isspace" => all(is_space),
        "isascii" => text.is_ascii(),
        "isdecimal" => all(|c| decimal_digit(c).is_some()),
        "isdigit" => all(|c| decimal_digit(c).is_some() || is_other_digit(c)),
        "isnumeric" => all(char::is_numeric),
        "isalpha" => all(is_letter),
        "isalnum" => all(|c| is_letter(c) || c.is_numeric()),
        "isprintable" => text.chars().all(is_printable),
        "isupper" => cased(char::is_uppercase, char::is_lowercase),
        "islower" => cased(char::is_lowercase, char::is_uppercase),
        "isidentifier" => text.starts_with(is_name_start) && text.chars().all(is_name_part),
        _ => is_titled(text),
    }
}

/// A letter of the categories L*, where Unicode's property "alphabetic" also has marks and letter numbers.
fn is_letter(c: char) -> bool {
    c.is_alphabetic() && !c.is_numeric()
}

fn is_titled(text: &str) -> bool {
    let (mut inside, mut any) = (false, false);
    for c in text.chars() {
        let upper = c.is_uppercase() || is_title(c);
        if upper && inside || c.is_lowercase() && !inside {
            return false;
        }
        inside = is_cased(c);
        any |= inside;
    }
    any
}

fn strip(receiver: Receiver, name: &str, args: Args) -> Result<Value> {
    let [chars] = args.bind(name, ["chars"])?;
    let chars = chars.filter(|chars| !chars.is_none());
    let chars = chars
        .as_ref()
        .map(|chars| text_or(Some(chars), "", "what `strip` takes away"));
    let chars = chars.transpose()?;
    Ok(receiver.value(stripped(receiver.text, name, chars)))
}

/// `text.strip(chars)`, or `lstrip` or `rstrip`.
pub fn stripped<'a>(text: &'a str, name: &str, chars: Option<&str>) -> &'a str {
    let goes = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    match name {
        "lstrip" => text.trim_start_matches(goes),
        "rstrip" => text.trim_end_matches(goes),
        _ => text.trim_matches(goes),
    }
}

fn adjust(receiver: Receiver, name: &str, args: Args) -> Result<Value> {
    let [width, fill] = args.bind(name, ["width", "fillchar"])?;
    let Some(width) = width else {
        return fail(format!("`{name}` needs a width"));
    };
    let width = width.to_count("a width")?;
    let fill = match &fill {
        None => " ".to_owned(),
        Some(fill) => {
            text_or(Some(fill), "", "what fills up")?;
            let fill = receiver.escaped(fill)?;
            if fill.chars().count() != 1 {
                return fail(format!("`{name}` fills with one character"));
            }
            fill
        }
    };
    Ok(receiver.value(adjusted(receiver.text, name, width, &fill)?))
}

/// `text.center(width)`, or `ljust` or `rjust`.
pub fn adjusted(text: &str, name: &str, width: i64, fill: &str) -> Result<String> {
    let width = usize::try_from(width).unwrap_or(0);
    let missing = width.saturating_sub(text.chars().count());
    // CPython puts the odd one on the left where the width is odd.
    let left = match name {
        "ljust" => 0,
        "rjust" => missing,
        _ => missing / 2 + (missing & width & 1),
    };
    let mut out = Builder::default();
    out.repeat(fill, left)?;
    out.push(text)?;
    out.repeat(fill, missing - left)?;
    Ok(out.finish())
}

/// `text.replace(old, new, count)`; a negative count is all.
pub fn replace(text: &str, old: &str, new: &str, count: i64) -> Result<String> {
    let mut left = usize::try_from(count).unwrap_or(usize::MAX);
    let mut out = Builder::default();
    let mut done = 0;
    for (at, found) in text.match_indices(old) {
        if left == 0 {
            break;
        }
        left -= 1;
        out.push(&text[done..at])?;
        out.push(new)?;
        done = at + found.len();
    }
    out.push(&text[done..])?;
    Ok(out.finish())
}

fn expand_tabs(text: &str, size: usize) -> Result<String> {
    let mut out = Builder::default();
    let mut column = 0;
    for c in text.chars() {
        match c {
            '\t' if size > 0 => {
                let missing = size - column % size;
                out.repeat(" ", missing)?;
                column += missing;
            }
            '\t' => {}
            '\n' | '\r' => {
                out.push_char(c)?;
                column = 0;
            }
            c => {
                out.push_char(c)?;
                column += 1;
            }
        }
    }
    Ok(out.finish())
}

/// Whether a truth argument was given, for methods such as `splitlines`.
pub(super) fn flag(value: Option<&Value>) -> bool {
    truth_or(value, false)
}
