//! Filters that go through a sequence with another filter or a test.

use super::super::arguments::Args;
use super::super::failure::{Result, fail};
use super::super::interpreter::Interpreter;
use super::super::predicates::test;
use super::super::value::Value;
use super::{dotted, filter};

pub(super) fn map(interpreter: &mut Interpreter, value: &Value, mut args: Args) -> Result<Value> {
    if !value.is_true() {
        return Ok(Value::generator(Vec::new()));
    }
    let by_attribute =
        args.positional.is_empty() && args.keyword.iter().any(|(name, _)| name == "attribute");
    let items = value.items()?;
    let mut mapped = Vec::with_capacity(items.len());
    if by_attribute {
        let [attribute, default] = args.bind("map", ["attribute", "default"])?;
        let attribute = attribute.unwrap_or(Value::None);
        let default = default.filter(|default| !default.is_none());
        for item in items {
            mapped.push(dotted(&item, &attribute, default.as_ref())?);
        }
        return Ok(Value::generator(mapped));
    }
    if args.positional.is_empty() {
        return fail("`map` needs the name of a filter, or `attribute=`");
    }
    let name = args.positional.remove(0);
    let Some(name) = name.as_str() else {
        return fail("`map` needs the name of a filter");
    };
    for item in items {
        mapped.push(filter(interpreter, name, item, args.clone())?);
    }
    Ok(Value::generator(mapped))
}

/// `select`, `reject`, `selectattr` and `rejectattr`.
pub(super) fn select(name: &str, value: &Value, mut args: Args) -> Result<Value> {
    if !value.is_true() {
        return Ok(Value::generator(Vec::new()));
    }
    let attribute = if name.ends_with("attr") {
        if args.positional.is_empty() {
            return fail(format!("`{name}` needs the name of an attribute"));
        }
        Some(args.positional.remove(0))
    } else {
        None
    };
    let predicate = match args.positional.is_empty() {
        true => None,
        false => Some(args.positional.remove(0)),
    };
    let wanted = name.starts_with("select");
    let mut kept = Vec::new();
    for item in value.items()? {
        let looked_at = match &attribute {
            Some(attribute) => dotted(&item, attribute, None)?,
            None => item.clone(),
        };
        let found = match &predicate {
            Some(predicate) => match predicate.as_str() {
                Some(predicate) => test(predicate, &looked_at, args.clone())?,
                None => return fail(format!("`{name}` needs the name of a test")),
            },
            None => looked_at.is_true(),
        };
        if found == wanted {
            kept.push(item);
        }
    }
    Ok(Value::generator(kept))
}
