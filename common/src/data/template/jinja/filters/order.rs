//! Filters that compare the items of a sequence.

use std::cmp::Ordering;

use super::super::arguments::{Args, truth_or};
use super::super::failure::{Failure, Result, fail};
use super::super::meter::spend;
use super::super::operators::{equal, order};
use super::super::value::{Dict, Value, is_hashable};
use super::{dotted, ignore_case};

pub(super) fn filter(name: &str, value: &Value, args: Args) -> Result<Value> {
    match name {
        "sort" => {
            let [reverse, case_sensitive, attribute] =
                args.bind(name, ["reverse", "case_sensitive", "attribute"])?;
            let case_sensitive = truth_or(case_sensitive.as_ref(), false);
            let attribute = attribute.unwrap_or(Value::None);
            // Several attributes, with commas between them, are compared one after the other.
            let parts = match attribute.as_str() {
                Some(text) => text.split(',').map(Value::text).collect(),
                None => vec![attribute],
            };
            let key = |item: &Value| {
                let parts = parts
                    .iter()
                    .map(|part| key_of(item, part, None, case_sensitive));
                Value::list(parts.collect::<Result<_>>()?)
            };
            Value::list(sorted(
                value.items()?,
                key,
                truth_or(reverse.as_ref(), false),
            )?)
        }
        "dictsort" => dictsort(value, args),
        "groupby" => groupby(value, args),
        "unique" => {
            let [case_sensitive, attribute] = args.bind(name, ["case_sensitive", "attribute"])?;
            let case_sensitive = truth_or(case_sensitive.as_ref(), false);
            let attribute = attribute.unwrap_or(Value::None);
            let mut seen = Vec::new();
            let mut kept = Vec::new();
            for item in value.items()? {
                let key = key_of(&item, &attribute, None, case_sensitive)?;
                if !is_hashable(&key) {
                    return Err(key.blamed(format!("`unique` cannot compare {}", key.described())));
                }
                seen.push((key, Value::int(seen.len())));
                kept.push(item);
            }
            let first = Dict::new(seen.iter().rev().cloned())?;
            let is_first = |(key, place): &(Value, Value)| match first.get(key) {
                Some(first) => equal(first, place),
                None => Ok(false),
            };
            let mut unique = Vec::new();
            for (pair, item) in seen.iter().zip(kept) {
                if is_first(pair)? {
                    unique.push(item);
                }
            }
            Ok(Value::generator(unique))
        }
        _ => extreme(name, value, args),
    }
}

fn key_of(
    item: &Value,
    attribute: &Value,
    default: Option<&Value>,
    case_sensitive: bool,
) -> Result<Value> {
    let key = dotted(item, attribute, default)?;
    Ok(if case_sensitive {
        key
    } else {
        ignore_case(key)
    })
}

fn extreme(name: &str, value: &Value, args: Args) -> Result<Value> {
    let [case_sensitive, attribute] = args.bind(name, ["case_sensitive", "attribute"])?;
    let case_sensitive = truth_or(case_sensitive.as_ref(), false);
    let attribute = attribute.unwrap_or(Value::None);
    let wanted = if name == "min" {
        Ordering::Less
    } else {
        Ordering::Greater
    };
    let mut found: Option<(Value, Value)> = None;
    for item in value.items()? {
        let key = key_of(&item, &attribute, None, case_sensitive)?;
        let better = match &found {
            Some((best, _)) => order(&key, best)? == Some(wanted),
            None => true,
        };
        if better {
            found = Some((key, item));
        }
    }
    Ok(found.map_or_else(
        || Value::undefined_hint(format!("`{name}` has nothing to choose from")),
        |(_, item)| item,
    ))
}

fn dictsort(value: &Value, args: Args) -> Result<Value> {
    let [case_sensitive, by, reverse] =
        args.bind("dictsort", ["case_sensitive", "by", "reverse"])?;
    let case_sensitive = truth_or(case_sensitive.as_ref(), false);
    let place = match by.as_ref().map(Value::as_str) {
        None | Some(Some("key")) => 0,
        Some(Some("value")) => 1,
        _ => return fail("`dictsort` sorts by \"key\" or by \"value\""),
    };
    let Value::Dict(dict) = value else {
        return Err(value.blamed(format!(
            "`dictsort` takes an object, not {}",
            value.described()
        )));
    };
    let key = |item: &Value| key_of(item, &Value::int(place), None, case_sensitive);
    Value::list(sorted(
        dict.items()?,
        key,
        truth_or(reverse.as_ref(), false),
    )?)
}

fn groupby(value: &Value, args: Args) -> Result<Value> {
    let [attribute, default, case_sensitive] =
        args.bind("groupby", ["attribute", "default", "case_sensitive"])?;
    let Some(attribute) = attribute else {
        return fail("`groupby` needs an attribute");
    };
    let default = default.filter(|default| !default.is_none());
    let case_sensitive = truth_or(case_sensitive.as_ref(), false);
    let key = |item: &Value| key_of(item, &attribute, default.as_ref(), case_sensitive);
    let mut groups: Vec<(Value, Vec<Value>)> = Vec::new();
    for item in sorted(value.items()?, key, false)? {
        let this = key(&item)?;
        match groups.last_mut() {
            Some((last, items)) if equal(last, &this)? => items.push(item),
            _ => groups.push((this, vec![item])),
        }
    }
    let groups = groups.into_iter().map(|(key, items)| {
        let grouper = match items.first() {
            Some(first) if !case_sensitive => dotted(first, &attribute, default.as_ref())?,
            _ => key,
        };
        Value::tuple(vec![grouper, Value::list(items)?])
    });
    Value::list(groups.collect::<Result<_>>()?)
}

/// `sorted(items, key=key, reverse=reverse)`: equal ones stay as they were.
fn sorted(
    items: Vec<Value>,
    key: impl Fn(&Value) -> Result<Value>,
    reverse: bool,
) -> Result<Vec<Value>> {
    spend(items.len() * (items.len().max(2).ilog2() as usize))?;
    let mut keyed = Vec::with_capacity(items.len());
    for item in items {
        keyed.push((key(&item)?, item));
    }
    let mut failed: Option<Box<Failure>> = None;
    keyed.sort_by(|(a, _), (b, _)| match order(a, b) {
        Ok(found) => {
            let found = found.unwrap_or(Ordering::Equal);
            if reverse { found.reverse() } else { found }
        }
        Err(failure) => {
            failed.get_or_insert(failure);
            Ordering::Equal
        }
    });
    match failed {
        Some(failure) => Err(failure),
        None => Ok(keyed.into_iter().map(|(_, item)| item).collect()),
    }
}
