//! Filters of numbers.

use super::super::arguments::{Args, count_or, text_or, truth_or};
use super::super::ast::Operator;
use super::super::characters::{decimal_digit, trim};
use super::super::failure::{Result, fail};
use super::super::integer::Integer;
use super::super::operators::{arithmetic, negate};
use super::super::value::Value;

pub(super) fn filter(name: &str, value: &Value, args: Args) -> Result<Value> {
    match name {
        "abs" => {
            args.none(name)?;
            match value {
                Value::Float(value) => Ok(Value::Float(value.abs())),
                other => {
                    match other.as_integer() {
                        Some(value) if value.is_negative() => negate(&Value::Int(value)),
                        Some(value) => Ok(Value::Int(value)),
                        None => Err(other
                            .blamed(format!("`abs` takes a number, not {}", other.described()))),
                    }
                }
            }
        }
        "int" => {
            let [default, base] = args.bind(name, ["default", "base"])?;
            let base = count_or(base.as_ref(), 10, "the base of `int`")?;
            let found = to_integer(value, base)?;
            Ok(found.map_or_else(|| default.unwrap_or_else(|| Value::int(0)), Value::Int))
        }
        "float" => {
            let [default] = args.bind(name, ["default"])?;
            let found = to_float(value)?;
            Ok(found.map_or_else(|| default.unwrap_or(Value::Float(0.0)), Value::Float))
        }
        "round" => round(value, args),
        _ => file_size(value, args),
    }
}

/// `int(value)`; None where Jinja takes its default.
fn to_integer(value: &Value, base: i64) -> Result<Option<Integer>> {
    match value {
        Value::Undefined(undefined) => Err(value.blamed(undefined.reason())),
        Value::Text(text) => {
            let text = ascii_digits(trim(text.as_str()));
            let whole = match base {
                10 => plain_digits(&text).and_then(|digits| Integer::parse(&digits)),
                base => parse_in_base(&text, base),
            };
            Ok(whole.or_else(|| parse_float(&text).and_then(Integer::from_f64)))
        }
        Value::Float(value) if value.is_infinite() => fail("`int` of infinity"),
        Value::Float(value) => Ok(Integer::from_f64(*value)),
        other => Ok(other.as_integer()),
    }
}

fn parse_in_base(text: &str, base: i64) -> Option<Integer> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = digits.to_lowercase();
    let (base, digits) = match (base, lower.get(..2)) {
        (0 | 16, Some("0x")) => (16, &lower[2..]),
        (0 | 8, Some("0o")) => (8, &lower[2..]),
        (0 | 2, Some("0b")) => (2, &lower[2..]),
        (0, _) => (10, lower.as_str()),
        (base, _) => (base, lower.as_str()),
    };
    let base = u32::try_from(base)
        .ok()
        .filter(|base| (2..=36).contains(base))?;
    let value = i128::from_str_radix(&plain_digits_of(digits, base)?, base).ok()?;
    Some(Integer::from_i128(if negative { -value } else { value }))
}

/// Digits without the single underscores that may be between them.
fn plain_digits(text: &str) -> Option<String> {
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    let digits = plain_digits_of(unsigned, 10)?;
    Some(if text.starts_with('-') {
        format!("-{digits}")
    } else {
        digits
    })
}

fn plain_digits_of(text: &str, base: u32) -> Option<String> {
    let fits = text
        .split('_')
        .all(|part| !part.is_empty() && part.chars().all(|c| c.is_digit(base)));
    fits.then(|| text.replace('_', ""))
}

/// Decimal digits of any script as those of ASCII.
fn ascii_digits(text: &str) -> String {
    let digit = |c: char| decimal_digit(c).and_then(|digit| char::from_digit(digit, 10));
    text.chars().map(|c| digit(c).unwrap_or(c)).collect()
}

fn to_float(value: &Value) -> Result<Option<f64>> {
    match value {
        Value::Undefined(undefined) => Err(value.blamed(undefined.reason())),
        Value::Text(text) => Ok(parse_float(&ascii_digits(trim(text.as_str())))),
        Value::Float(value) => Ok(Some(*value)),
        other => Ok(other.as_integer().map(|value| value.to_f64())),
    }
}

/// `float(text)`
fn parse_float(text: &str) -> Option<f64> {
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text).to_lowercase();
    if ["inf", "infinity", "nan"].contains(&unsigned.as_str()) {
        return text.parse().ok();
    }
    let starts_well = unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.');
    let digits = unsigned.replace('_', "");
    let grouped = plain_digits_of(unsigned.split(['.', 'e']).next().unwrap_or(""), 10);
    if !starts_well || (digits.len() < unsigned.len() && grouped.is_none()) {
        return None;
    }
    let value: f64 = digits.parse().ok()?;
    Some(if text.starts_with('-') { -value } else { value })
}

fn round(value: &Value, args: Args) -> Result<Value> {
    let [precision, method] = args.bind("round", ["precision", "method"])?;
    let precision = count_or(precision.as_ref(), 0, "the precision of `round`")?;
    let method = text_or(method.as_ref(), "common", "the method of `round`")?;
    let float = match value {
        Value::Float(value) => *value,
        other => match other.as_integer() {
            Some(value) => value.to_f64(),
            None => {
                return Err(
                    other.blamed(format!("`round` takes a number, not {}", other.described()))
                );
            }
        },
    };
    match (method, value.as_integer()) {
        ("common", Some(integer)) if precision >= 0 => Ok(Value::Int(integer)),
        ("common", Some(integer)) => round_integer(&integer, precision.unsigned_abs()),
        // Correctly rounded, halves to even, as CPython's round does it.
        ("common", None) if precision >= 0 => {
            let digits = precision.min(400) as usize;
            Ok(Value::Float(
                format!("{float:.digits$}").parse().unwrap_or(float),
            ))
        }
        ("common", None) => match Integer::from_f64(float) {
            Some(_) => {
                let unit = 10_f64.powi(precision.unsigned_abs().min(400) as i32);
                Ok(Value::Float((float / unit).round_ties_even() * unit))
            }
            None => Ok(Value::Float(float)),
        },
        ("ceil" | "floor", _) => {
            let scale = 10_f64.powi(precision.clamp(-400, 400) as i32);
            let scaled = float * scale;
            let rounded = if method == "ceil" {
                scaled.ceil()
            } else {
                scaled.floor()
            };
            let rounded = Integer::from_f64(rounded);
            let rounded = rounded.map_or_else(|| fail("`round` of infinity"), Ok)?;
            let scale = match precision {
                0.. => Value::Int(Integer::Small(10).power(precision.min(4000) as u32)?),
                _ => Value::Float(scale),
            };
            arithmetic(Operator::Divide, &Value::Int(rounded), &scale)
        }
        _ => fail("`round` rounds by \"common\", \"ceil\" or \"floor\""),
    }
}

/// To a power of ten, halves to even.
fn round_integer(value: &Integer, digits: u64) -> Result<Value> {
    if digits > 4000 {
        return Ok(Value::int(0));
    }
    let unit = Integer::Small(10).power(digits as u32)?;
    let Some((quotient, rest)) = value.divide(&unit) else {
        return Ok(Value::int(0));
    };
    let twice = rest.add(&rest)?;
    let is_odd = quotient
        .divide(&Integer::Small(2))
        .is_some_and(|(_, rest)| !rest.is_zero());
    let up = twice > unit || (twice == unit && is_odd);
    let quotient = quotient.add(&Integer::Small(i64::from(up)))?;
    Ok(Value::Int(quotient.multiply(&unit)?))
}

fn file_size(value: &Value, args: Args) -> Result<Value> {
    let [binary] = args.bind("filesizeformat", ["binary"])?;
    let binary = truth_or(binary.as_ref(), false);
    let Some(bytes) = to_float(value)? else {
        return Err(value.blamed("`filesizeformat` takes a number".to_owned()));
    };
    let base: f64 = if binary { 1024.0 } else { 1000.0 };
    if bytes == 1.0 {
        return Ok(Value::text("1 Byte"));
    }
    if bytes < base {
        return Ok(Value::text(format!("{bytes:.0} Bytes")));
    }
    let letters = ["k", "M", "G", "T", "P", "E", "Z", "Y"];
    let mut unit = base * base;
    for (index, letter) in letters.iter().enumerate() {
        if bytes < unit || index + 1 == letters.len() {
            let (letter, end) = match (*letter, binary) {
                ("k", true) => ("K", "iB"),
                (letter, true) => (letter, "iB"),
                (letter, false) => (letter, "B"),
            };
            return Ok(Value::text(format!(
                "{:.1} {letter}{end}",
                base * bytes / unit
            )));
        }
        unit *= base;
    }
    fail("`filesizeformat` of a number that is too large")
}
