//! `text % values`: Python's older way of formatting.

use super::characters::is_printable;
use super::failure::{Result, fail};
use super::format::{Alignment, Spec, integer_digits, write_float, write_padded};
use super::integer::Integer;
use super::print::{escape, repr, to_text};
use super::value::{Builder, Text, Value};

/// Widest and most precise field that is written.
const MAX_WIDTH: usize = 1 << 20;

pub fn format(format: &Text, values: &Value) -> Result<Value> {
    let mut formatter = Formatter {
        rest: format.as_str(),
        values: match values {
            Value::Tuple(items) => items.to_vec(),
            one => vec![one.clone()],
        },
        used: 0,
        mapping: match values {
            Value::Dict(_) => Some(values.clone()),
            _ => None,
        },
        markup: format.is_markup(),
    };
    let mut out = Builder::default();
    let mut named = false;
    while let Some(at) = formatter.rest.find('%') {
        out.push(&formatter.rest[..at])?;
        formatter.rest = &formatter.rest[at + 1..];
        named |= formatter.field(&mut out)?;
    }
    out.push(formatter.rest)?;
    let left = formatter.values.len() > formatter.used;
    if left && !named && !matches!(values, Value::Dict(_) | Value::List(_)) {
        return fail("not all values of `%` are used by the text");
    }
    Ok(Value::Text(Text::with_markup(
        out.finish(),
        formatter.markup,
    )))
}

struct Formatter<'a> {
    rest: &'a str,
    values: Vec<Value>,
    used: usize,
    mapping: Option<Value>,
    markup: bool,
}

impl Formatter<'_> {
    /// One field after its `%`. Says whether it had a name.
    fn field(&mut self, out: &mut Builder) -> Result<bool> {
        let name = self.name()?;
        let mut spec = Spec::default();
        while let Some(flag) = self.rest.chars().next().filter(|c| "-+ #0".contains(*c)) {
            self.rest = &self.rest[1..];
            match flag {
                '-' => spec.align = Some(Alignment::Left),
                '+' => spec.sign = '+',
                ' ' if spec.sign != '+' => spec.sign = ' ',
                '#' => spec.alternate = true,
                '0' => spec.zero = true,
                _ => {}
            }
        }
        spec.width = self.size(&mut spec.align)?;
        if let Some(rest) = self.rest.strip_prefix('.') {
            self.rest = rest;
            spec.precision = Some(self.size(&mut None)?);
        }
        self.rest = self.rest.trim_start_matches(['h', 'l', 'L']);
        let Some(kind) = self.rest.chars().next() else {
            return fail("the text of `%` ends within a field");
        };
        self.rest = &self.rest[kind.len_utf8()..];
        if kind == '%' {
            out.push("%")?;
            return Ok(name.is_some());
        }
        let value = match (&name, &self.mapping) {
            (Some(name), Some(mapping)) => {
                super::interpreter::items::item(mapping, &Value::text(name.as_str()))?
            }
            (Some(_), None) => return fail("a named field of `%` needs an object"),
            (None, _) => self.next_value()?,
        };
        if name.is_some() && value.is_undefined() {
            return Err(value.blamed(format!("`%` has no value `{}`", name.unwrap_or_default())));
        }
        self.write(out, kind, spec, &value)?;
        Ok(name.is_some())
    }

    fn name(&mut self) -> Result<Option<String>> {
        let Some(rest) = self.rest.strip_prefix('(') else {
            return Ok(None);
        };
        let Some(end) = rest.find(')') else {
            return fail("a name in a field of `%` has no end");
        };
        self.rest = &rest[end + 1..];
        Ok(Some(rest[..end].to_owned()))
    }

    fn size(&mut self, align: &mut Option<Alignment>) -> Result<usize> {
        if let Some(rest) = self.rest.strip_prefix('*') {
            self.rest = rest;
            let size = self.next_value()?.to_count("a width in `%`")?;
            if size < 0 {
                *align = Some(Alignment::Left);
            }
            return bounded(usize::try_from(size.unsigned_abs()).ok());
        }
        let length = self.rest.len()
            - self
                .rest
                .trim_start_matches(|c: char| c.is_ascii_digit())
                .len();
        let digits = &self.rest[..length];
        self.rest = &self.rest[length..];
        if digits.is_empty() {
            return Ok(0);
        }
        bounded(digits.parse().ok())
    }

    fn next_value(&mut self) -> Result<Value> {
        let value = self.values.get(self.used).cloned();
        self.used += 1;
        value.map_or_else(|| fail("`%` has too few values for its text"), Ok)
    }

    fn write(&self, out: &mut Builder, kind: char, mut spec: Spec, value: &Value) -> Result<()> {
        match kind {
            's' | 'r' | 'a' => {
                let text = match kind {
                    's' if self.markup && value.is_markup() => to_text(value)?.as_str().to_owned(),
                    's' if self.markup => escape(to_text(value)?.as_str())?,
                    's' => to_text(value)?.as_str().to_owned(),
                    'r' => repr(value)?,
                    _ => ascii(&repr(value)?),
                };
                let text: String = match spec.precision {
                    Some(precision) => text.chars().take(precision).collect(),
                    None => text,
                };
                spec.zero = false;
                write_padded(out, &spec, "", &text, Alignment::Right)
            }
            'd' | 'i' | 'u' => {
                let value = truncated(value, kind)?;
                integer_field(out, spec, &value, 'd')
            }
            'x' | 'X' | 'o' => match value.as_integer() {
                Some(value) => integer_field(out, spec, &value, kind),
                None => fail(format!(
                    "`%{kind}` takes an integer, not {}",
                    value.described()
                )),
            },
            'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
                let number = match value {
                    Value::Float(value) => *value,
                    other => match other.as_integer() {
                        Some(value) => value.to_f64(),
                        None => {
                            return Err(other.blamed(format!(
                                "`%{kind}` takes a number, not {}",
                                other.described()
                            )));
                        }
                    },
                };
                write_float(out, &spec, number, kind)
            }
            'c' => match value {
                Value::Text(text) if text.char_count() == 1 => {
                    write_padded(out, &spec, "", text.as_str(), Alignment::Right)
                }
                other => {
                    let code = other.as_integer().and_then(|value| value.to_i64());
                    let c = code
                        .and_then(|code| u32::try_from(code).ok())
                        .and_then(char::from_u32);
                    match c {
                        Some(c) => write_padded(out, &spec, "", &c.to_string(), Alignment::Right),
                        None => fail("`%c` takes a character"),
                    }
                }
            },
            other => fail(format!("`%{other}` is no field")),
        }
    }
}

fn bounded(size: Option<usize>) -> Result<usize> {
    match size {
        Some(size) if size <= MAX_WIDTH => Ok(size),
        _ => fail("a width is too large"),
    }
}

fn truncated(value: &Value, kind: char) -> Result<Integer> {
    let integer = match value {
        Value::Float(value) => Integer::from_f64(*value),
        other => other.as_integer(),
    };
    integer.ok_or_else(|| {
        value.blamed(format!(
            "`%{kind}` takes a number, not {}",
            value.described()
        ))
    })
}

fn integer_field(out: &mut Builder, spec: Spec, value: &Integer, kind: char) -> Result<()> {
    let (prefix, mut digits) = integer_digits(value, kind, &spec);
    if let Some(precision) = spec.precision {
        let missing = precision.saturating_sub(digits.len());
        digits = "0".repeat(missing) + &digits;
    }
    write_padded(out, &spec, &prefix, &digits, Alignment::Right)
}

/// `ascii(value)` from its `repr`.
fn ascii(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match u32::from(c) {
            _ if c.is_ascii() && is_printable(c) => out.push(c),
            code @ ..=0xff => out.push_str(&format!("\\x{code:02x}")),
            code @ ..=0xffff => out.push_str(&format!("\\u{code:04x}")),
            code => out.push_str(&format!("\\U{code:08x}")),
        }
    }
    out
}
