//! `value.name`, `value[index]` and `value[a:b:c]`.

use std::sync::Arc;

use super::super::callable::{Callable, Function};
use super::super::failure::{Result, fail};
use super::super::meter::{reserve, spend};
use super::super::methods;
use super::super::value::{Builder, Dict, Range, Text, Undefined, Value};

/// `value.name`: what Python's object has by that name, else its item.
pub fn attribute(value: &Value, name: &str) -> Result<Value> {
    if let Some(found) = own_attribute(value, name)? {
        return Ok(found);
    }
    match value {
        Value::Dict(dict) => Ok(dict
            .get_str(name)
            .cloned()
            .unwrap_or_else(|| Value::undefined_of(value, name.to_owned()))),
        _ => Ok(Value::undefined_of(value, name.to_owned())),
    }
}

/// What Python's `getattr` finds.
fn own_attribute(value: &Value, name: &str) -> Result<Option<Value>> {
    match value {
        Value::Undefined(undefined) => {
            let text = format!("{}, so that it has no `{name}`", undefined.reason());
            Err(value.blamed(text))
        }
        Value::Namespace(namespace) => Ok(namespace.get(name)),
        Value::Loop(state) if state.attribute(name).is_some() => Ok(state.attribute(name)),
        Value::Cycler(cycler) if name == "current" => Ok(Some(cycler.current())),
        Value::Callable(callable) => Ok(macro_attribute(callable, name)),
        Value::Int(number) => Ok(match name {
            "real" | "numerator" => Some(value.clone()),
            "imag" => Some(Value::int(0)),
            "denominator" => Some(Value::int(1)),
            _ => methods::method(&Value::Int(number.clone()), name),
        }),
        // What `groupby` makes has names for its two items.
        Value::Tuple(items) if items.len() == 2 => Ok(match name {
            "grouper" => items.first().cloned(),
            "list" => items.get(1).cloned(),
            _ => methods::method(value, name),
        }),
        _ if methods::is_forbidden(value, name) => Ok(Some(forbidden(value, name))),
        _ => Ok(methods::method(value, name)),
    }
}

fn forbidden(value: &Value, name: &str) -> Value {
    Value::Undefined(Arc::new(Undefined {
        name: Some(name.to_owned()),
        owner: None,
        hint: Some(format!(
            "`{name}` of {} is kept from templates, which cannot change what they are given",
            value.described()
        )),
    }))
}

fn macro_attribute(callable: &Callable, name: &str) -> Option<Value> {
    let node = match callable {
        Callable::Macro { node, .. } => node,
        Callable::Function(Function::Dict) if name == "fromkeys" => {
            let empty = Value::Dict(Dict::new([]).ok()?);
            return methods::method(&empty, name);
        }
        _ => return None,
    };
    match name {
        "name" => Some(Value::text(node.name.as_str())),
        "catch_kwargs" => Some(Value::Bool(node.uses_kwargs)),
        "catch_varargs" => Some(Value::Bool(node.uses_varargs)),
        "caller" => Some(Value::Bool(node.uses_caller)),
        "arguments" => {
            let names = node
                .parameters
                .iter()
                .map(|(name, _)| Value::text(name.as_str()));
            Value::tuple(names.collect()).ok()
        }
        _ => None,
    }
}

/// `value[index]`: the item, else what `value.index` would be.
pub fn item(value: &Value, index: &Value) -> Result<Value> {
    if let Value::Undefined(undefined) = value {
        let text = format!("{}, so that it has no items", undefined.reason());
        return Err(value.blamed(text));
    }
    if let Some(found) = own_item(value, index) {
        return Ok(found);
    }
    if let Some(name) = index.as_str()
        && !matches!(value, Value::Dict(_))
    {
        return attribute(value, name);
    }
    if let (Value::Dict(_), Some(name)) = (value, index.as_str())
        && let Some(method) = methods::method(value, name)
    {
        return Ok(method);
    }
    let name = match index.as_str() {
        Some(name) => name.to_owned(),
        None => super::super::print::repr(index)?,
    };
    Ok(Value::undefined_of(value, name))
}

fn own_item(value: &Value, index: &Value) -> Option<Value> {
    if let Value::Dict(dict) = value {
        return dict.get(index).cloned();
    }
    let index = index.as_integer()?.to_i64()?;
    let at = |length: usize| place(index, length);
    match value {
        Value::List(items) | Value::Tuple(items) => items.get(at(items.len())?).cloned(),
        Value::Text(text) => {
            let c = text.char_at(at(text.char_count())?)?;
            Some(Value::Text(Text::with_markup(
                c.to_string(),
                text.is_markup(),
            )))
        }
        Value::Range(range) => at(range.len()).map(|place| range.at(place)),
        _ => None,
    }
}

/// The place that an index means, negative ones from the end.
fn place(index: i64, length: usize) -> Option<usize> {
    let length = i64::try_from(length).ok()?;
    let place = if index < 0 { index + length } else { index };
    (0..length).contains(&place).then_some(place as usize)
}

/// `value[start:stop:step]`, as CPython's `PySlice_AdjustIndices`.
pub fn slice(value: &Value, bounds: &[Value; 3]) -> Result<Value> {
    let length = match value {
        Value::Text(_) | Value::List(_) | Value::Tuple(_) | Value::Range(_) => value.length()?,
        Value::Undefined(undefined) => {
            let text = format!("{}, so that it has no parts", undefined.reason());
            return Err(value.blamed(text));
        }
        // As Jinja does it: what cannot be looked up is undefined.
        other => return Ok(Value::undefined_of(other, "[:]".to_owned())),
    };
    let picked = indices(length, bounds)?;
    spend(picked.len())?;
    match value {
        Value::List(items) => {
            reserve(picked.len().saturating_mul(size_of::<Value>()))?;
            Value::list(picked.items().map(|at| items[at].clone()).collect())
        }
        Value::Tuple(items) => Value::tuple(picked.items().map(|at| items[at].clone()).collect()),
        Value::Text(text) => slice_text(text, &picked),
        Value::Range(range) => {
            let at = |place: i64| {
                i64::try_from(i128::from(range.start) + i128::from(place) * i128::from(range.step))
            };
            match (
                at(picked.start),
                at(picked.stop),
                range.step.checked_mul(picked.step),
            ) {
                (Ok(start), Ok(stop), Some(step)) => Ok(Value::Range(Range { start, stop, step })),
                _ => fail("a range is too long"),
            }
        }
        _ => Ok(Value::None),
    }
}

fn slice_text(text: &Text, picked: &Picked) -> Result<Value> {
    let markup = text.is_markup();
    let text = text.as_str();
    let mut out = Builder::default();
    if picked.step == 1 {
        // The usual case walks the text once.
        let mut places = text.char_indices().map(|(at, _)| at).chain([text.len()]);
        let start = places.nth(picked.start as usize).unwrap_or(text.len());
        let end = match picked.len() {
            0 => start,
            count => places.nth(count - 1).unwrap_or(text.len()),
        };
        out.push(&text[start..end])?;
    } else if text.is_ascii() {
        for at in picked.items() {
            out.push_char(char::from(text.as_bytes()[at]))?;
        }
    } else {
        reserve(text.len().saturating_mul(4))?;
        let chars: Vec<char> = text.chars().collect();
        for at in picked.items() {
            out.push_char(chars[at])?;
        }
    }
    Ok(Value::Text(Text::with_markup(out.finish(), markup)))
}

/// The places that a slice picks, all of them within the length.
struct Picked {
    start: i64,
    stop: i64,
    step: i64,
}

impl Picked {
    fn len(&self) -> usize {
        let span = if self.step > 0 {
            self.stop - self.start
        } else {
            self.start - self.stop
        };
        if span <= 0 {
            return 0;
        }
        ((span - 1) / self.step.abs()) as usize + 1
    }

    fn items(&self) -> impl Iterator<Item = usize> {
        let (start, step) = (self.start, self.step);
        (0..self.len() as i64).map(move |count| (start + count * step) as usize)
    }
}

fn indices(length: usize, bounds: &[Value; 3]) -> Result<Picked> {
    let length = i64::try_from(length).unwrap_or(i64::MAX);
    let bound = |value: &Value| match value {
        Value::None => Ok(None),
        value => match value.as_integer() {
            Some(integer) => Ok(Some(integer.to_i64().unwrap_or(if integer.is_negative() {
                i64::MIN
            } else {
                i64::MAX
            }))),
            None => Err(value.blamed(format!(
                "the bounds of a slice are integers, not {}",
                value.described()
            ))),
        },
    };
    let [start, stop, step] = bounds;
    // A step beyond the length picks one item, whatever it is.
    let step = bound(step)?.unwrap_or(1);
    if step == 0 {
        return fail("the step of a slice cannot be 0");
    }
    let step = step.clamp(-length.max(1) - 1, length.max(1) + 1);
    let (lowest, highest) = if step < 0 {
        (-1, length - 1)
    } else {
        (0, length)
    };
    let clamp = |bound: i64| match bound {
        bound if bound < 0 => bound.saturating_add(length).max(lowest),
        bound => bound.min(highest),
    };
    let (first, last) = if step < 0 {
        (highest, lowest)
    } else {
        (lowest, highest)
    };
    Ok(Picked {
        start: bound(start)?.map_or(first, clamp),
        stop: bound(stop)?.map_or(last, clamp),
        step,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sliced(text: &str, bounds: [Option<i64>; 3]) -> String {
        let bounds = bounds.map(|bound| bound.map_or(Value::None, Value::int));
        let value = slice(&Value::text(text), &bounds).unwrap();
        value.as_str().unwrap().to_owned()
    }

    #[test]
    fn slices_are_those_of_python() {
        assert_eq!(sliced("abcde", [Some(2), Some(0), Some(-1)]), "cb");
        assert_eq!(sliced("abcde", [None, None, Some(-1)]), "edcba");
        assert_eq!(sliced("abcde", [None, Some(1), Some(-1)]), "edc");
        assert_eq!(sliced("abcde", [Some(-2), None, Some(-2)]), "db");
        assert_eq!(sliced("abcde", [Some(1), None, Some(2)]), "bd");
        assert_eq!(sliced("abcde", [Some(-99), Some(99), Some(3)]), "ad");
        assert_eq!(sliced("abcde", [Some(9), Some(-9), Some(-3)]), "eb");
        assert_eq!(sliced("äöü", [Some(1), Some(-1), None]), "ö");
        assert_eq!(sliced("äöü", [Some(5), None, None]), "");
        assert_eq!(sliced("äöü", [None, None, Some(i64::MIN)]), "ü");
        assert_eq!(sliced("", [None, None, Some(-1)]), "");
    }
}
