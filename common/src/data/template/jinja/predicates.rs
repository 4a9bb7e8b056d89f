//! Jinja's tests: `value is name(..)`.

use super::arguments::Args;
use super::ast::Comparison;
use super::failure::{Result, fail};
use super::filters;
use super::integer::Integer;
use super::operators::{compare, is_same};
use super::print::to_text;
use super::value::Value;

pub fn test(name: &str, value: &Value, args: Args) -> Result<bool> {
    super::meter::spend(value.work())?;
    if let Some(comparison) = comparison(name) {
        let [other] = args.bind_all(name, ["other"])?;
        return compare(comparison, value, &other);
    }
    match name {
        "divisibleby" => {
            let [divisor] = args.bind_all(name, ["num"])?;
            return divides(value, &divisor);
        }
        "sameas" => {
            let [other] = args.bind_all(name, ["other"])?;
            return Ok(is_same(value, &other));
        }
        _ => args.none(name)?,
    }
    Ok(match name {
        "defined" => !value.is_undefined(),
        "undefined" => value.is_undefined(),
        "none" => value.is_none(),
        "boolean" => matches!(value, Value::Bool(_)),
        "true" => matches!(value, Value::Bool(true)),
        "false" => matches!(value, Value::Bool(false)),
        "integer" => matches!(value, Value::Int(_)),
        "float" => matches!(value, Value::Float(_)),
        "number" => matches!(value, Value::Int(_) | Value::Float(_) | Value::Bool(_)),
        "string" => matches!(value, Value::Text(_)),
        "mapping" => matches!(value, Value::Dict(_)),
        "sequence" => matches!(
            value,
            Value::Text(_)
                | Value::List(_)
                | Value::Tuple(_)
                | Value::Dict(_)
                | Value::Range(_)
                | Value::Undefined(_)
        ),
        "iterable" => value.is_iterable(),
        "callable" => matches!(
            value,
            Value::Callable(_) | Value::Joiner(_) | Value::Loop(_) | Value::Undefined(_)
        ),
        "escaped" => value.is_markup(),
        "odd" => !divides_by_two(value)?,
        "even" => divides_by_two(value)?,
        "lower" => is_case(value, char::is_lowercase, char::is_uppercase)?,
        "upper" => is_case(value, char::is_uppercase, char::is_lowercase)?,
        "filter" => value.as_str().is_some_and(filters::is_filter),
        "test" => value.as_str().is_some_and(is_test),
        _ => return fail(format!("there is no test `{name}`")),
    })
}

fn comparison(name: &str) -> Option<Comparison> {
    Some(match name {
        "==" | "eq" | "equalto" => Comparison::Equal,
        "!=" | "ne" => Comparison::NotEqual,
        "<" | "lt" | "lessthan" => Comparison::Less,
        "<=" | "le" => Comparison::LessOrEqual,
        ">" | "gt" | "greaterthan" => Comparison::Greater,
        ">=" | "ge" => Comparison::GreaterOrEqual,
        "in" => Comparison::In,
        _ => return None,
    })
}

const TESTS: [&str; 20] = [
    "divisibleby",
    "sameas",
    "defined",
    "undefined",
    "none",
    "boolean",
    "true",
    "false",
    "integer",
    "float",
    "number",
    "string",
    "mapping",
    "sequence",
    "iterable",
    "callable",
    "escaped",
    "odd",
    "even",
    "filter",
];

pub fn is_test(name: &str) -> bool {
    comparison(name).is_some()
        || TESTS.contains(&name)
        || ["lower", "upper", "test"].contains(&name)
}

fn divides_by_two(value: &Value) -> Result<bool> {
    divides(value, &Value::Int(Integer::Small(2)))
}

fn divides(value: &Value, divisor: &Value) -> Result<bool> {
    let rest = super::operators::arithmetic(super::ast::Operator::Modulo, value, divisor)?;
    super::operators::equal(&rest, &Value::int(0))
}

/// `str(value).islower()` and `.isupper()`.
fn is_case(value: &Value, wanted: fn(char) -> bool, other: fn(char) -> bool) -> Result<bool> {
    let text = to_text(value)?;
    let chars = || text.as_str().chars();
    Ok(chars().any(wanted) && !chars().any(|c| other(c) || super::characters::is_title(c)))
}
