//! Filters of sequences.

use super::super::arguments::Args;
use super::super::ast::Operator;
use super::super::failure::{Result, fail};
use super::super::interpreter::items;
use super::super::meter::{reserve, spend};
use super::super::operators::arithmetic;
use super::super::print::write_str;
use super::super::value::{Builder, Value};
use super::dotted;

pub(super) fn filter(name: &str, value: &Value, args: Args) -> Result<Value> {
    match name {
        "first" => {
            args.none(name)?;
            let first = match value {
                Value::Generator(generator) => generator.take_first(),
                Value::Text(text) => text.char_at(0).map(Value::text),
                other => other.items()?.into_iter().next(),
            };
            Ok(first.unwrap_or_else(|| Value::undefined_hint("`first` of nothing has no value")))
        }
        "last" => {
            args.none(name)?;
            let last = reversible(value)?.items()?.into_iter().next_back();
            Ok(last.unwrap_or_else(|| Value::undefined_hint("`last` of nothing has no value")))
        }
        "list" => {
            args.none(name)?;
            Value::list(value.items()?)
        }
        "reverse" => {
            args.none(name)?;
            reverse(value)
        }
        "items" => {
            args.none(name)?;
            match value {
                Value::Undefined(_) => Ok(Value::generator(Vec::new())),
                Value::Dict(dict) => Ok(Value::generator(dict.items()?)),
                other => Err(other.blamed(format!(
                    "`items` takes an object, not {}",
                    other.described()
                ))),
            }
        }
        "batch" => batch(value, args),
        "slice" => slice(value, args),
        "sum" => {
            let [attribute, start] = args.bind(name, ["attribute", "start"])?;
            let attribute = attribute.unwrap_or(Value::None);
            let mut sum = start.unwrap_or_else(|| Value::int(0));
            if sum.as_str().is_some() {
                return fail("`sum` adds numbers, not text: use `join`");
            }
            for item in value.items()? {
                sum = arithmetic(Operator::Add, &sum, &dotted(&item, &attribute, None)?)?;
            }
            Ok(sum)
        }
        _ => join(value, args),
    }
}

/// What Python's `reversed` takes.
fn reversible(value: &Value) -> Result<&Value> {
    match value {
        Value::Undefined(_)
        | Value::Text(_)
        | Value::List(_)
        | Value::Tuple(_)
        | Value::Dict(_)
        | Value::View(_)
        | Value::Range(_) => Ok(value),
        other => Err(other.blamed(format!(
            "{} cannot be gone through from its end",
            other.described()
        ))),
    }
}

fn reverse(value: &Value) -> Result<Value> {
    if let Value::Text(_) = value {
        return items::slice(value, &[Value::None, Value::None, Value::int(-1)]);
    }
    let mut items = value.items()?;
    items.reverse();
    Ok(match reversible(value) {
        Ok(_) => Value::generator(items),
        Err(_) => Value::list(items)?,
    })
}

fn batch(value: &Value, args: Args) -> Result<Value> {
    let [size, fill] = args.bind("batch", ["linecount", "fill_with"])?;
    let Some(size) = size else {
        return fail("`batch` needs a size");
    };
    let size = size.to_count("the size of `batch`")?;
    let size = usize::try_from(size).unwrap_or(usize::MAX).max(1);
    let items = value.items()?;
    let mut batches = Vec::new();
    for chunk in items.chunks(size) {
        let mut chunk = chunk.to_vec();
        if let Some(fill) = fill.as_ref().filter(|fill| !fill.is_none()) {
            let missing = size - chunk.len();
            spend(missing)?;
            reserve(missing.saturating_mul(size_of::<Value>()))?;
            chunk.resize(size, fill.clone());
        }
        batches.push(Value::list(chunk)?);
    }
    Ok(Value::generator(batches))
}

fn slice(value: &Value, args: Args) -> Result<Value> {
    let [count, fill] = args.bind("slice", ["slices", "fill_with"])?;
    let Some(count) = count else {
        return fail("`slice` needs a count");
    };
    let count = usize::try_from(count.to_count("the count of `slice`")?).unwrap_or(0);
    spend(count)?;
    reserve(count.saturating_mul(128))?;
    if count == 0 {
        return fail("`slice` into no slices");
    }
    let items = value.items()?;
    let (size, extra) = (items.len() / count, items.len() % count);
    let mut rest = items.into_iter();
    let mut slices = Vec::new();
    for number in 0..count {
        let mut part: Vec<Value> = rest
            .by_ref()
            .take(size + usize::from(number < extra))
            .collect();
        if let Some(fill) = fill
            .as_ref()
            .filter(|fill| !fill.is_none() && number >= extra)
        {
            part.push(fill.clone());
        }
        slices.push(Value::list(part)?);
    }
    Ok(Value::generator(slices))
}

fn join(value: &Value, args: Args) -> Result<Value> {
    let [separator, attribute] = args.bind("join", ["d", "attribute"])?;
    let mut between = Builder::default();
    if let Some(separator) = &separator {
        write_str(&mut between, separator)?;
    }
    let attribute = attribute.filter(|attribute| !attribute.is_none());
    let mut out = Builder::default();
    for (index, item) in value.items()?.iter().enumerate() {
        if index > 0 {
            out.push(between.as_str())?;
        }
        match &attribute {
            Some(attribute) => write_str(&mut out, &dotted(item, attribute, None)?)?,
            None => write_str(&mut out, item)?,
        }
    }
    Ok(Value::text(out.finish()))
}
