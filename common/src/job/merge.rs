//! Merges the three sources into one flat map: canonical field name (`datasets.0.path`) to the value that won and where it
//! was given. Unknown names end here.

use std::collections::{BTreeMap, BTreeSet};

use super::did_you_mean::did_you_mean;
use super::error::{Origin, Problems};
use super::fields;
use super::llama_factory_columns;
use super::overrides::{dotted_name, is_other_variable, is_service_variable, parse_override};
use super::quote::shorten;
use super::spec::REASONING;
use super::switch::parse_switch;
use super::unsupported::{self, Fate};
use super::yaml::{Key, Node, Value};

/// A source of values; later ones win.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Layer {
    File,
    Environment,
    Flag,
}

/// One value as the user gave it.
#[derive(Clone, Debug)]
pub(super) struct Given {
    /// The name as written, which may be an alias.
    pub written: String,
    pub origin: Origin,
    pub layer: Layer,
    pub node: Node,
}

impl Given {
    /// Whether the value says only that something is not wanted.
    pub fn is_switched_off(&self) -> bool {
        matches!(&self.node.value, Value::Scalar { text, .. } if matches!(parse_switch(text), Some(false)))
    }
}

/// One value that a variable or a flag gives.
pub(super) struct Override {
    layer: Layer,
    /// Name of the field with dots: `datasets.0.path`.
    name: String,
    value: String,
    origin: Origin,
}

impl Override {
    /// The value of a flag, `--name` or the name of `--set name=value`.
    pub fn of_flag(flag: &str, value: &str) -> Self {
        let (name, origin) = match flag.strip_prefix("--") {
            Some(name) => {
                let name = name.replace('-', "_");
                let name = match fields::CLUSTER_FLAGS.contains(&name.as_str()) {
                    true => format!("cluster.{name}"),
                    false => name,
                };
                (name, Origin::Flag(shorten(flag)))
            }
            None => (
                flag.trim().to_owned(),
                Origin::Flag(format!("--set {}", shorten(flag))),
            ),
        };
        Self {
            layer: Layer::Flag,
            name,
            value: value.to_owned(),
            origin,
        }
    }

    /// Turn in which it is added: fields of a dataset after the datasets themselves, whichever source has those, because
    /// `--set datasets.0.split=...` is about the file of `--dataset`.
    pub fn turn(&self) -> u8 {
        match self.name.strip_prefix("datasets.") {
            None => 0,
            Some(rest) if rest.ends_with(".path") || rest.ends_with(".data_files") => 1,
            Some(_) => 2,
        }
    }
}

pub(super) const MAX_DATASETS: usize = 1000;

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
const PRETRAINING: &str = "pretraining_dataset";

/// The values of all sources by field, and what was passed over.
#[derive(Default)]
pub(super) struct Merged {
    values: BTreeMap<String, Given>,
    pub datasets_given: bool,
    /// Value of `datasets` as a whole, as the command line gives it.
    datasets_of_flags: Option<Given>,
    /// Keys that are known, but change nothing here.
    passed_over: Vec<String>,
    /// Keys in whose place something else is done, and what that is.
    done_otherwise: Vec<(String, &'static str)>,
    /// Keys that nobody knows, without a value.
    empty: Vec<String>,
    /// Variables that Kubernetes made.
    service_variables: Vec<String>,
    /// Keys at the top, as they were written, whatever became of them.
    written: BTreeSet<String>,
}

impl Merged {
    /// The value of a field; what was given as null counts as not given.
    pub fn get(&self, name: &str) -> Option<&Given> {
        self.values.get(name).filter(|given| !given.node.is_null())
    }

    /// The value of a field, even if it is null.
    pub fn get_or_null(&self, name: &str) -> Option<&Given> {
        self.values.get(name)
    }

    /// Lines for the user on what of the job was passed over, one of each kind.
    pub fn notices(&self) -> Vec<String> {
        let mut told: Vec<(&str, Vec<&str>)> = Vec::new();
        for (key, instead) in &self.done_otherwise {
            match told.iter_mut().find(|(text, _)| text == instead) {
                Some((_, keys)) if keys.contains(&key.as_str()) => {}
                Some((_, keys)) => keys.push(key),
                None => told.push((instead, vec![key])),
            }
        }
        let line = |(text, keys): (&str, Vec<&str>)| format!("{}: {text}", keys.join(", "));
        let mut notices = self.not_done();
        notices.extend(told.into_iter().map(line));
        notices
    }

    fn not_done(&self) -> Vec<String> {
        [
            ("not needed here", &self.passed_over, ""),
            ("unknown, but empty", &self.empty, ""),
            (
                "passed over, made by Kubernetes for a Service",
                &self.service_variables,
                " (enableServiceLinks: false in the pod leaves them out)",
            ),
        ]
        .into_iter()
        .filter(|(_, names, _)| !names.is_empty())
        .map(|(what, names, hint)| {
            let mut told: Vec<&str> = Vec::new();
            for name in names {
                if !told.contains(&name.as_str()) {
                    told.push(name);
                }
            }
            format!("{what}: {}{hint}", told.join(", "))
        })
        .collect()
    }

    /// Whether a key was given at the top, whatever became of it.
    pub fn is_written(&self, key: &str) -> bool {
        self.written.contains(key)
    }

    /// Replaces all datasets by these entries, which say in full what the given ones named.
    pub fn replace_datasets(&mut self, entries: Vec<(Layer, Key, Node)>, problems: &mut Problems) {
        self.values.retain(|name, _| !name.starts_with("datasets."));
        for (index, (layer, key, node)) in entries.into_iter().enumerate() {
            self.add_dataset(layer, index, &key, node, problems);
        }
    }

    /// How many fields an entry of `datasets` was given with.
    pub fn fields_of_dataset(&self, index: usize) -> usize {
        let prefix = format!("datasets.{index}.");
        let fields = self.values.range(prefix.clone()..);
        fields
            .take_while(|(name, _)| name.starts_with(&prefix))
            .count()
    }

    /// How many entries `datasets` has.
    pub fn datasets(&self) -> usize {
        (0..MAX_DATASETS)
            .take_while(|index| {
                let prefix = format!("datasets.{index}.");
                self.values
                    .range(prefix.clone()..)
                    .next()
                    .is_some_and(|(name, _)| name.starts_with(&prefix))
            })
            .count()
    }

    /// Adds the top-level mapping of a job file. False where the file is something else.
    pub fn add_file(&mut self, root: Node, problems: &mut Problems) -> bool {
        if root.is_null() {
            return true;
        }
        let Value::Mapping(entries) = root.value else {
            let found = root.describe();
            problems.add(
                &root.origin,
                format!("a job is a mapping of `field: value`, found {found}"),
            );
            return false;
        };
        for (key, node) in entries {
            self.add_top(Layer::File, key, node, problems);
        }
        true
    }

    /// The value that an environment variable gives, if it is one of a job's.
    pub fn variable(&mut self, variable: &str, value: &str) -> Option<Override> {
        let name = variable.strip_prefix("MUSTER_")?;
        if value.is_empty() || is_other_variable(name) {
            return None;
        }
        if is_service_variable(name, value) {
            self.service_variables.push(shorten(variable));
            return None;
        }
        Some(Override {
            layer: Layer::Environment,
            name: dotted_name(&name.to_ascii_lowercase()),
            value: value.to_owned(),
            origin: Origin::Environment(shorten(variable)),
        })
    }

    pub fn add_override(&mut self, given: &Override, problems: &mut Problems) {
        let Override {
            layer,
            name,
            value,
            origin,
        } = given;
        let layer = *layer;
        let Some(node) = parse_override(name, value, origin, problems) else {
            return;
        };
        let key = Key {
            text: name.clone(),
            origin: origin.clone(),
        };
        match name.split_once('.') {
            Some(("datasets", rest)) => self.add_dataset_path(layer, rest, node, origin, problems),
            Some(("cluster", rest)) => self.add_cluster(layer, rest, &key, node, problems),
            _ => self.add_top(layer, key, node, problems),
        }
    }

    fn add_top(&mut self, layer: Layer, key: Key, node: Node, problems: &mut Problems) {
        if key.text == "cluster" {
            return self.add_cluster_mapping(layer, key, node, problems);
        }
        if !node.is_null() {
            self.written.insert(key.text.clone());
        }
        if key.text == PRETRAINING {
            return self.add_datasets(layer, key, as_text(node), problems);
        }
        match fields::find(&key.text) {
            Some(field) if field.name == "datasets" => {
                self.add_datasets(layer, key, node, problems)
            }
            Some(field) => self.put(layer, field.name.to_owned(), key, node, problems),
            None => match unsupported::find(&key.text, &node) {
                Some(fate) => self.meet(fate, &key, problems),
                None if node.is_null() => self.empty.push(shorten(&key.text)),
                None => unknown(&key, "", fields::names(), problems),
            },
        }
    }

    /// Handles a key that is no field but known: notes or refuses it.
    fn meet(&mut self, fate: Fate, key: &Key, problems: &mut Problems) {
        match fate {
            Fate::Honoured => {}
            Fate::DoneOtherwise(instead) => {
                self.done_otherwise.push((key.text.clone(), instead));
            }
            Fate::PassedOver => self.passed_over.push(key.text.clone()),
            Fate::Refused(advice) => not_supported(key, advice, problems),
        }
    }

    fn add_cluster_mapping(&mut self, layer: Layer, key: Key, node: Node, problems: &mut Problems) {
        if node.is_null() {
            return;
        }
        let Value::Mapping(entries) = node.value else {
            let message = format!(
                "`cluster` is a mapping (cluster: {{min_workers: 2}}), found {}",
                node.describe()
            );
            problems.add(&key.origin, message);
            return;
        };
        for (inner, node) in entries {
            let name = inner.text.clone();
            self.add_cluster(layer, &name, &inner, node, problems);
        }
    }

    fn add_cluster(
        &mut self,
        layer: Layer,
        name: &str,
        key: &Key,
        node: Node,
        problems: &mut Problems,
    ) {
        let full = format!("cluster.{name}");
        let key = Key {
            text: full.clone(),
            origin: key.origin.clone(),
        };
        match fields::find(&full) {
            Some(field) => self.put(layer, field.name.to_owned(), key, node, problems),
            None => unknown(
                &key,
                "",
                ["cluster.min_workers", "cluster.max_workers"].into_iter(),
                problems,
            ),
        }
    }

    /// Adds `datasets` as a whole: it replaces what an earlier source said.
    fn add_datasets(&mut self, layer: Layer, key: Key, node: Node, problems: &mut Problems) {
        if node.is_null() {
            return;
        }
        self.datasets_given = true;
        let same_layer = self
            .values
            .iter()
            .find(|(name, given)| name.starts_with("datasets.") && given.layer == layer);
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
            match &self.datasets_of_flags {
                None => self.datasets_of_flags = Some(given),
                Some(first) => {
                    if !first.node.says_the_same(&node) {
                        contradicts(&key, &node, first, problems);
                    }
                    return;
                }
            }
        }
        self.values.retain(|name, _| !name.starts_with("datasets."));
        let entries = match node.value {
            Value::Sequence(items) => items,
            _ => vec![node],
        };
        if entries.is_empty() {
            problems.add(
                &key.origin,
                "`datasets` is empty: name the data to train on",
            );
        }
        if entries.len() > MAX_DATASETS {
            let message = format!(
                "{} datasets are too many (at most {MAX_DATASETS})",
                entries.len()
            );
            return problems.add(&key.origin, message);
        }
        for (index, entry) in entries.into_iter().enumerate() {
            self.add_dataset(layer, index, &key, entry, problems);
        }
    }

    fn add_dataset(
        &mut self,
        layer: Layer,
        index: usize,
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
                    problems.add(&origin, format!("dataset {} has no `path`", index + 1));
                }
                for (key, node) in entries {
                    self.add_dataset_field(layer, index, key, node, problems);
                }
            }
            Value::Scalar { .. } => {
                let key = Key {
                    text: key.text.clone(),
                    origin,
                };
                self.put(
                    layer,
                    format!("datasets.{index}.path"),
                    key,
                    entry,
                    problems,
                );
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
        index: usize,
        key: Key,
        node: Node,
        problems: &mut Problems,
    ) {
        match key.text.as_str() {
            "message_property_mappings" => {
                return self.add_message_keys(layer, index, node, problems);
            }
            "type" if matches!(node.value, Value::Mapping(_)) => {
                return self.add_user_defined(layer, index, key, node, problems);
            }
            // LLaMA-Factory's way to say what a dataset's rows look like.
            "formatting" | "columns" | "tags" => {
                return match llama_factory_columns::dataset_fields(&key, node) {
                    Ok(fields) => fields.into_iter().for_each(|(key, node)| {
                        self.add_dataset_field(layer, index, key, node, problems);
                    }),
                    Err(message) => problems.add(&key.origin, message),
                };
            }
            _ => {}
        }
        match fields::find_in_dataset(&key.text) {
            Some(field) => {
                let name = field.name.replace("[]", &format!(".{index}"));
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
        index: usize,
        key: Key,
        node: Node,
        problems: &mut Problems,
    ) {
        let Value::Mapping(entries) = node.value else {
            return;
        };
        let kind = Node::scalar("user_defined", false, &node.origin);
        self.put(layer, format!("datasets.{index}.type"), key, kind, problems);
        for (key, node) in entries {
            match USER_DEFINED.contains(&key.text.as_str()) {
                true => self.add_dataset_field(layer, index, key, node, problems),
                false if node.is_null() => self.empty.push(shorten(&key.text)),
                false => unknown(&key, " of `type`", USER_DEFINED.into_iter(), problems),
            }
        }
    }

    /// Adds Axolotl's `message_property_mappings: {role: from, content: value}`.
    fn add_message_keys(
        &mut self,
        layer: Layer,
        index: usize,
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
                    let name = format!("datasets.{index}.field_{}", key.text);
                    self.put(layer, name, key, node, problems);
                }
                // The template's name of the thinking, and the data's.
                name if REASONING.contains(&name) => {
                    let field = |name: &str| format!("datasets.{index}.{name}");
                    let read = Node::scalar(name, true, &node.origin);
                    self.put(
                        layer,
                        field("template_thinking_key"),
                        key.clone(),
                        read,
                        problems,
                    );
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
    fn add_dataset_path(
        &mut self,
        layer: Layer,
        rest: &str,
        node: Node,
        origin: &Origin,
        problems: &mut Problems,
    ) {
        let Some((index, name)) = rest
            .split_once('.')
            .and_then(|(i, name)| Some((i.parse().ok()?, name)))
        else {
            return problems.add(
                origin,
                "write datasets.<number>.<field>, for example datasets.0.path",
            );
        };
        let have = self.datasets();
        if index > have || index >= MAX_DATASETS {
            let message = format!(
                "there is no dataset {index}: the job has {have}, and datasets.{have} would append one"
            );
            return problems.add(origin, message);
        }
        if index == have && name != "path" {
            let message =
                format!("there is no dataset {index} yet; give datasets.{index}.path first");
            return problems.add(origin, message);
        }
        let key = Key {
            text: name.to_owned(),
            origin: origin.clone(),
        };
        self.add_dataset_field(layer, index, key, node, problems);
    }

    /// Adds the value of a field. A later source wins. Within a file or the environment a field is given once; on a command line
    /// again only with the same value.
    fn put(&mut self, layer: Layer, name: String, key: Key, node: Node, problems: &mut Problems) {
        match self.values.get(&name) {
            Some(first) if first.layer > layer => return,
            Some(first) if first.layer == layer => {
                if layer != Layer::Flag {
                    twice(&key, &first.written, &first.origin, problems);
                } else if !first.node.says_the_same(&node) {
                    contradicts(&key, &node, first, problems);
                }
                return;
            }
            _ => {}
        }
        let given = Given {
            written: key.text,
            origin: key.origin,
            layer,
            node,
        };
        self.values.insert(name, given);
    }
}

/// Entries of datasets that are plain text where they do not say what they are.
fn as_text(node: Node) -> Node {
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

/// Reports two values of one field on one command line.
fn contradicts(key: &Key, node: &Node, first: &Given, problems: &mut Problems) {
    let message = format!(
        "gives {}, but {} gives {} for the same field; remove one",
        node.describe(),
        first.origin,
        first.node.describe()
    );
    problems.add(&key.origin, message);
}

fn not_supported(key: &Key, advice: &str, problems: &mut Problems) {
    problems.add(
        &key.origin,
        format!("`{}` is not supported: {advice}", shorten(&key.text)),
    );
}

fn twice(key: &Key, first_written: &str, first: &Origin, problems: &mut Problems) {
    let place = first.place();
    let text = shorten(&key.text);
    let message = if key.text == first_written {
        format!("`{text}` is given twice, first at {place}")
    } else {
        format!(
            "`{text}` means the same as `{}`, given at {place}; remove one",
            shorten(first_written)
        )
    };
    problems.add(&key.origin, message);
}

fn unknown(
    key: &Key,
    inside: &str,
    candidates: impl Iterator<Item = &'static str>,
    problems: &mut Problems,
) {
    let hint = did_you_mean(&key.text, candidates);
    problems.add(
        &key.origin,
        format!("unknown field{inside} `{}`{hint}", shorten(&key.text)),
    );
}
