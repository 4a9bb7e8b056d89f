//! Jinja's filters: `value | name(..)`.

mod escapes;
mod numbers;
mod order;
mod select;
mod sequences;
mod texts;

pub use escapes::strip_tags;

use super::arguments::{Args, truth_or};
use super::failure::{Result, fail};
use super::interpreter::{Interpreter, items};
use super::meter::spend;
use super::value::Value;

/// All that are known, to say so and for the test `filter`.
const FILTERS: [&str; 54] = [
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "filesizeformat",
    "first",
    "float",
    "forceescape",
    "format",
    "groupby",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "pprint",
    "random",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "striptags",
    "sum",
    "title",
    "tojson",
    "trim",
    "truncate",
    "unique",
    "upper",
    "urlencode",
    "urlize",
    "wordcount",
    "wordwrap",
    "xmlattr",
];

/// Filters that Jinja has and templates of chats do not use.
const UNSUPPORTED: [&str; 3] = ["pprint", "random", "urlize"];

pub fn is_filter(name: &str) -> bool {
    FILTERS.contains(&name)
}

pub fn filter(
    interpreter: &mut Interpreter,
    name: &str,
    value: Value,
    args: Args,
) -> Result<Value> {
    spend(value.work())?;
    if UNSUPPORTED.contains(&name) {
        return fail(format!("the filter `{name}` is not known here"));
    }
    match name {
        "default" | "d" => {
            let [default, boolean] = args.bind(name, ["default_value", "boolean"])?;
            let missing =
                value.is_undefined() || (truth_or(boolean.as_ref(), false) && !value.is_true());
            Ok(if missing {
                default.unwrap_or_else(|| Value::text(""))
            } else {
                value
            })
        }
        "length" | "count" => {
            args.none(name)?;
            Ok(Value::int(value.length()?))
        }
        "attr" => {
            let [attribute] = args.bind_all(name, ["name"])?;
            let Some(attribute) = attribute.as_str() else {
                return fail("`attr` takes a name");
            };
            own_attribute(&value, attribute)
        }
        "map" => select::map(interpreter, &value, args),
        "select" | "reject" | "selectattr" | "rejectattr" => select::select(name, &value, args),
        "sort" | "dictsort" | "groupby" | "unique" | "min" | "max" => {
            order::filter(name, &value, args)
        }
        "first" | "last" | "list" | "reverse" | "items" | "batch" | "slice" | "sum" | "join" => {
            sequences::filter(name, &value, args)
        }
        "abs" | "int" | "float" | "round" | "filesizeformat" => numbers::filter(name, &value, args),
        "e" | "escape" | "forceescape" | "safe" | "striptags" | "urlencode" | "xmlattr"
        | "tojson" => escapes::filter(name, &value, args),
        name if is_filter(name) => texts::filter(name, &value, args),
        _ => fail(format!("there is no filter `{name}`")),
    }
}

/// What `getattr` finds, and never an item.
fn own_attribute(value: &Value, name: &str) -> Result<Value> {
    match value {
        Value::Dict(_) => {
            let method = super::methods::method(value, name);
            Ok(method.unwrap_or_else(|| Value::undefined_of(value, name.to_owned())))
        }
        Value::Undefined(_) => Ok(Value::undefined_of(value, name.to_owned())),
        _ => items::attribute(value, name),
    }
}

/// The item that `attribute="a.b.0"` names; `default` where a part of it is undefined.
pub(super) fn dotted(value: &Value, path: &Value, default: Option<&Value>) -> Result<Value> {
    let one = |value: Value, part: &Value| -> Result<Value> {
        let found = items::item(&value, part)?;
        match default {
            Some(default) if found.is_undefined() => Ok(default.clone()),
            _ => Ok(found),
        }
    };
    let Some(text) = path.as_str() else {
        return match path {
            Value::None => Ok(value.clone()),
            path => one(value.clone(), path),
        };
    };
    let mut value = value.clone();
    for part in text.split('.') {
        let is_number = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        let index = match part.parse::<i64>() {
            Ok(index) if is_number => Value::int(index),
            _ => Value::text(part),
        };
        value = one(value, &index)?;
    }
    Ok(value)
}

/// Text without a difference of case, as filters that order compare it.
pub(super) fn ignore_case(value: Value) -> Value {
    match value.as_str() {
        Some(text) => Value::text(text.to_lowercase()),
        None => value,
    }
}
