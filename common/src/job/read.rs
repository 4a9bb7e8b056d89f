//! Typed access to the merged values: each reader returns what it could make of a field and reports what it could not.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::dialect::Dialect;
use super::did_you_mean::did_you_mean;
use super::error::{Origin, Problems};
use super::merge::{Given, Layer, Merged};
use super::number::{parse_number, without_separators};
use super::quote::shorten;
use super::starting_adapter::FindAdapter;
use super::switch::parse_switch;
use super::yaml::{Node, Value};

const MAX_TEXT_BYTES: usize = 64 << 10;
const MAX_LIST_ITEMS: usize = 1000;

/// Reads the merged values of a job, and collects the problems.
pub(super) struct Reader<'a> {
    pub merged: &'a Merged,
    pub problems: &'a mut Problems,
    /// What the user should know, a line each.
    pub notices: Vec<String>,
    pub file: Option<Arc<PathBuf>>,
    /// Folder of the job file.
    pub job_dir: Option<&'a Path>,
    /// Whose names the job uses.
    pub dialect: Dialect,
    /// Whether datasets were given, perhaps unusable ones.
    pub datasets_given: bool,
    /// Finds the adapter that the job starts from where that is no folder.
    pub find_adapter: &'a FindAdapter<'a>,
}

impl<'a> Reader<'a> {
    pub fn given(&self, name: &str) -> Option<&'a Given> {
        self.merged.get(name)
    }

    pub fn layer(&self, name: &str) -> Option<Layer> {
        self.given(name).map(|given| given.layer)
    }

    /// Reads a whole number in `range`.
    pub fn whole(&mut self, name: &str, range: RangeInclusive<u64>) -> Option<u64> {
        let (given, text) = self.scalar(name, "a whole number")?;
        let parsed = without_separators(text).parse::<u64>();
        if let Ok(number) = parsed
            && range.contains(&number)
        {
            return Some(number);
        }
        let wanted = match (*range.start(), *range.end()) {
            (first, u64::MAX) => format!("a whole number, {first} or more"),
            (first, last) => format!("a whole number from {first} to {last}"),
        };
        self.wrong(given, &wanted);
        None
    }

    pub fn size(&mut self, name: &str, range: RangeInclusive<u64>) -> Option<usize> {
        self.whole(name, range)
            .and_then(|number| usize::try_from(number).ok())
    }

    /// Reads a finite number that `accept` takes; `wanted` says which those are.
    pub fn number(&mut self, name: &str, wanted: &str, accept: fn(f64) -> bool) -> Option<f64> {
        let (given, text) = self.scalar(name, wanted)?;
        match parse_number(text).filter(|number| accept(*number)) {
            Some(number) => Some(number),
            None => {
                self.wrong(given, wanted);
                None
            }
        }
    }

    /// Reads whether a field is on or off.
    pub fn switch(&mut self, name: &str) -> Option<bool> {
        let (given, text) = self.scalar(name, "true or false")?;
        match parse_switch(text) {
            Some(value) => Some(value),
            None => {
                self.wrong(given, "true or false");
                None
            }
        }
    }

    pub fn below_one(&mut self, name: &str) -> Option<f64> {
        self.number(name, "a number from 0, below 1", |n| {
            (0.0..1.0).contains(&n)
        })
    }

    /// Whether the job learns all of its texts, whatever says so.
    pub fn trains_on_inputs(&self) -> bool {
        let says = |name: &str, wanted: bool| {
            let text = self.given(name).map(|given| &given.node.value);
            matches!(text, Some(Value::Scalar { text, .. }) if parse_switch(text) == Some(wanted))
        };
        says("train_on_inputs", true) || says("assistant_only_loss", false)
    }

    /// Reads one of `choices`; each has several names, the first is what people are told.
    pub fn choice<T: Copy>(&mut self, name: &str, choices: &[(&[&str], T)]) -> Option<T> {
        let told: Vec<&str> = choices.iter().map(|(names, _)| names[0]).collect();
        let wanted = format!("one of {}", told.join(", "));
        let (given, text) = self.scalar(name, &wanted)?;
        let lower = text.to_ascii_lowercase().replace('-', "_");
        if let Some((_, value)) = choices
            .iter()
            .find(|(names, _)| names.contains(&lower.as_str()))
        {
            return Some(*value);
        }
        let hint = did_you_mean(&lower, told.iter().copied());
        let found = shorten(text);
        self.problem(given, format!("must be {wanted}, found `{found}`{hint}"));
        None
    }

    /// The field that decides among several that decide the same thing: a later source wins, but within one source only one may
    /// be given.
    pub fn one_of<'n>(&mut self, names: &[&'n str], decide: &str) -> Option<&'n str> {
        let last = names
            .iter()
            .copied()
            .filter(|name| self.layer(name).is_some())
            .max_by_key(|name| self.given(name).map(|given| (given.layer, &given.origin)))?;
        for name in names.iter().copied().filter(|name| *name != last) {
            if let (Some(other), Some(given)) = (self.given(name), self.given(last))
                && other.layer == given.layer
            {
                let message = format!(
                    "and `{}` ({}) both decide {decide}; remove one",
                    other.written,
                    other.origin.place()
                );
                self.problem(given, message);
            }
        }
        Some(last)
    }

    pub fn text(&mut self, name: &str) -> Option<String> {
        let (given, text) = self.scalar(name, "text")?;
        self.usable_text(given, &given.node, text)
    }

    /// Reads a text with the white space at its ends, or one of nothing.
    pub fn verbatim(&mut self, name: &str) -> Option<String> {
        let (given, _) = self.scalar(name, "text")?;
        match &given.node.value {
            Value::Scalar { text, .. } if text.trim().is_empty() => Some(text.clone()),
            Value::Scalar { text, .. } => self.usable_text(given, &given.node, text),
            _ => None,
        }
    }

    /// Reads a path to something that exists already, or will be looked for.
    ///
    /// A relative path in a job file is meant from the current folder if there is such a thing, else from the job
    /// file's folder, so that a job works from where its commands are typed and after its folder was moved.
    pub fn input_path(&mut self, name: &str) -> Option<PathBuf> {
        let from_file = self.layer(name) == Some(Layer::File);
        let written = PathBuf::from(self.text(name)?);
        Some(match from_file {
            true => self.beside_job(&written),
            false => written,
        })
    }

    /// A path that a job file has: from the current folder if it is there, else from the job file's.
    pub fn beside_job(&self, written: &Path) -> PathBuf {
        let beside = self.job_dir.map(|dir| dir.join(written));
        match beside {
            Some(beside) if !written.exists() && beside.exists() => beside,
            _ => written.to_owned(),
        }
    }

    /// Reads a list of texts, or one text. With `separator`, a plain text is split there.
    pub fn texts(&mut self, name: &str, separator: Option<char>) -> Option<Vec<String>> {
        let given = self.given(name)?;
        let mut texts = Vec::new();
        match &given.node.value {
            Value::Sequence(items) if items.len() > MAX_LIST_ITEMS => {
                self.problem(given, format!("has more than {MAX_LIST_ITEMS} entries"));
                return None;
            }
            Value::Sequence(items) => {
                for item in items {
                    match &item.value {
                        Value::Scalar { text, .. } => {
                            texts.push(self.usable_text(given, item, text)?);
                        }
                        _ => {
                            self.wrong(given, "a list of texts");
                            return None;
                        }
                    }
                }
            }
            Value::Scalar { text, quoted } => match separator.filter(|_| !quoted) {
                Some(separator) => {
                    let parts = text.split(separator).map(str::trim);
                    texts.extend(parts.filter(|part| !part.is_empty()).map(str::to_owned));
                }
                None => texts.push(self.usable_text(given, &given.node, text)?),
            },
            Value::Mapping(_) => {
                self.wrong(given, "a text or a list of texts");
                return None;
            }
        }
        Some(texts)
    }

    /// Reports that the job leaves out what it must say.
    pub fn missing(&mut self, message: &str) {
        let origin = self.file.clone().map_or(Origin::Nowhere, Origin::File);
        self.problems.add(&origin, message);
    }

    /// Reports `message` about a field, at its place and under the name that the user wrote.
    pub fn problem(&mut self, given: &Given, message: String) {
        self.problems.add(
            &given.origin,
            format!("`{}` {message}", shorten(&given.written)),
        );
    }

    pub fn wrong(&mut self, given: &Given, wanted: &str) {
        let found = given.node.describe();
        self.problem(given, format!("must be {wanted}, found {found}"));
    }

    pub fn scalar(&mut self, name: &str, wanted: &str) -> Option<(&'a Given, &'a str)> {
        let given = self.given(name)?;
        match &given.node.value {
            Value::Scalar { text, .. } => Some((given, text.trim())),
            _ => {
                self.wrong(given, wanted);
                None
            }
        }
    }

    fn usable_text(&mut self, given: &Given, node: &Node, text: &str) -> Option<String> {
        let quoted = matches!(node.value, Value::Scalar { quoted: true, .. });
        if given.layer == Layer::File && !quoted && parse_yaml_bool(text) {
            self.wrong(given, "text (quote it if it is meant)");
            return None;
        }
        if text.trim().is_empty() {
            self.problem(given, "is empty".to_owned());
            return None;
        }
        if text.len() > MAX_TEXT_BYTES || text.contains('\0') {
            self.problem(
                given,
                format!(
                    "is no usable text: it has {} bytes or a zero byte",
                    text.len()
                ),
            );
            return None;
        }
        Some(text.to_owned())
    }
}

fn parse_yaml_bool(text: &str) -> bool {
    matches!(text, "true" | "True" | "TRUE" | "false" | "False" | "FALSE")
}
