//! A field that is a mapping of settings, of which another field's value knows some: `optim_args`, `lr_scheduler_kwargs`.
//!
//! Enters: the field as it was given. Leaves: the value of each setting that is asked for, and those that nobody asked for.

use crate::job::lr_scheduler::Range;
use crate::job::number::parse_number;
use crate::job::read::Reader;
use crate::job::switch::parse_switch;
use crate::job::yaml::{self, Key, Node, Value};

/// The entries of a field, and the names that were asked for.
pub(super) struct Settings {
    field: &'static str,
    entries: Vec<(Key, Node)>,
    pub known: Vec<&'static str>,
}

impl Settings {
    /// Reads a mapping, or Transformers' texts for it: JSON, and `momentum=0.9,nesterov=true`. `example` is one as it should be.
    pub fn read(reader: &mut Reader<'_>, field: &'static str, example: &str) -> Self {
        let given = reader.given(field);
        let entries = given.map(|given| mapping(&given.node).or_else(|| pairs(&given.node)));
        if let (Some(given), Some(None)) = (given, &entries) {
            reader.wrong(given, &format!("a mapping ({field}: {example})"));
        }
        Self {
            field,
            entries: entries.flatten().unwrap_or_default(),
            known: Vec::new(),
        }
    }

    /// The value of a setting; null counts as not given.
    pub fn get(&self, name: &str) -> Option<&Node> {
        let entry = self.entries.iter().find(|(key, _)| key.text == name);
        entry.map(|(_, node)| node).filter(|node| !node.is_null())
    }

    /// The names of what was given and not asked for.
    pub fn unknown(&self) -> impl Iterator<Item = &Key> {
        let unknown = |(key, node): &&(Key, Node)| {
            !self.known.contains(&key.text.as_str()) && !node.is_null()
        };
        self.entries.iter().filter(unknown).map(|(key, _)| key)
    }

    /// Reads a setting with `parse`; `wanted` says what it takes.
    pub fn value<T>(
        &mut self,
        reader: &mut Reader<'_>,
        name: &'static str,
        wanted: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Option<T> {
        self.known.push(name);
        let node = self.get(name)?;
        let parsed = match &node.value {
            Value::Scalar { text, .. } => parse(text.trim()),
            _ => None,
        };
        if parsed.is_none() {
            let (field, found) = (self.field, node.describe());
            let message = format!("`{name}` in `{field}` must be {wanted}, found {found}");
            reader.problems.add(&node.origin, message);
        }
        parsed
    }

    /// Any number; whoever asks checks it.
    pub fn any_number(&mut self, reader: &mut Reader<'_>, name: &'static str) -> Option<f64> {
        self.value(reader, name, "a number", parse_number)
    }

    pub fn number(
        &mut self,
        reader: &mut Reader<'_>,
        name: &'static str,
        range: Range,
    ) -> Option<f64> {
        self.value(reader, name, range.wanted, |text| {
            parse_number(text).filter(|value| range.contains(*value))
        })
    }

    pub fn whole(
        &mut self,
        reader: &mut Reader<'_>,
        name: &'static str,
        range: Range,
    ) -> Option<u64> {
        let steps = self.number(reader, name, range)?;
        Some(steps as u64)
    }

    pub fn switch(&mut self, reader: &mut Reader<'_>, name: &'static str) -> Option<bool> {
        self.value(reader, name, "true or false", parse_switch)
    }

    pub fn choice<T: Copy>(
        &mut self,
        reader: &mut Reader<'_>,
        name: &'static str,
        choices: &[(&str, T)],
    ) -> Option<T> {
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        self.value(
            reader,
            name,
            &format!("one of {}", names.join(", ")),
            |text| {
                let choice = choices.iter().find(|(name, _)| *name == text);
                choice.map(|(_, value)| *value)
            },
        )
    }
}

/// The entries of a mapping, which Transformers takes as JSON text too. None where it is something else.
fn mapping(node: &Node) -> Option<Vec<(Key, Node)>> {
    match &node.value {
        Value::Mapping(entries) => Some(entries.clone()),
        Value::Scalar { text, .. } if text.trim_start().starts_with('{') => {
            match yaml::parse(text, &|_| node.origin.clone()) {
                Ok(Some(Node {
                    value: Value::Mapping(entries),
                    ..
                })) => Some(entries),
                _ => None,
            }
        }
        _ => None,
    }
}

/// The entries of a text such as `momentum=0.9,nesterov=true`. None where it is something else.
fn pairs(node: &Node) -> Option<Vec<(Key, Node)>> {
    let Value::Scalar { text, .. } = &node.value else {
        return None;
    };
    let parts = text
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty());
    let pair = |part: &str| {
        let (name, value) = part.split_once('=')?;
        let key = Key {
            text: name.trim().to_owned(),
            origin: node.origin.clone(),
        };
        Some((key, Node::scalar(value.trim(), false, &node.origin)))
    };
    parts.map(pair).collect()
}
