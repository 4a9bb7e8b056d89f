//! Operators, as Python defines them for the values that templates have.

use std::cmp::Ordering;

use super::ast::{Comparison, Operator};
use super::failure::{Failure, Result, fail, failure};
use super::integer::Integer;
use super::meter::{reserve, spend};
use super::percent;
use super::print;
use super::value::{Builder, Generator, Text, Value};

/// [`arithmetic`] on a value that may be used up: text grows at its end.
pub fn apply(operator: Operator, mut left: Value, right: &Value) -> Result<Value> {
    if let (Operator::Add, Value::Text(text), Value::Text(more)) = (operator, &mut left, right)
        && text.append(more)?
    {
        return Ok(left);
    }
    arithmetic(operator, &left, right)
}

pub fn arithmetic(operator: Operator, left: &Value, right: &Value) -> Result<Value> {
    if let Some(result) = numeric(operator, left, right)? {
        return Ok(result);
    }
    match (operator, left, right) {
        (Operator::Add, Value::Text(a), Value::Text(b)) => Ok(Value::Text(add_texts(a, b)?)),
        (Operator::Add, Value::List(a), Value::List(b)) => Value::list(joined(a, b)?),
        (Operator::Add, Value::Tuple(a), Value::Tuple(b)) => Value::tuple(joined(a, b)?),
        (Operator::Multiply, sequence, count) if is_sequence(sequence) => repeated(sequence, count),
        (Operator::Multiply, count, sequence) if is_sequence(sequence) => repeated(sequence, count),
        (Operator::Modulo, Value::Text(format), values) => percent::format(format, values),
        _ => Err(unsupported(operator, left, right)),
    }
}

fn unsupported(operator: Operator, left: &Value, right: &Value) -> Box<Failure> {
    let sign = match operator {
        Operator::Add => "+",
        Operator::Subtract => "-",
        Operator::Multiply => "*",
        Operator::Divide => "/",
        Operator::FloorDivide => "//",
        Operator::Modulo => "%",
        Operator::Power => "**",
    };
    for value in [left, right] {
        if value.is_undefined() {
            let other = if std::ptr::eq(value, left) {
                right
            } else {
                left
            };
            let text = format!(
                "{} where `{sign}` needs a value beside {}",
                value.described(),
                other.described()
            );
            return value.blamed(text);
        }
    }
    let text = format!(
        "`{sign}` does not fit {} and {}",
        left.described(),
        right.described()
    );
    failure(text).blaming(left).blaming(right)
}

fn is_sequence(value: &Value) -> bool {
    matches!(value, Value::Text(_) | Value::List(_) | Value::Tuple(_))
}

fn add_texts(a: &Text, b: &Text) -> Result<Text> {
    let markup = a.is_markup() || b.is_markup();
    if !markup {
        let length = a.as_str().len() + b.as_str().len();
        reserve(length.saturating_mul(2))?;
        // More is often put behind it.
        let mut text = String::with_capacity(length.saturating_mul(2));
        text.push_str(a.as_str());
        text.push_str(b.as_str());
        return Ok(Text::new(text));
    }
    let mut out = Builder::default();
    for part in [a, b] {
        if markup && !part.is_markup() {
            out.push(&print::escape(part.as_str())?)?;
        } else {
            out.push(part.as_str())?;
        }
    }
    Ok(Text::with_markup(out.finish(), markup))
}

fn joined(a: &[Value], b: &[Value]) -> Result<Vec<Value>> {
    let length = a.len() + b.len();
    spend(length)?;
    reserve(length * size_of::<Value>())?;
    Ok(a.iter().chain(b).cloned().collect())
}

fn repeated(sequence: &Value, count: &Value) -> Result<Value> {
    let Some(count) = count.as_integer() else {
        return Err(unsupported(Operator::Multiply, sequence, count));
    };
    let count = match count.to_i64() {
        Some(count) => usize::try_from(count).unwrap_or(0),
        None if count.is_negative() => 0,
        None => usize::MAX,
    };
    let items = |list: &[Value]| -> Result<Vec<Value>> {
        let length = list.len().saturating_mul(count);
        spend(length)?;
        reserve(length.saturating_mul(size_of::<Value>()))?;
        let mut items = Vec::with_capacity(length);
        for _ in 0..if list.is_empty() { 0 } else { count } {
            items.extend_from_slice(list);
        }
        Ok(items)
    };
    match sequence {
        Value::Text(text) => {
            let mut out = Builder::default();
            if !text.as_str().is_empty() {
                out.repeat(text.as_str(), count)?;
            }
            Ok(Value::Text(Text::with_markup(
                out.finish(),
                text.is_markup(),
            )))
        }
        Value::Tuple(list) => Value::tuple(items(list)?),
        Value::List(list) => Value::list(items(list)?),
        _ => fail("only text and lists can be repeated"),
    }
}

enum Number {
    Int(Integer),
    Float(f64),
}

fn number(value: &Value) -> Option<Number> {
    match value {
        Value::Float(value) => Some(Number::Float(*value)),
        other => other.as_integer().map(Number::Int),
    }
}

fn numeric(operator: Operator, left: &Value, right: &Value) -> Result<Option<Value>> {
    let (Some(left), Some(right)) = (number(left), number(right)) else {
        return Ok(None);
    };
    let value = match (left, right) {
        (Number::Int(a), Number::Int(b)) => integers(operator, &a, &b)?,
        (a, b) => {
            let float = |number| match number {
                Number::Int(value) => value.to_f64(),
                Number::Float(value) => value,
            };
            floats(operator, float(a), float(b))?
        }
    };
    Ok(Some(value))
}

fn division_by_zero() -> Box<Failure> {
    failure("a division by zero")
}

fn integers(operator: Operator, a: &Integer, b: &Integer) -> Result<Value> {
    if let (Integer::Large(_), Operator::FloorDivide | Operator::Modulo) = (a, operator) {
        // A digit of the quotient takes thirty products.
        spend(a.digit_count() * b.digit_count() * 16)?;
    }
    Ok(Value::Int(match operator {
        Operator::Add => a.add(b)?,
        Operator::Subtract => a.subtract(b)?,
        Operator::Multiply => a.multiply(b)?,
        Operator::Divide => return floats(operator, a.to_f64(), b.to_f64()),
        Operator::FloorDivide => a.divide(b).ok_or_else(division_by_zero)?.0,
        Operator::Modulo => a.divide(b).ok_or_else(division_by_zero)?.1,
        Operator::Power if b.is_negative() => return floats(operator, a.to_f64(), b.to_f64()),
        Operator::Power => {
            let small = a.to_i64().is_some_and(|a| (-1..=1).contains(&a));
            match b.to_i64().and_then(|b| u32::try_from(b).ok()) {
                Some(exponent) if small || exponent < 20_000 => a.power(if small {
                    exponent % 2 + 2 * u32::from(exponent > 1)
                } else {
                    exponent
                })?,
                _ => return fail("a power is too large"),
            }
        }
    }))
}

fn floats(operator: Operator, a: f64, b: f64) -> Result<Value> {
    let divides = matches!(
        operator,
        Operator::Divide | Operator::FloorDivide | Operator::Modulo
    );
    if divides && b == 0.0 {
        return Err(division_by_zero());
    }
    // As CPython's float_floor_div and float_rem.
    let modulo = || {
        let rest = a % b;
        if rest != 0.0 && (b < 0.0) != (rest < 0.0) {
            rest + b
        } else if rest == 0.0 {
            0.0_f64.copysign(b)
        } else {
            rest
        }
    };
    Ok(Value::Float(match operator {
        Operator::Add => a + b,
        Operator::Subtract => a - b,
        Operator::Multiply => a * b,
        Operator::Divide => a / b,
        Operator::FloorDivide => {
            let quotient = (a - modulo()) / b;
            let floor = quotient.floor();
            if quotient - floor > 0.5 {
                floor + 1.0
            } else {
                floor
            }
        }
        Operator::Modulo => modulo(),
        Operator::Power if a == 0.0 && b < 0.0 => return Err(division_by_zero()),
        Operator::Power if a < 0.0 && b.fract() != 0.0 && b.is_finite() => {
            return fail("a fractional power of a negative number");
        }
        Operator::Power => {
            let value = a.powf(b);
            if value.is_infinite() && a.is_finite() && b.is_finite() {
                return fail("a power is too large");
            }
            value
        }
    }))
}

pub fn negate(value: &Value) -> Result<Value> {
    match number(value) {
        Some(Number::Int(value)) => Ok(Value::Int(value.negated())),
        Some(Number::Float(value)) => Ok(Value::Float(-value)),
        None => Err(value.blamed(format!("`-` does not fit {}", value.described()))),
    }
}

pub fn plus(value: &Value) -> Result<Value> {
    match number(value) {
        Some(Number::Int(value)) => Ok(Value::Int(value)),
        Some(Number::Float(value)) => Ok(Value::Float(value)),
        None => Err(value.blamed(format!("`+` does not fit {}", value.described()))),
    }
}

pub fn compare(comparison: Comparison, left: &Value, right: &Value) -> Result<bool> {
    match comparison {
        Comparison::Equal => equal(left, right),
        Comparison::NotEqual => Ok(!equal(left, right)?),
        Comparison::In => contains(right, left),
        Comparison::NotIn => Ok(!contains(right, left)?),
        ordering => {
            let found = order(left, right)?;
            Ok(match ordering {
                Comparison::Less => found == Some(Ordering::Less),
                Comparison::LessOrEqual => found.is_some_and(Ordering::is_le),
                Comparison::Greater => found == Some(Ordering::Greater),
                _ => found.is_some_and(Ordering::is_ge),
            })
        }
    }
}

/// `left == right`
pub fn equal(left: &Value, right: &Value) -> Result<bool> {
    spend(1)?;
    if let (Some(left), Some(right)) = (number(left), number(right)) {
        return Ok(order_numbers(&left, &right) == Some(Ordering::Equal));
    }
    Ok(match (left, right) {
        (Value::Undefined(_), Value::Undefined(_)) | (Value::None, Value::None) => true,
        (Value::Text(a), Value::Text(b)) => {
            spend(a.as_str().len().min(b.as_str().len()) / 64)?;
            a.as_str() == b.as_str()
        }
        (Value::List(a), Value::List(b)) | (Value::Tuple(a), Value::Tuple(b)) => {
            if a.len() != b.len() {
                return Ok(false);
            }
            for (a, b) in a.iter().zip(b.iter()) {
                if !equal(a, b)? {
                    return Ok(false);
                }
            }
            true
        }
        (Value::Dict(a), Value::Dict(b)) => {
            if a.len() != b.len() {
                return Ok(false);
            }
            for (key, value) in a.pairs() {
                let Some(other) = b.get(key) else {
                    return Ok(false);
                };
                if !equal(value, other)? {
                    return Ok(false);
                }
            }
            true
        }
        (Value::Range(a), Value::Range(b)) => {
            let bounds = |range: &super::value::Range| {
                let step = if range.len() > 1 { range.step } else { 0 };
                (
                    range.len(),
                    if range.len() > 0 { range.start } else { 0 },
                    step,
                )
            };
            bounds(a) == bounds(b)
        }
        _ => is_same(left, right),
    })
}

/// `left is right`, as the test `sameas` asks it.
pub fn is_same(left: &Value, right: &Value) -> bool {
    match (left, right) {
        (Value::None, Value::None) => true,
        (Value::Bool(a), Value::Bool(b)) => a == b,
        (Value::Int(a), Value::Int(b)) => a == b,
        (Value::Float(a), Value::Float(b)) => a.to_bits() == b.to_bits(),
        (Value::Text(a), Value::Text(b)) => a.is_same(b) || a.as_str() == b.as_str(),
        (Value::List(a), Value::List(b)) | (Value::Tuple(a), Value::Tuple(b)) => a.is_same(b),
        (Value::Dict(a), Value::Dict(b)) => a.is_same(b),
        (Value::Namespace(a), Value::Namespace(b)) => a.is_same(b),
        (Value::Generator(a), Value::Generator(b)) => Generator::is_same(a, b),
        (Value::Undefined(a), Value::Undefined(b)) => std::sync::Arc::ptr_eq(a, b),
        (Value::Callable(a), Value::Callable(b)) => std::sync::Arc::ptr_eq(a, b),
        _ => false,
    }
}

fn order_numbers(left: &Number, right: &Number) -> Option<Ordering> {
    let mixed = |integer: &Integer, float: f64| match Integer::from_f64(float) {
        None if float.is_nan() => None,
        None if float > 0.0 => Some(Ordering::Less),
        None => Some(Ordering::Greater),
        Some(whole) => {
            let fraction = 0.0.partial_cmp(&float.fract()).unwrap_or(Ordering::Equal);
            Some(integer.cmp(&whole).then(fraction))
        }
    };
    match (left, right) {
        (Number::Int(a), Number::Int(b)) => Some(a.cmp(b)),
        (Number::Float(a), Number::Float(b)) => a.partial_cmp(b),
        (Number::Int(a), Number::Float(b)) => mixed(a, *b),
        (Number::Float(a), Number::Int(b)) => mixed(b, *a).map(Ordering::reverse),
    }
}

/// How the values are ordered; None where one is no number. Fails where Python knows no order.
pub fn order(left: &Value, right: &Value) -> Result<Option<Ordering>> {
    spend(1)?;
    if let (Some(left), Some(right)) = (number(left), number(right)) {
        return Ok(order_numbers(&left, &right));
    }
    match (left, right) {
        (Value::Text(a), Value::Text(b)) => Ok(Some(a.as_str().cmp(b.as_str()))),
        (Value::List(a), Value::List(b)) | (Value::Tuple(a), Value::Tuple(b)) => {
            for (a, b) in a.iter().zip(b.iter()) {
                if !equal(a, b)? {
                    return order(a, b);
                }
            }
            Ok(Some(a.len().cmp(&b.len())))
        }
        _ => {
            let text = format!(
                "{} and {} cannot be ordered",
                left.described(),
                right.described()
            );
            let undefined = [left, right].into_iter().find(|value| value.is_undefined());
            Err(failure(text)
                .blaming(undefined.unwrap_or(left))
                .blaming(right))
        }
    }
}

/// `item in container`
pub fn contains(container: &Value, item: &Value) -> Result<bool> {
    match (container, item) {
        (Value::Text(text), Value::Text(part)) => {
            spend(text.as_str().len() / 16)?;
            Ok(text.as_str().contains(part.as_str()))
        }
        (Value::Text(_), other) => Err(other.blamed(format!(
            "`in` looks for text in text, not for {}",
            other.described()
        ))),
        (Value::Dict(dict), key) => {
            if !super::value::is_hashable(key) {
                return fail(format!("{} cannot be a key", key.described()));
            }
            Ok(dict.get(key).is_some())
        }
        (Value::Range(range), _) => match item.as_integer().and_then(|item| item.to_i64()) {
            Some(item) => {
                let within = if range.step > 0 {
                    (range.start..range.stop).contains(&item)
                } else {
                    item <= range.start && item > range.stop
                };
                Ok(within
                    && (i128::from(item) - i128::from(range.start)) % i128::from(range.step) == 0)
            }
            None => Ok(false),
        },
        (container, item) if container.is_iterable() => {
            for other in container.items()? {
                if is_same(&other, item) || equal(&other, item)? {
                    return Ok(true);
                }
            }
            Ok(false)
        }
        (other, _) => Err(other.blamed(format!("`in` cannot look into {}", other.described()))),
    }
}
