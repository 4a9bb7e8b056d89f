//! Filters that write text for HTML, addresses and JSON.

use super::super::arguments::{Args, text_or, truth_or};
use super::super::characters::is_space;
use super::super::failure::{Result, fail};
use super::super::json::{JsonStyle, to_json};
use super::super::print::{escape, to_markup, to_text};
use super::super::value::{Builder, Text, Value};

/// Most blanks by which JSON is indented.
const MAX_INDENT: i64 = 1000;

pub(super) fn filter(name: &str, value: &Value, args: Args) -> Result<Value> {
    match name {
        "e" | "escape" => {
            args.none(name)?;
            Ok(Value::Text(to_markup(value)?))
        }
        "forceescape" => {
            args.none(name)?;
            let escaped = escape(to_text(value)?.as_str())?;
            Ok(Value::Text(Text::with_markup(escaped, true)))
        }
        "safe" => {
            args.none(name)?;
            let text = to_text(value)?.as_str().to_owned();
            Ok(Value::Text(Text::with_markup(text, true)))
        }
        "striptags" => {
            args.none(name)?;
            Ok(Value::text(strip_tags(to_text(value)?.as_str())))
        }
        "urlencode" => {
            args.none(name)?;
            url_encode(value)
        }
        "xmlattr" => {
            let [space] = args.bind(name, ["autospace"])?;
            attributes(value, truth_or(space.as_ref(), true))
        }
        _ => json(value, args),
    }
}

/// Text without comments, tags and more than one blank in a row, with the entities of `escape` resolved.
pub fn strip_tags(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("<!--") {
        let Some((_, after)) = after.split_once("-->") else {
            break;
        };
        out.push_str(before);
        rest = after;
    }
    out.push_str(rest);
    let mut kept = String::new();
    let mut rest = out.as_str();
    while let Some((before, after)) = rest.split_once('<') {
        let Some((_, after)) = after.split_once('>') else {
            break;
        };
        kept.push_str(before);
        rest = after;
    }
    kept.push_str(rest);
    let words: Vec<&str> = kept
        .split(is_space)
        .filter(|word| !word.is_empty())
        .collect();
    words
        .join(" ")
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&#34;", "\"")
        .replace("&quot;", "\"")
        .replace("&#39;", "'")
        .replace("&amp;", "&")
}

fn quote(out: &mut Builder, text: &str, in_query: bool) -> Result<()> {
    for byte in text.bytes() {
        match byte {
            b'/' if !in_query => out.push("/")?,
            b' ' if in_query => out.push("+")?,
            byte if byte.is_ascii_alphanumeric() || b"_.-~".contains(&byte) => {
                out.push_char(char::from(byte))?;
            }
            byte => out.push(&format!("%{byte:02X}"))?,
        }
    }
    Ok(())
}

fn url_encode(value: &Value) -> Result<Value> {
    let mut out = Builder::default();
    let pairs = match value {
        Value::Dict(dict) => dict.items()?,
        other if other.as_str().is_none() && other.is_iterable() => other.items()?,
        other => {
            quote(&mut out, to_text(other)?.as_str(), false)?;
            return Ok(Value::text(out.finish()));
        }
    };
    for (index, pair) in pairs.iter().enumerate() {
        let pair = pair.items()?;
        let [name, value] = pair.as_slice() else {
            return fail("`urlencode` takes pairs of a name and a value");
        };
        if index > 0 {
            out.push("&")?;
        }
        quote(&mut out, to_text(name)?.as_str(), true)?;
        out.push("=")?;
        quote(&mut out, to_text(value)?.as_str(), true)?;
    }
    Ok(Value::text(out.finish()))
}

fn attributes(value: &Value, space: bool) -> Result<Value> {
    let Value::Dict(dict) = value else {
        return Err(value.blamed(format!(
            "`xmlattr` takes an object, not {}",
            value.described()
        )));
    };
    let mut out = Builder::default();
    for (name, value) in dict.pairs() {
        if value.is_none() || value.is_undefined() {
            continue;
        }
        let name = to_text(name)?;
        if name
            .as_str()
            .contains([' ', '\t', '\n', '\r', '\u{b}', '\u{c}', '/', '>', '='])
        {
            return fail(format!("{:?} is no name of an attribute", name.as_str()));
        }
        if space || !out.as_str().is_empty() {
            out.push(" ")?;
        }
        out.push(&escape(name.as_str())?)?;
        out.push("=\"")?;
        out.push(to_markup(value)?.as_str())?;
        out.push("\"")?;
    }
    Ok(Value::text(out.finish()))
}

fn json(value: &Value, args: Args) -> Result<Value> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let [ensure_ascii, indent, separators, sort_keys] = args.bind("tojson", names)?;
    let indent = match indent {
        None | Some(Value::None) => None,
        Some(Value::Text(text)) => Some(text.as_str().to_owned()),
        Some(other) => {
            let width = other.to_count("the indent of `tojson`")?;
            if width > MAX_INDENT {
                return fail("the indent of `tojson` is too large");
            }
            Some(" ".repeat(usize::try_from(width).unwrap_or(0)))
        }
    };
    let (item, key) = match separators {
        None | Some(Value::None) if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None | Some(Value::None) => (", ".to_owned(), ": ".to_owned()),
        Some(pair) => match pair.items()?.as_slice() {
            [item, key] => {
                let text =
                    |value| text_or(Some(value), "", "a separator of `tojson`").map(str::to_owned);
                (text(item)?, text(key)?)
            }
            _ => return fail("the separators of `tojson` are two"),
        },
    };
    let style = JsonStyle {
        indent,
        item_separator: item,
        key_separator: key,
        ensure_ascii: truth_or(ensure_ascii.as_ref(), false),
        sort_keys: truth_or(sort_keys.as_ref(), false),
    };
    Ok(Value::text(to_json(value, &style)?))
}
