//! The entries of `datasets` and `test_datasets`: a list as a whole, an entry of it, a field of an entry.

use super::super::error::{Origin, Problems};
use super::super::fields::{self, DATASETS};
use super::super::quote::shorten;
use super::super::spec::REASONING;
use super::super::yaml::{Key, Node, Value};
use super::super::{llama_factory_columns, unsupported};
use super::{Given, Layer, Merged, contradicts, twice, unknown};

pub(in crate::job) const MAX_DATASETS: usize = 1000;

/// What Axolotl's `type` has where it is a mapping.
const USER_DEFINED: [&str; 8] = [
    "system_prompt",
    "system_format",
    "field_system",
    "field_instruction",
    "field_input",
    "field_output",
    "format",
    "no_input_format",
];

/// Axolotl's `datasets` of plain text.
pub(in crate::job) const PRETRAINING: &str = "pretraining_dataset";

impl Merged {
    /// Replaces all entries of a list by these, which say in full what the given ones named.
    pub fn replace_datasets(
        &mut self,
        list: &'static str,
        entries: Vec<(Layer, Key, Node)>,
        problems: &mut Problems,
    ) {
        self.values.retain(|name, _| !is_in(list, name));
        for (index, (layer, key, node)) in entries.into_iter().enumerate() {
            self.add_dataset(layer, (list, index), &key, node, problems);
        }
    }

    /// How many fields an entry of a list was given with.
    pub fn fields_of_dataset(&self, list: &str, index: usize) -> usize {
        let prefix = format!("{list}.{index}.");
        let fields = self.values.range(prefix.clone()..);
        fields
            .take_while(|(name, _)| name.starts_with(&prefix))
            .count()
    }

    /// How many entries a list has.
    pub fn datasets(&self, list: &str) -> usize {
        (0..MAX_DATASETS)
            .take_while(|index| {
                let prefix = format!("{list}.{index}.");
                self.values
                    .range(prefix.clone()..)
                    .next()
                    .is_some_and(|(name, _)| name.starts_with(&prefix))
            })
            .count()
    }

    /// Adds a list of datasets as a whole: it replaces what an earlier source said.
    pub(super) fn add_datasets(
        &mut self,
        layer: Layer,
        list: &'static str,
        key: Key,
        node: Node,
        problems: &mut Problems,
    ) {
        if node.is_null() {
            return;
        }
        self.datasets_given |= list == DATASETS;
        let same_layer = self
            .values
            .iter()
            .find(|(name, given)| is_in(list, name) && given.layer == layer);
        if layer != Layer::Flag
            && let Some((_, first)) = same_layer
        {
            return twice(&key, &first.written, &first.origin, problems);
        }
        if layer == Layer::Flag {
            let given = Given {
                written: key.text.clone(),
                origin: key.origin.clone(),
                layer,
                node: node.clone(),
            };
            match self.datasets_of_flags.get(list) {
                None => drop(self.datasets_of_flags.insert(list, given)),
                Some(first) => {
                    if !first.node.says_the_same(&node) {
                        contradicts(&key, &node, first, problems);
                    }
                    return;
                }
            }
        }
        self.values.retain(|name, _| !is_in(list, name));
        let entries = match node.value {
            Value::Sequence(items) => items,
            _ => vec![node],
        };
        if entries.is_empty() {
            let what = match list {
                DATASETS => "name the data to train on",
                _ => "name the data to evaluate, or remove it",
            };
            problems.add(&key.origin, format!("`{list}` is empty: {what}"));
        }
        if entries.len() > MAX_DATASETS {
            let message = format!(
                "{} datasets are too many (at most {MAX_DATASETS})",
                entries.len()
            );
            return problems.add(&key.origin, message);
        }
        for (index, entry) in entries.into_iter().enumerate() {
            self.add_dataset(layer, (list, index), &key, entry, problems);
        }
    }

    fn add_dataset(
        &mut self,
        layer: Layer,
        (list, index): (&'static str, usize),
        key: &Key,
        entry: Node,
        problems: &mut Problems,
    ) {
        let origin = entry.origin.clone();
        match entry.value {
            Value::Mapping(entries) => {
                if !entries
                    .iter()
                    .any(|(key, _)| key.text == "path" || key.text == "data_files")
                {
                    let of = match list {
                        DATASETS => String::new(),
                        list => format!(" of `{list}`"),
                    };
                    let message = format!("dataset {}{of} has no `path`", index + 1);
                    problems.add(&origin, message);
                }
                for (key, node) in entries {
                    self.add_dataset_field(layer, (list, index), key, node, problems);
                }
            }
            Value::Scalar { .. } => {
                let key = Key {
                    text: key.text.clone(),
                    origin,
                };
                self.put(layer, format!("{list}.{index}.path"), key, entry, problems);
            }
            Value::Sequence(_) => {
                problems.add(
                    &origin,
                    "a dataset is a path or a mapping with `path`, found a list",
                );
            }
        }
    }

    fn add_dataset_field(
        &mut self,
        layer: Layer,
        (list, index): (&'static str, usize),
        key: Key,
        node: Node,
        problems: &mut Problems,
    ) {
        match key.text.as_str() {
            "message_property_mappings" => {
                return self.add_message_keys(layer, (list, index), node, problems);
            }
            "type" if matches!(node.value, Value::Mapping(_)) => {
                return self.add_user_defined(layer, (list, index), key, node, problems);
            }
            // LLaMA-Factory's way to say what a dataset's rows look like.
            "formatting" | "columns" | "tags" => {
                return match llama_factory_columns::dataset_fields(&key, node) {
                    Ok(fields) => fields.into_iter().for_each(|(key, node)| {
                        self.add_dataset_field(layer, (list, index), key, node, problems);
                    }),
                    Err(message) => problems.add(&key.origin, message),
                };
            }
            _ => {}
        }
        match fields::find_in_dataset(&key.text) {
            Some(field) => {
                let name = field.name.replace("datasets[]", &format!("{list}.{index}"));
                self.put(layer, name, key, node, problems);
            }
            None => match unsupported::find_in_dataset(&key.text, &node) {
                Some(fate) => self.meet(fate, &key, problems),
                None if node.is_null() => self.empty.push(shorten(&key.text)),
                None => unknown(&key, " of a dataset", fields::dataset_names(), problems),
            },
        }
    }

    /// Adds Axolotl's `type` as a mapping: the fields of a text that the job defines.
    fn add_user_defined(
        &mut self,
        layer: Layer,
        (list, index): (&'static str, usize),
        key: Key,
        node: Node,
        problems: &mut Problems,
    ) {
        let Value::Mapping(entries) = node.value else {
            return;
        };
        let kind = Node::scalar("user_defined", false, &node.origin);
        self.put(layer, format!("{list}.{index}.type"), key, kind, problems);
        for (key, node) in entries {
            match USER_DEFINED.contains(&key.text.as_str()) {
                true => self.add_dataset_field(layer, (list, index), key, node, problems),
                false if node.is_null() => self.empty.push(shorten(&key.text)),
                false => unknown(&key, " of `type`", USER_DEFINED.into_iter(), problems),
            }
        }
    }

    /// Adds Axolotl's `message_property_mappings: {role: from, content: value}`.
    fn add_message_keys(
        &mut self,
        layer: Layer,
        (list, index): (&'static str, usize),
        node: Node,
        problems: &mut Problems,
    ) {
        let Value::Mapping(entries) = node.value else {
            let message = "`message_property_mappings` is a mapping (role: from, content: value)";
            return problems.add(&node.origin, message);
        };
        for (key, node) in entries {
            match key.text.as_str() {
                "role" | "content" => {
                    let name = format!("{list}.{index}.field_{}", key.text);
                    self.put(layer, name, key, node, problems);
                }
                // The template's name of the thinking, and the data's.
                name if REASONING.contains(&name) => {
                    let field = |name: &str| format!("{list}.{index}.{name}");
                    let read = Node::scalar(name, true, &node.origin);
                    let key_of_template = field("template_thinking_key");
                    self.put(layer, key_of_template, key.clone(), read, problems);
                    self.put(layer, field("field_thinking"), key, node, problems);
                }
                _ => unknown(
                    &key,
                    " of message_property_mappings",
                    ["role", "content"].into_iter().chain(REASONING),
                    problems,
                ),
            }
        }
    }

    /// Adds a field such as `datasets.0.path` from a flag or a variable: it changes one entry, or appends one.
    pub(super) fn add_dataset_path(
        &mut self,
        layer: Layer,
        (list, rest): (&'static str, &str),
        node: Node,
        origin: &Origin,
        problems: &mut Problems,
    ) {
        let Some((index, name)) = rest
            .split_once('.')
            .and_then(|(i, name)| Some((i.parse().ok()?, name)))
        else {
            let message = format!("write {list}.<number>.<field>, for example {list}.0.path");
            return problems.add(origin, message);
        };
        let have = self.datasets(list);
        if index > have || index >= MAX_DATASETS {
            let message = format!(
                "there is no dataset {index}: the job has {have}, and {list}.{have} would append one"
            );
            return problems.add(origin, message);
        }
        if index == have && name != "path" {
            let message =
                format!("there is no dataset {index} yet; give {list}.{index}.path first");
            return problems.add(origin, message);
        }
        let key = Key {
            text: name.to_owned(),
            origin: origin.clone(),
        };
        self.add_dataset_field(layer, (list, index), key, node, problems);
    }
}

/// Whether the name is of a field of an entry of that list.
fn is_in(list: &str, name: &str) -> bool {
    name.strip_prefix(list)
        .is_some_and(|rest| rest.starts_with('.'))
}

/// Entries of datasets that are plain text where they do not say what they are.
pub(super) fn as_text(node: Node) -> Node {
    let with_type = |entry: Node| {
        let mut entries = match entry.value {
            Value::Mapping(entries) => entries,
            value => vec![(
                Key {
                    text: "path".to_owned(),
                    origin: entry.origin.clone(),
                },
                Node {
                    origin: entry.origin.clone(),
                    value,
                },
            )],
        };
        if !entries.iter().any(|(key, _)| key.text == "type") {
            let key = Key {
                text: "type".to_owned(),
                origin: entry.origin.clone(),
            };
            entries.push((key, Node::scalar("text", true, &entry.origin)));
        }
        Node {
            origin: entry.origin,
            value: Value::Mapping(entries),
        }
    };
    if node.is_null() {
        return node;
    }
    let origin = node.origin.clone();
    let entries = match node.value {
        Value::Sequence(items) => items,
        value => vec![Node {
            origin: origin.clone(),
            value,
        }],
    };
    Node {
        origin,
        value: Value::Sequence(entries.into_iter().map(with_type).collect()),
    }
}
