//! Strings in parts: `split`, `splitlines`, `partition`.

use super::super::super::arguments::{Args, count_or, text_or};
use super::super::super::characters::is_space;
use super::super::super::failure::{Result, fail};
use super::super::super::meter::reserve;
use super::super::super::value::Value;
use super::{Receiver, flag};

/// What the method returns, if it is one of these.
pub(super) fn call(receiver: Receiver, name: &str, args: &Args) -> Result<Option<Value>> {
    let text = receiver.text;
    let values = |parts: Vec<&str>| -> Vec<Value> {
        parts.into_iter().map(|part| receiver.value(part)).collect()
    };
    Ok(Some(match name {
        "split" | "rsplit" => {
            let [separator, count] = args.clone().bind(name, ["sep", "maxsplit"])?;
            let separator = separator.filter(|separator| !separator.is_none());
            let count = count_or(count.as_ref(), -1, "the count of `split`")?;
            let count = usize::try_from(count).unwrap_or(usize::MAX);
            let parts = match &separator {
                None => split_at_space(text, count, name == "rsplit"),
                Some(separator) => match text_or(Some(separator), "", "what `split` splits at")? {
                    "" => return fail("`split` cannot split at empty text"),
                    separator => split_at(text, separator, count, name == "rsplit"),
                },
            };
            // Each part is a string of its own.
            reserve(parts.len().saturating_mul(96))?;
            Value::list(values(parts))?
        }
        "splitlines" => {
            let [keep] = args.clone().bind(name, ["keepends"])?;
            Value::list(values(split_lines(text, flag(keep.as_ref()))))?
        }
        "partition" | "rpartition" => {
            let [separator] = args.clone().bind_all(name, ["sep"])?;
            let separator = text_or(Some(&separator), "", "what `partition` splits at")?;
            if separator.is_empty() {
                return fail("`partition` cannot split at empty text");
            }
            let found = match name {
                "partition" => text.split_once(separator),
                _ => text.rsplit_once(separator),
            };
            let parts = match (found, name) {
                (Some((before, after)), _) => vec![before, separator, after],
                (None, "partition") => vec![text, "", ""],
                (None, _) => vec!["", "", text],
            };
            Value::tuple(values(parts))?
        }
        _ => return Ok(None),
    }))
}

fn split_at<'a>(text: &'a str, separator: &str, count: usize, from_end: bool) -> Vec<&'a str> {
    let parts = count.saturating_add(1);
    if !from_end {
        return text.splitn(parts, separator).collect();
    }
    let mut found: Vec<&str> = text.rsplitn(parts, separator).collect();
    found.reverse();
    found
}

fn split_at_space(text: &str, count: usize, from_end: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = if from_end {
        text.trim_end_matches(is_space)
    } else {
        text.trim_start_matches(is_space)
    };
    while !rest.is_empty() {
        if parts.len() == count {
            // What is left stays whole, but for the space at its other end.
            parts.push(if from_end {
                rest.trim_end_matches(is_space)
            } else {
                rest
            });
            break;
        }
        let (part, left) = if from_end {
            let at = rest.char_indices().rev().find(|(_, c)| is_space(*c));
            let start = at.map_or(0, |(at, c)| at + c.len_utf8());
            (&rest[start..], rest[..start].trim_end_matches(is_space))
        } else {
            let end = rest.find(is_space).unwrap_or(rest.len());
            (&rest[..end], rest[end..].trim_start_matches(is_space))
        };
        parts.push(part);
        rest = left;
    }
    if from_end {
        parts.reverse();
    }
    parts
}

/// Lines, ended by any of Python's line ends.
pub fn split_lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let ends_line = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'
                ..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let at = rest.find(ends_line).unwrap_or(rest.len());
        let end = match rest[at..].chars().next() {
            Some('\r') if rest[at..].starts_with("\r\n") => at + 2,
            Some(c) => at + c.len_utf8(),
            None => at,
        };
        lines.push(&rest[..if keep_ends { end } else { at }]);
        rest = &rest[end..];
    }
    lines
}
