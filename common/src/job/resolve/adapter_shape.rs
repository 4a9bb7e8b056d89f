//! Resolves which of the named linears have no adapter after all, what has one beside them, and whose rank or alpha is another.

use crate::job::TargetModules;
use crate::job::adapter_shape::{AdapterShape, MAX_PATTERNS, sorted};
use crate::job::limits::MAX_RANK;
use crate::job::merge::Given;
use crate::job::number::parse_number;
use crate::job::pattern::whole_path;
use crate::job::quote::shorten;
use crate::job::read::Reader;
use crate::job::yaml::{Node, Value};

use super::method::modules;

pub(super) fn adapter_shape(reader: &mut Reader<'_>) -> AdapterShape {
    let excluded = modules(reader, "exclude_modules");
    const RANK: &str = "a whole number from 1 to 4096";
    let is_rank = |rank: f64| rank.fract() == 0.0 && rank <= MAX_RANK as f64;
    let ranks = patterns(reader, "rank_pattern", RANK, is_rank);
    let alphas = patterns(reader, "alpha_pattern", "a number above 0", |_| true);
    AdapterShape {
        excluded: excluded.filter(|modules| *modules != TargetModules::Named(Vec::new())),
        layers: layers(reader),
        parameters: parameters(reader).unwrap_or_default(),
        ranks: ranks
            .into_iter()
            .map(|(pattern, rank)| (pattern, rank as usize))
            .collect(),
        alphas,
    }
}

/// Names of parameters, sorted. PEFT takes no patterns for these.
fn parameters(reader: &mut Reader<'_>) -> Option<Vec<String>> {
    let names = reader.texts("lora_target_parameters", Some(','))?;
    let given = reader.given("lora_target_parameters")?;
    if given.is_switched_off() || given.node.is_text("none") {
        return None;
    }
    let is_name = |name: &String| {
        let is_part = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.');
        !name.is_empty() && name.bytes().all(is_part)
    };
    if let Some(name) = names.iter().find(|name| !is_name(name)) {
        let message = format!(
            "holds `{}`, which is no name of a parameter (PEFT takes no patterns here)",
            shorten(name)
        );
        reader.problem(given, message);
        return None;
    }
    Some(sorted(names))
}

/// Numbers of layers, one or a list.
fn layers(reader: &mut Reader<'_>) -> Option<Vec<usize>> {
    let given = reader.given("layers_to_transform")?;
    let texts: Option<Vec<&str>> = match &given.node.value {
        Value::Sequence(items) => items.iter().map(scalar).collect(),
        Value::Scalar { text, .. } if text.eq_ignore_ascii_case("none") => return None,
        Value::Scalar { text, .. } => Some(text.split([',', ' ']).collect()),
        Value::Mapping(_) => None,
    };
    let numbers = texts.and_then(|texts| {
        let texts = texts.into_iter().filter(|text| !text.trim().is_empty());
        texts.map(|text| text.trim().parse().ok()).collect()
    });
    if numbers.is_none() {
        reader.wrong(given, "the numbers of layers");
    }
    let numbers: Option<Vec<usize>> = numbers;
    numbers.filter(|numbers| !numbers.is_empty())
}

fn scalar(node: &Node) -> Option<&str> {
    match &node.value {
        Value::Scalar { text, .. } => Some(text),
        _ => None,
    }
}

/// A mapping of patterns to numbers above 0, in its order.
fn patterns(
    reader: &mut Reader<'_>,
    name: &str,
    wanted: &str,
    is_right: impl Fn(f64) -> bool,
) -> Vec<(String, f64)> {
    let Some(given) = reader.given(name) else {
        return Vec::new();
    };
    let Value::Mapping(entries) = &given.node.value else {
        reader.wrong(given, "a mapping of module names to numbers");
        return Vec::new();
    };
    if entries.len() > MAX_PATTERNS {
        reader.problem(given, format!("has more than {MAX_PATTERNS} entries"));
        return Vec::new();
    }
    let mut found = Vec::new();
    for (key, node) in entries {
        let number = scalar(node).and_then(parse_number);
        match number.filter(|n| *n > 0.0 && n.is_finite() && is_right(*n)) {
            Some(number) if is_pattern(reader, given, &key.text) => {
                found.push((key.text.clone(), number));
            }
            Some(_) => {}
            None => {
                let message = format!("has `{}`, which must be {wanted}", shorten(&key.text));
                reader.problem(given, message);
            }
        }
    }
    found
}

fn is_pattern(reader: &mut Reader<'_>, given: &Given, pattern: &str) -> bool {
    match whole_path(pattern) {
        Ok(_) => true,
        Err(reason) => {
            let pattern = shorten(pattern);
            reader.problem(
                given,
                format!("has `{pattern}`, which is no regular expression: {reason}"),
            );
            false
        }
    }
}
