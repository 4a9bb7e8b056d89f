//! The format of one field: `[[fill]align][sign][#][0][width][,][.precision][type]`.

use super::super::failure::{Result, fail};
use super::super::print::{float, to_text};
use super::super::value::{Builder, Value};
use super::numbers::{integer_digits, write_float};

/// Widest field that is written.
const MAX_WIDTH: usize = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alignment {
    Left,
    Right,
    Center,
    /// Between the sign and the digits.
    AfterSign,
}

#[derive(Clone, Debug)]
pub struct Spec {
    pub fill: char,
    pub align: Option<Alignment>,
    /// `-`, `+` or a space.
    pub sign: char,
    pub alternate: bool,
    pub zero: bool,
    pub width: usize,
    pub group: Option<char>,
    pub precision: Option<usize>,
    pub kind: Option<char>,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            fill: ' ',
            align: None,
            sign: '-',
            alternate: false,
            zero: false,
            width: 0,
            group: None,
            precision: None,
            kind: None,
        }
    }
}

impl Spec {
    fn parse(text: &str) -> Result<Self> {
        let mut spec = Self::default();
        let mut chars: Vec<char> = text.chars().collect();
        chars.reverse();
        let align_of = |c: Option<&char>| match c {
            Some('<') => Some(Alignment::Left),
            Some('>') => Some(Alignment::Right),
            Some('^') => Some(Alignment::Center),
            Some('=') => Some(Alignment::AfterSign),
            _ => None,
        };
        let second = chars.len().checked_sub(2).and_then(|at| chars.get(at));
        if let Some(align) = align_of(second) {
            spec.align = Some(align);
            spec.fill = chars.pop().unwrap_or(' ');
            chars.pop();
        } else if let Some(align) = align_of(chars.last()) {
            spec.align = Some(align);
            chars.pop();
        }
        if let Some(sign) = chars.pop_if(|c| matches!(c, '+' | '-' | ' ')) {
            spec.sign = sign;
        }
        spec.alternate = chars.pop_if(|c| *c == '#').is_some();
        spec.zero = chars.pop_if(|c| *c == '0').is_some();
        spec.width = number(&mut chars)?.unwrap_or(0);
        spec.group = chars.pop_if(|c| matches!(c, ',' | '_'));
        if chars.pop_if(|c| *c == '.').is_some() {
            spec.precision = number(&mut chars)?;
            if spec.precision.is_none() {
                return fail("a format has a point without a precision");
            }
        }
        spec.kind = chars.pop();
        if !chars.is_empty() {
            return fail(format!("{text:?} is no format"));
        }
        Ok(spec)
    }
}

fn number(chars: &mut Vec<char>) -> Result<Option<usize>> {
    let mut number = None;
    while let Some(digit) = chars.last().and_then(|c| c.to_digit(10)) {
        chars.pop();
        number = Some(number.unwrap_or(0) * 10 + digit as usize);
        if number > Some(MAX_WIDTH) {
            return fail("a width is too large");
        }
    }
    Ok(number)
}

/// `format(value, spec)`
pub(super) fn format_value(value: &Value, spec: &str) -> Result<String> {
    let mut out = Builder::default();
    if spec.is_empty() {
        return Ok(to_text(value)?.as_str().to_owned());
    }
    let spec = Spec::parse(spec)?;
    let unknown = || -> Result<()> {
        fail(format!(
            "{} has no format `{}`",
            value.described(),
            spec.kind.unwrap_or_default()
        ))
    };
    match (value, value.as_integer()) {
        (Value::Text(text), _) => {
            if !matches!(spec.kind, None | Some('s')) || spec.align == Some(Alignment::AfterSign) {
                unknown()?;
            }
            let text: String = match spec.precision {
                Some(precision) => text.as_str().chars().take(precision).collect(),
                None => text.as_str().to_owned(),
            };
            write_padded(&mut out, &spec, "", &text, Alignment::Left)?;
        }
        (_, Some(integer)) => match spec.kind {
            None | Some('d' | 'n' | 'x' | 'X' | 'o' | 'b') => {
                let (sign, digits) = integer_digits(&integer, spec.kind.unwrap_or('d'), &spec);
                write_padded(&mut out, &spec, &sign, &digits, Alignment::Right)?;
            }
            Some('c') => {
                let code = integer.to_i64().and_then(|code| u32::try_from(code).ok());
                match code.and_then(char::from_u32) {
                    Some(c) => write_padded(&mut out, &spec, "", &c.to_string(), Alignment::Left)?,
                    None => return fail("a number is no character"),
                }
            }
            Some(kind @ ('e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%')) => {
                write_float(&mut out, &spec, integer.to_f64(), kind)?;
            }
            _ => unknown()?,
        },
        (Value::Float(number), _) => match (spec.kind, spec.precision) {
            (None, None) => {
                let text = float(number.abs());
                let sign = numbers_sign(number.is_sign_negative() && !number.is_nan(), &spec);
                write_padded(&mut out, &spec, &sign, &text, Alignment::Right)?;
            }
            (Some(kind @ ('e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%' | 'n')), _) => {
                write_float(
                    &mut out,
                    &spec,
                    *number,
                    if kind == 'n' { 'g' } else { kind },
                )?;
            }
            (None, Some(_)) => write_float(&mut out, &spec, *number, 'g')?,
            _ => unknown()?,
        },
        (other, _) => {
            return Err(other.blamed(format!("{} takes no format", other.described())));
        }
    }
    Ok(out.finish())
}

pub(super) fn numbers_sign(negative: bool, spec: &Spec) -> String {
    match (negative, spec.sign) {
        (true, _) => "-".to_owned(),
        (false, '-') => String::new(),
        (false, sign) => sign.to_string(),
    }
}

/// The sign (or prefix) and the text, filled up to the width.
pub fn write_padded(
    out: &mut Builder,
    spec: &Spec,
    sign: &str,
    text: &str,
    default: Alignment,
) -> Result<()> {
    let length = sign.chars().count() + text.chars().count();
    let missing = spec.width.saturating_sub(length);
    let (align, fill) = match (spec.align, spec.zero) {
        (Some(align), _) => (align, spec.fill),
        (None, true) => (Alignment::AfterSign, '0'),
        (None, false) => (default, spec.fill),
    };
    let (before, between, after) = match align {
        Alignment::Left => (0, 0, missing),
        Alignment::Right => (missing, 0, 0),
        Alignment::Center => (missing / 2, 0, missing - missing / 2),
        Alignment::AfterSign => (0, missing, 0),
    };
    let fill = fill.to_string();
    out.repeat(&fill, before)?;
    out.push(sign)?;
    out.repeat(&fill, between)?;
    out.push(text)?;
    out.repeat(&fill, after)
}
