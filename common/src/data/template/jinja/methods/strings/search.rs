//! Strings in strings: `find`, `count`, `startswith` and the like.

use super::super::super::arguments::{Args, text_or};
use super::super::super::failure::{Result, fail};
use super::super::super::value::Value;
use super::Receiver;

/// What the method returns, if it is one of these.
pub(super) fn call(receiver: Receiver, name: &str, args: &Args) -> Result<Option<Value>> {
    let text = receiver.text;
    Ok(Some(match name {
        "find" | "index" | "rfind" | "rindex" | "count" => {
            let [part, start, stop] = args.clone().bind(name, ["sub", "start", "end"])?;
            let Some(part) = part else {
                return fail(format!("`{name}` needs what to look for"));
            };
            let part = text_or(Some(&part), "", "what is looked for")?;
            let Some((before, window)) = window(text, start.as_ref(), stop.as_ref())? else {
                return match name {
                    "count" => Ok(Some(Value::int(0))),
                    "find" | "rfind" => Ok(Some(Value::int(-1))),
                    _ => fail(format!("{part:?} is not in the text")),
                };
            };
            if name == "count" {
                return Ok(Some(Value::int(match part {
                    "" => window.chars().count() + 1,
                    part => window.matches(part).count(),
                })));
            }
            let found = if name.starts_with('r') {
                window.rfind(part)
            } else {
                window.find(part)
            };
            match found {
                Some(at) => Value::int(before + window[..at].chars().count()),
                None if name.ends_with("find") => Value::int(-1),
                None => return fail(format!("{part:?} is not in the text")),
            }
        }
        "startswith" | "endswith" => {
            let [part, start, stop] = args.clone().bind(name, ["prefix", "start", "end"])?;
            let Some(part) = part else {
                return fail(format!("`{name}` needs what to look for"));
            };
            let Some((_, window)) = window(text, start.as_ref(), stop.as_ref())? else {
                return Ok(Some(Value::Bool(false)));
            };
            let parts = match &part {
                Value::Tuple(parts) => parts.to_vec(),
                one => vec![one.clone()],
            };
            let mut fits = false;
            for part in &parts {
                let Some(part) = part.as_str() else {
                    let text = format!("`{name}` looks for text, not for {}", part.described());
                    return Err(part.blamed(text));
                };
                fits |= match name {
                    "startswith" => window.starts_with(part),
                    _ => window.ends_with(part),
                };
            }
            Value::Bool(fits)
        }
        "removeprefix" | "removesuffix" => {
            let [part] = args.clone().bind_all(name, ["affix"])?;
            let part = text_or(Some(&part), "", "what is removed")?;
            let rest = match name {
                "removeprefix" => text.strip_prefix(part),
                _ => text.strip_suffix(part),
            };
            receiver.value(rest.unwrap_or(text))
        }
        _ => return Ok(None),
    }))
}

/// The part of the text between two places, and how many characters are before it. None where it begins after its end.
fn window<'a>(
    text: &'a str,
    start: Option<&Value>,
    stop: Option<&Value>,
) -> Result<Option<(usize, &'a str)>> {
    let given = |value: Option<&Value>| value.filter(|value| !value.is_none()).cloned();
    let (start, stop) = (given(start), given(stop));
    if start.is_none() && stop.is_none() {
        return Ok(Some((0, text)));
    }
    let length = text.chars().count() as i64;
    let bound = |value: Option<Value>, default: i64| -> Result<i64> {
        let bound = value.map_or(Ok(default), |value| value.to_count("a place in text"))?;
        Ok(if bound < 0 {
            bound.saturating_add(length).max(0)
        } else {
            bound
        })
    };
    let (start, stop) = (bound(start, 0)?, bound(stop, length)?.min(length));
    if start > stop {
        return Ok(None);
    }
    let place = |count: i64| {
        let mut places = text.char_indices().map(|(at, _)| at);
        places.nth(count as usize).unwrap_or(text.len())
    };
    Ok(Some((start as usize, &text[place(start)..place(stop)])))
}
