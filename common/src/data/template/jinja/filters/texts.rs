//! Filters of text.

use super::super::arguments::{Args, count_or, text_or, truth_or};
use super::super::characters::is_name_part;
use super::super::failure::{Result, fail};
use super::super::meter::reserve;
use super::super::methods::{self, adjusted, replace, split_lines, stripped};
use super::super::percent;
use super::super::print::to_text;
use super::super::value::{Builder, Dict, Text, Value};

pub(super) fn filter(name: &str, value: &Value, args: Args) -> Result<Value> {
    let text = match name {
        // These look at the value itself.
        "indent" | "truncate" | "wordwrap" => match value {
            Value::Text(text) => text.clone(),
            Value::Undefined(_) if name == "truncate" => return Ok(value.clone()),
            other => {
                return Err(other.blamed(format!("`{name}` takes text, not {}", other.described())));
            }
        },
        _ => to_text(value)?,
    };
    let same = |changed: String| Ok(Value::Text(Text::with_markup(changed, text.is_markup())));
    match name {
        "string" => args.none(name).map(|()| Value::Text(text)),
        "upper" | "lower" | "capitalize" => methods::call(&Value::Text(text), name, args),
        "title" => {
            args.none(name)?;
            Ok(Value::text(title(text.as_str())))
        }
        "trim" => {
            let [chars] = args.bind(name, ["chars"])?;
            let chars = chars.filter(|chars| !chars.is_none());
            let chars = chars
                .as_ref()
                .map(|chars| text_or(Some(chars), "", "what `trim` takes away"));
            same(stripped(text.as_str(), "strip", chars.transpose()?).to_owned())
        }
        "center" => {
            let [width] = args.bind(name, ["width"])?;
            let width = count_or(width.as_ref(), 80, "the width of `center`")?;
            same(adjusted(text.as_str(), "center", width, " ")?)
        }
        "replace" => {
            let [old, new, count] = args.bind(name, ["old", "new", "count"])?;
            let (Some(old), Some(new)) = (old, new) else {
                return fail("`replace` needs what to replace, and what with");
            };
            let count = count.filter(|count| !count.is_none());
            let count = count_or(count.as_ref(), -1, "the count of `replace`")?;
            let (old, new) = (to_text(&old)?, to_text(&new)?);
            Ok(Value::text(replace(
                text.as_str(),
                old.as_str(),
                new.as_str(),
                count,
            )?))
        }
        "format" => {
            if !args.positional.is_empty() && !args.keyword.is_empty() {
                return fail("`format` takes values or names with values, not both");
            }
            let values = if args.keyword.is_empty() {
                Value::tuple(args.positional)?
            } else {
                let pairs = args.keyword.into_iter();
                Value::Dict(Dict::new(
                    pairs.map(|(name, value)| (Value::text(name), value)),
                )?)
            };
            percent::format(&text, &values)
        }
        "indent" => indent(&text, args),
        "truncate" => truncate(&text, args),
        "wordcount" => {
            args.none(name)?;
            let words = text.as_str().split(|c| !is_name_part(c));
            Ok(Value::int(words.filter(|word| !word.is_empty()).count()))
        }
        "wordwrap" => word_wrap(&text, args),
        _ => fail(format!("there is no filter `{name}`")),
    }
}

/// Jinja's own: words begin after white space, hyphens and opening brackets.
fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut word = String::new();
    let flush = |word: &mut String, out: &mut String| {
        let mut chars = word.chars();
        if let Some(first) = chars.next() {
            out.extend(first.to_uppercase());
            out.push_str(&chars.as_str().to_lowercase());
        }
        word.clear();
    };
    for c in text.chars() {
        if super::super::characters::is_space(c) || "-({[<".contains(c) {
            flush(&mut word, &mut out);
            out.push(c);
        } else {
            word.push(c);
        }
    }
    flush(&mut word, &mut out);
    out
}

fn indent(text: &Text, args: Args) -> Result<Value> {
    let [width, first, blank] = args.bind("indent", ["width", "first", "blank"])?;
    let (first, blank) = (
        truth_or(first.as_ref(), false),
        truth_or(blank.as_ref(), false),
    );
    let mut indent = Builder::default();
    match &width {
        Some(Value::Text(width)) => indent.push(width.as_str())?,
        width => {
            let width = count_or(width.as_ref(), 4, "the width of `indent`")?;
            indent.repeat(" ", usize::try_from(width).unwrap_or(0))?;
        }
    }
    let mut out = Builder::default();
    if first {
        out.push(indent.as_str())?;
    }
    // A line end is added, so that a text without lines has one.
    let with_end = format!("{}\n", text.as_str());
    for (index, line) in split_lines(&with_end, false).into_iter().enumerate() {
        if index > 0 {
            out.push("\n")?;
            if blank || !line.is_empty() {
                out.push(indent.as_str())?;
            }
        }
        out.push(line)?;
    }
    Ok(Value::Text(Text::with_markup(
        out.finish(),
        text.is_markup(),
    )))
}

fn truncate(text: &Text, args: Args) -> Result<Value> {
    let [length, kill, end, leeway] =
        args.bind("truncate", ["length", "killwords", "end", "leeway"])?;
    let length = count_or(length.as_ref(), 255, "the length of `truncate`")?;
    let end = text_or(end.as_ref(), "...", "the end of `truncate`")?;
    let leeway = leeway.filter(|leeway| !leeway.is_none());
    let leeway = count_or(leeway.as_ref(), 5, "the leeway of `truncate`")?;
    let kept = length.saturating_sub(end.chars().count() as i64);
    if kept < 0 || leeway < 0 {
        return fail(
            "`truncate` needs a length at least as long as its end, and a leeway of 0 or more",
        );
    }
    if text.char_count() as i64 <= length.saturating_add(leeway) {
        return Ok(Value::Text(text.clone()));
    }
    let kept: String = text.as_str().chars().take(kept as usize).collect();
    let kept = match kept.rsplit_once(' ') {
        Some((words, _)) if !truth_or(kill.as_ref(), false) => words.to_owned(),
        _ => kept,
    };
    Ok(Value::Text(Text::with_markup(kept + end, text.is_markup())))
}

/// `textwrap.wrap` of each line, without hyphens: words are never broken at them.
fn word_wrap(text: &Text, args: Args) -> Result<Value> {
    let names = [
        "width",
        "break_long_words",
        "wrapstring",
        "break_on_hyphens",
    ];
    let [width, break_long, end, _] = args.bind("wordwrap", names)?;
    let width = count_or(width.as_ref(), 79, "the width of `wordwrap`")?;
    let width = usize::try_from(width).unwrap_or(0).max(1);
    let break_long = truth_or(break_long.as_ref(), true);
    let end = end.filter(|end| !end.is_none());
    let end = text_or(end.as_ref(), "\n", "the line end of `wordwrap`")?;
    let mut lines = Vec::new();
    for line in split_lines(text.as_str(), false) {
        // An empty line stays.
        let parts = wrapped(line, width, break_long);
        reserve(parts.len().saturating_mul(64))?;
        if parts.is_empty() {
            lines.push(String::new());
        }
        lines.extend(parts);
    }
    let mut out = Builder::default();
    for (index, line) in lines.iter().enumerate() {
        if index > 0 {
            out.push(end)?;
        }
        out.push(line)?;
    }
    Ok(Value::text(out.finish()))
}

fn wrapped(line: &str, width: usize, break_long: bool) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut current = String::new();
    for word in line.split_inclusive(' ') {
        let bare = word.trim_end_matches(' ');
        if !current.is_empty() && current.chars().count() + bare.chars().count() > width {
            lines.push(current.trim_end_matches(' ').to_owned());
            current.clear();
        }
        current.push_str(word);
        while break_long && current.trim_end_matches(' ').chars().count() > width {
            let rest: String = current.chars().skip(width).collect();
            lines.push(current.chars().take(width).collect());
            current = rest;
        }
    }
    if !current.trim_end_matches(' ').is_empty() {
        lines.push(current.trim_end_matches(' ').to_owned());
    }
    lines
}
