//! How Python writes values: `str()`, `repr()` and HTML escapes.

use super::characters::is_printable;
use super::failure::{Result, fail};
use super::meter::descend;
use super::value::{Builder, Text, Value};

/// `str(value)`: what `{{ value }}` prints.
pub fn to_text(value: &Value) -> Result<Text> {
    match value {
        Value::Text(text) => Ok(text.clone()),
        other => {
            let mut out = Builder::default();
            write_str(&mut out, other)?;
            Ok(Text::new(out.finish()))
        }
    }
}

/// `str(value)`, at the end of what is there.
pub fn write_str(out: &mut Builder, value: &Value) -> Result<()> {
    match value {
        Value::Text(text) => out.push_text(text),
        Value::Undefined(_) => Ok(()),
        other => write_repr(out, other),
    }
}

pub fn repr(value: &Value) -> Result<String> {
    let mut out = Builder::default();
    write_repr(&mut out, value)?;
    Ok(out.finish())
}

pub fn write_repr(out: &mut Builder, value: &Value) -> Result<()> {
    descend()?;
    match value {
        Value::Undefined(_) => out.push("Undefined"),
        Value::None => out.push("None"),
        Value::Bool(true) => out.push("True"),
        Value::Bool(false) => out.push("False"),
        Value::Int(value) => out.push(&value.to_string()),
        Value::Float(value) => out.push(&float(*value)),
        Value::Text(text) if text.is_markup() => {
            out.push("Markup(")?;
            write_quoted(out, text.as_str())?;
            out.push(")")
        }
        Value::Text(text) => write_quoted(out, text.as_str()),
        Value::List(items) => write_items(out, "[", items, "]"),
        Value::Tuple(items) => {
            let end = if items.len() == 1 { ",)" } else { ")" };
            write_items(out, "(", items, end)
        }
        Value::Dict(dict) => write_pairs(out, dict.pairs().iter().map(|(key, value)| (key, value))),
        Value::View(view) => {
            out.push(view.type_name())?;
            write_items(out, "([", &view.items()?, "])")
        }
        Value::Range(range) => {
            out.push(&format!("range({}, {}", range.start, range.stop))?;
            if range.step != 1 {
                out.push(&format!(", {}", range.step))?;
            }
            out.push(")")
        }
        Value::Namespace(namespace) => {
            let pairs: Vec<(Value, Value)> = namespace.pairs();
            out.push("<Namespace ")?;
            write_pairs(out, pairs.iter().map(|(key, value)| (key, value)))?;
            out.push(">")
        }
        Value::Loop(state) => out.push(&format!(
            "<LoopContext {}/{}>",
            state.index0() + 1,
            state.length()
        )),
        Value::Generator(_) => fail(
            "a filter's result is printed as it is: make a list of it (`| list`) or join it (`| join`)",
        ),
        Value::Callable(callable) if callable.macro_name().is_some() => {
            out.push("<Macro ")?;
            write_quoted(out, callable.macro_name().unwrap_or_default())?;
            out.push(">")
        }
        Value::Callable(_) | Value::Cycler(_) | Value::Joiner(_) => fail(format!(
            "{} is printed, not called: `()` is missing",
            value.described()
        )),
    }
}

fn write_items(out: &mut Builder, open: &str, items: &[Value], close: &str) -> Result<()> {
    out.push(open)?;
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            out.push(", ")?;
        }
        write_repr(out, item)?;
    }
    out.push(close)
}

fn write_pairs<'a>(
    out: &mut Builder,
    pairs: impl Iterator<Item = (&'a Value, &'a Value)>,
) -> Result<()> {
    out.push("{")?;
    for (index, (key, value)) in pairs.enumerate() {
        if index > 0 {
            out.push(", ")?;
        }
        write_repr(out, key)?;
        out.push(": ")?;
        write_repr(out, value)?;
    }
    out.push("}")
}

/// `repr(text)`: all that Unicode does not count as printable is escaped.
fn write_quoted(out: &mut Builder, text: &str) -> Result<()> {
    let quote = if text.contains('\'') && !text.contains('"') {
        "\""
    } else {
        "'"
    };
    out.push(quote)?;
    for c in text.chars() {
        match c {
            '\\' => out.push("\\\\")?,
            '\n' => out.push("\\n")?,
            '\r' => out.push("\\r")?,
            '\t' => out.push("\\t")?,
            '\'' if quote == "'" => out.push("\\'")?,
            c if is_printable(c) => out.push_char(c)?,
            c => out.push(&match u32::from(c) {
                code @ ..=0xff => format!("\\x{code:02x}"),
                code @ ..=0xffff => format!("\\u{code:04x}"),
                code => format!("\\U{code:08x}"),
            })?,
        }
    }
    out.push(quote)
}

/// `repr(float)`: the shortest digits that read back, in exponent form below 1e-4 and from 1e16 on.
pub fn float(value: f64) -> String {
    if value.is_nan() {
        return "nan".to_owned();
    }
    if value.is_infinite() {
        return (if value > 0.0 { "inf" } else { "-inf" }).to_owned();
    }
    let scientific = format!("{value:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = format!("{value}");
        return if plain.contains('.') {
            plain
        } else {
            plain + ".0"
        };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.abs())
}

/// Text as `markupsafe.escape` writes it.
pub fn escape(text: &str) -> Result<String> {
    let mut out = Builder::default();
    for c in text.chars() {
        match c {
            '&' => out.push("&amp;")?,
            '<' => out.push("&lt;")?,
            '>' => out.push("&gt;")?,
            '\'' => out.push("&#39;")?,
            '"' => out.push("&#34;")?,
            c => out.push_char(c)?,
        }
    }
    Ok(out.finish())
}

/// The value as Markup, escaped unless it is Markup already.
pub fn to_markup(value: &Value) -> Result<Text> {
    let text = to_text(value)?;
    if text.is_markup() {
        return Ok(text);
    }
    Ok(Text::with_markup(escape(text.as_str())?, true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_read_as_in_python() {
        for (value, text) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-2.5, "-2.5"),
            (1e16, "1e+16"),
            (1.5e-7, "1.5e-07"),
            (1e22, "1e+22"),
            (123456789012345.0, "123456789012345.0"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (-0.0, "-0.0"),
        ] {
            assert_eq!(float(value), text);
        }
    }
}
