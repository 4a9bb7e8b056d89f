//! Methods of Python's types, as far as templates may call them.

mod strings;

pub use strings::{adjusted, replace, split_lines, stripped};

use std::sync::Arc;

use super::arguments::Args;
use super::callable::Callable;
use super::failure::{Result, fail};
use super::format;
use super::integer::Integer;
use super::operators::equal;
use super::value::{Dict, Part, Value, View};

const DICT: [&str; 6] = ["get", "items", "keys", "values", "copy", "fromkeys"];
const LIST: [&str; 3] = ["index", "count", "copy"];
const TUPLE: [&str; 2] = ["index", "count"];
const INTEGER: [&str; 5] = [
    "bit_length",
    "bit_count",
    "conjugate",
    "is_integer",
    "as_integer_ratio",
];
const FLOAT: [&str; 2] = ["is_integer", "conjugate"];

/// Methods that change what they are called on, which Transformers' sandbox forbids.
const CHANGES_DICT: [&str; 5] = ["clear", "pop", "popitem", "setdefault", "update"];
const CHANGES_LIST: [&str; 8] = [
    "append", "clear", "pop", "reverse", "insert", "sort", "extend", "remove",
];

/// The method of this name, bound to the value.
pub fn method(value: &Value, name: &str) -> Option<Value> {
    has(value, name).then(|| {
        Value::Callable(Arc::new(Callable::Method {
            receiver: value.clone(),
            name: name.to_owned(),
        }))
    })
}

/// Whether Python's object has something by this name, which is then not looked for among its items.
pub fn is_own(value: &Value, name: &str) -> bool {
    has(value, name) || is_forbidden(value, name)
}

/// Whether the value has a method of this name.
pub fn has(value: &Value, name: &str) -> bool {
    let known: &[&str] = match value {
        Value::Text(_) => &strings::METHODS,
        Value::Dict(_) => &DICT,
        Value::List(_) => &LIST,
        Value::Tuple(_) | Value::Range(_) => &TUPLE,
        Value::Int(_) | Value::Bool(_) => &INTEGER,
        Value::Float(_) => &FLOAT,
        Value::Loop(_) => &["cycle", "changed"],
        Value::Cycler(_) => &["next", "reset"],
        _ => &[],
    };
    known.contains(&name)
}

pub fn is_forbidden(value: &Value, name: &str) -> bool {
    match value {
        Value::Dict(_) => CHANGES_DICT.contains(&name),
        Value::List(_) => CHANGES_LIST.contains(&name),
        _ => false,
    }
}

pub fn call(receiver: &Value, name: &str, args: Args) -> Result<Value> {
    super::meter::spend(receiver.work())?;
    match receiver {
        Value::Text(text) => match name {
            "format" => format::format(text, &args),
            _ => strings::call(text, name, args),
        },
        Value::Dict(dict) => call_dict(receiver, dict, name, args),
        Value::List(items) | Value::Tuple(items) if name != "copy" => search(items, name, args),
        Value::List(_) => args.none(name).map(|()| receiver.clone()),
        Value::Range(range) => search(&range.items(), name, args),
        Value::Float(value) => {
            args.none(name)?;
            Ok(match name {
                "is_integer" => Value::Bool(value.fract() == 0.0 && value.is_finite()),
                _ => receiver.clone(),
            })
        }
        _ => {
            args.none(name)?;
            let Some(value) = receiver.as_integer() else {
                return fail(format!("there is no method `{name}`"));
            };
            call_integer(value, name)
        }
    }
}

fn call_dict(receiver: &Value, dict: &Dict, name: &str, args: Args) -> Result<Value> {
    let view = |part| {
        Value::View(View {
            dict: dict.clone(),
            part,
        })
    };
    match name {
        "get" => {
            let [key, default] = args.bind("get", ["key", "default"])?;
            let Some(key) = key else {
                return fail("`get` needs a key");
            };
            if !super::value::is_hashable(&key) {
                return fail(format!("{} cannot be a key", key.described()));
            }
            let found = dict.get(&key).cloned();
            Ok(found.or(default).unwrap_or(Value::None))
        }
        "fromkeys" => {
            let [keys, value] = args.bind("fromkeys", ["iterable", "value"])?;
            let value = value.unwrap_or(Value::None);
            let keys = keys.map_or_else(|| fail("`fromkeys` needs keys"), |keys| keys.items())?;
            let pairs = keys.into_iter().map(|key| (key, value.clone()));
            Ok(Value::Dict(Dict::new(pairs)?))
        }
        "items" => args.none(name).map(|()| view(Part::Items)),
        "keys" => args.none(name).map(|()| view(Part::Keys)),
        "values" => args.none(name).map(|()| view(Part::Values)),
        _ => args.none(name).map(|()| receiver.clone()),
    }
}

fn search(items: &[Value], name: &str, args: Args) -> Result<Value> {
    let [wanted, start, stop] = args.bind(name, ["value", "start", "stop"])?;
    let Some(wanted) = wanted else {
        return fail(format!("`{name}` needs a value"));
    };
    let length = items.len() as i64;
    let bound = |given: Option<Value>, default: i64| -> Result<usize> {
        let bound = given.map_or(Ok(default), |value| value.to_count("a bound of `index`"))?;
        let bound = if bound < 0 {
            bound.saturating_add(length)
        } else {
            bound
        };
        Ok(bound.clamp(0, length) as usize)
    };
    let (start, stop) = (bound(start, 0)?, bound(stop, length)?);
    let mut found = Vec::new();
    for (at, item) in items.iter().enumerate().take(stop).skip(start) {
        if equal(item, &wanted)? {
            found.push(at);
        }
    }
    match (name, found.first()) {
        ("count", _) => Ok(Value::int(found.len())),
        (_, Some(at)) => Ok(Value::int(*at)),
        (_, None) => fail(format!(
            "{} is not in the list",
            super::print::repr(&wanted)?
        )),
    }
}

fn call_integer(value: Integer, name: &str) -> Result<Value> {
    let bits = || value.magnitude_in(2);
    Ok(match name {
        "bit_length" if value.is_zero() => Value::int(0),
        "bit_length" => Value::int(bits().len()),
        "bit_count" => Value::int(bits().matches('1').count()),
        "is_integer" => Value::Bool(true),
        "as_integer_ratio" => Value::tuple(vec![Value::Int(value), Value::int(1)])?,
        _ => Value::Int(value),
    })
}
