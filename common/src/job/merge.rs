//! Merges the three sources into one flat map: canonical field name (`datasets.0.path`) to the value that won and where it
//! was given. Unknown names end here.

mod datasets;
mod told;

use std::collections::BTreeMap;

use super::did_you_mean::did_you_mean;
use super::error::{Origin, Problems};
use super::fields::{self, DATASETS, LISTS, TEST_DATASETS};
use super::overrides::{dotted_name, is_other_variable, is_service_variable, parse_override};
use super::quote::shorten;
use super::switch::parse_switch;
use super::unsupported::{self, Fate};
use super::yaml::{Key, Node, Value};

use datasets::as_text;
pub(super) use datasets::{MAX_DATASETS, PRETRAINING};

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

/// TRL's mapping of environment variables.
const ENVIRONMENT: &str = "env";

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
        let mut value = value;
        let (name, origin) = match flag.strip_prefix("--") {
            Some(name) => {
                let name = name.replace('-', "_");
                let name = match fields::negated(&name) {
                    Some(positive) => {
                        value = match parse_switch(value) {
                            Some(true) => "false",
                            Some(false) => "true",
                            None => value,
                        };
                        positive.to_owned()
                    }
                    None => name,
                };
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
        let rest = LISTS.iter().find_map(|list| {
            let rest = self.name.strip_prefix(list)?;
            rest.strip_prefix('.')
        });
        match rest {
            None => 0,
            Some(rest) if rest.ends_with(".path") || rest.ends_with(".data_files") => 1,
            Some(_) => 2,
        }
    }
}

/// The values of all sources by field, and what was passed over.
#[derive(Default)]
pub(super) struct Merged {
    values: BTreeMap<String, Given>,
    pub datasets_given: bool,
    /// Values of `datasets` and of `test_datasets` as a whole, as the command line gives them.
    datasets_of_flags: BTreeMap<&'static str, Given>,
    /// Keys that are known, but change nothing here.
    passed_over: Vec<String>,
    /// Keys in whose place something else is done, and what that is.
    done_otherwise: Vec<(String, &'static str)>,
    /// Keys that nobody knows, without a value.
    empty: Vec<String>,
    /// Variables that the job would have set.
    variables: Vec<String>,
    /// Variables that Kubernetes made.
    service_variables: Vec<String>,
    /// Keys at the top, as they were written, whatever became of them, with the text of a single value.
    written: BTreeMap<String, String>,
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

    /// Whether a key was given at the top, whatever became of it.
    pub fn is_written(&self, key: &str) -> bool {
        self.written.contains_key(key)
    }

    /// The text of the single value that a key was given at the top, whatever became of it.
    pub fn written(&self, key: &str) -> Option<&str> {
        self.written.get(key).map(String::as_str)
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
            Some((DATASETS, rest)) => {
                self.add_dataset_path(layer, (DATASETS, rest), node, origin, problems);
            }
            Some((TEST_DATASETS, rest)) => {
                self.add_dataset_path(layer, (TEST_DATASETS, rest), node, origin, problems);
            }
            Some(("cluster", rest)) => self.add_cluster(layer, rest, &key, node, problems),
            _ => self.add_top(layer, key, node, problems),
        }
    }

    fn add_top(&mut self, layer: Layer, key: Key, node: Node, problems: &mut Problems) {
        if key.text == "cluster" {
            return self.add_cluster_mapping(layer, key, node, problems);
        }
        if !node.is_null() {
            let text = match &node.value {
                Value::Scalar { text, .. } => text.clone(),
                Value::Sequence(_) | Value::Mapping(_) => String::new(),
            };
            self.written.insert(key.text.clone(), text);
        }
        if key.text == PRETRAINING {
            return self.add_datasets(layer, DATASETS, key, as_text(node), problems);
        }
        if key.text == ENVIRONMENT && !node.is_null() {
            return self.add_environment(&key, &node, problems);
        }
        match fields::find(&key.text) {
            Some(field) if LISTS.contains(&field.name) => {
                self.add_datasets(layer, field.name, key, node, problems);
            }
            Some(field) => self.put(layer, field.name.to_owned(), key, node, problems),
            None => match unsupported::find(&key.text, &node) {
                Some(fate) => self.meet(fate, &key, problems),
                None if node.is_null() => self.empty.push(shorten(&key.text)),
                None => unknown(&key, "", fields::names(), problems),
            },
        }
    }

    /// Names the variables that TRL would set; their values may be secret.
    fn add_environment(&mut self, key: &Key, node: &Node, problems: &mut Problems) {
        let Value::Mapping(entries) = &node.value else {
            let message = format!(
                "`{ENVIRONMENT}` is a mapping of variables, found {}",
                node.describe()
            );
            return problems.add(&key.origin, message);
        };
        self.variables
            .extend(entries.iter().map(|(name, _)| shorten(&name.text)));
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

    /// Adds the value of a field. A later source wins. Within a file or the environment a field is given once; on a command line
    /// again only with the same value.
    fn put(&mut self, layer: Layer, name: String, key: Key, node: Node, problems: &mut Problems) {
        match self.values.get(&name) {
            Some(first) if first.layer > layer => return,
            // Under another name, nothing contradicts nothing.
            Some(first) if first.layer == layer && first.written != key.text && node.is_null() => {
                return;
            }
            Some(first) if first.written != key.text && first.node.is_null() => {}
            // Nor does the same under two of its names.
            Some(first)
                if first.layer == layer
                    && first.written != key.text
                    && first.node.says_the_same(&node) =>
            {
                return;
            }
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
