//! A job in Muster's own spelling, and the schema of one, for editors.
//!
//! Enters: a job file of whatever dialect. Leaves: the same job with one name for each thing, and what of it is done otherwise or
//! passed over as comments; or a JSON Schema made from the table of fields. What another name or key of the file says beside its
//! value is written out, so that the job stays the same.

use serde_json::{Map, Value as Json, json};

use super::dialect::Dialect;
use super::error::Origin;
use super::fields::{Field, LISTS, TEST_DATASETS, fields};
use super::merge::{Given, Merged};
use super::spec::JobSpec;
use super::yaml::{self, Node, Value};

/// The field that is printed nowhere.
const SECRET: &str = "hub_token";

/// The job's values under the names of the table, in its order. What the user should know of the job becomes comments at the top.
pub(super) fn to_yaml(merged: &Merged, job: &JobSpec, dialect: Dialect) -> String {
    let mut text = String::new();
    for notice in &job.reading.notices {
        text += &format!("# {}\n", notice.replace(char::is_control, " "));
    }
    for field in fields() {
        match field.name.split_once('.') {
            None if LISTS.contains(&field.name) => text += &datasets(merged, field.name),
            None => match merged.get(field.name) {
                Some(_) if field.name == SECRET => {
                    text += &format!("# {SECRET} is left out: give it as a variable\n");
                }
                Some(given) => text += &entry("", field.name, given),
                None => text += &implied(field.name, merged, job, dialect),
            },
            // With the mapping that they are in.
            Some(("cluster", "min_workers")) => text += &cluster(merged),
            Some(_) => {}
        }
    }
    text
}

/// The line of a field that the file does not have, but says in another way.
fn implied(field: &str, merged: &Merged, job: &JobSpec, dialect: Dialect) -> String {
    let best = job.best_model;
    match field {
        "dialect" if dialect == Dialect::LlamaFactory => {
            "dialect: llama_factory  # told by its keys\n".to_owned()
        }
        // An empty one says that there is none, whatever else is said of adapters.
        "adapter" if merged.get_or_null(field).is_some() => "adapter: null\n".to_owned(),
        // LLaMA-Factory's name of patience keeps the last weights, Axolotl's the best.
        "load_best_model_at_end"
            if best.is_some_and(|best| best.early_stopping.is_some() && !best.load_at_end) =>
        {
            format!("{field}: false  # as early_stopping_steps has it\n")
        }
        // TRL's name of the data brings its other split along.
        "dataset_test_split" if merged.datasets(TEST_DATASETS) == 0 => {
            let split = job
                .test_datasets
                .first()
                .and_then(|set| set.split.as_deref());
            split.map_or_else(String::new, |split| {
                format!(
                    "{field}: {}  # as dataset_name has it\n",
                    scalar(split, true)
                )
            })
        }
        _ => String::new(),
    }
}

/// A line of the file; a name that was written otherwise is told.
fn entry(indent: &str, name: &str, given: &Given) -> String {
    let value = flow(&given.node);
    let written = given.written.rsplit('.').next().unwrap_or_default();
    match written == name {
        true => format!("{indent}{name}: {value}\n"),
        false => format!("{indent}{name}: {value}  # {written}\n"),
    }
}

fn datasets(merged: &Merged, list: &str) -> String {
    let mut text = String::new();
    for index in 0..merged.datasets(list) {
        let named = fields().iter().filter_map(|field| {
            let name = field.name.strip_prefix("datasets[].")?;
            let given = merged.get(&format!("{list}.{index}.{name}"))?;
            Some((name, given))
        });
        for (number, (name, given)) in named.enumerate() {
            let indent = if number == 0 { "  - " } else { "    " };
            // The entry of a list of paths has no name of its own.
            let is_list = name == "path" && !given.written.contains("path");
            text += &match is_list {
                true => format!("{indent}{name}: {}\n", flow(&given.node)),
                false => entry(indent, name, given),
            };
        }
    }
    match text.is_empty() {
        true => text,
        false => format!("{list}:\n{text}"),
    }
}

fn cluster(merged: &Merged) -> String {
    let named = ["min_workers", "max_workers"]
        .into_iter()
        .filter_map(|name| {
            let given = merged.get(&format!("cluster.{name}"))?;
            Some(entry("  ", name, given))
        });
    let text: String = named.collect();
    match text.is_empty() {
        true => text,
        false => format!("cluster:\n{text}"),
    }
}

/// A value on one line.
fn flow(node: &Node) -> String {
    match &node.value {
        // Only here may a comma stand in plain text, and divide it.
        Value::Scalar {
            text,
            quoted: false,
        } if is_read_as(&format!("k: {text}"), text) => text.clone(),
        _ => inner(node),
    }
}

/// A value inside a list or a mapping.
// The recursion is as deep as the tree of the job file, which has a bound.
fn inner(node: &Node) -> String {
    match &node.value {
        _ if node.is_null() => "null".to_owned(),
        Value::Scalar {
            text,
            quoted: false,
        } if is_read_as(&format!("{{k: {text}}}"), text) => text.clone(),
        Value::Scalar { text, quoted } => scalar(text, *quoted),
        Value::Sequence(items) => {
            let items: Vec<String> = items.iter().map(inner).collect();
            format!("[{}]", items.join(", "))
        }
        Value::Mapping(entries) => {
            let pair = |(key, node): &(yaml::Key, Node)| {
                format!("{}: {}", scalar(&key.text, false), inner(node))
            };
            let entries: Vec<String> = entries.iter().map(pair).collect();
            format!("{{{}}}", entries.join(", "))
        }
    }
}

/// Whether YAML reads this as a mapping of one key to this plain text.
fn is_read_as(yaml: &str, plain: &str) -> bool {
    let Ok(Some(root)) = yaml::parse(yaml, &|_| Origin::Nowhere) else {
        return false;
    };
    let Value::Mapping(entries) = root.value else {
        return false;
    };
    let [(_, node)] = entries.as_slice() else {
        return false;
    };
    // A line end would be a space after it was read.
    !plain.contains(char::is_control)
        && node.value
            == Value::Scalar {
                text: plain.to_owned(),
                quoted: false,
            }
}

/// A scalar as YAML: plain where it reads back as it is, else as JSON, which is YAML too.
fn scalar(text: &str, quoted: bool) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_./+-".contains(c);
    let starts_well = text.starts_with(|c: char| c.is_ascii_alphabetic() || "/_".contains(c));
    let reads_back = !quoted || !reads_as_other(text);
    match starts_well && reads_back && text.chars().all(is_plain) {
        true => text.to_owned(),
        false => Json::from(text).to_string(),
    }
}

/// Whether a plain scalar would be a number, a switch or nothing.
fn reads_as_other(text: &str) -> bool {
    let words = ["true", "false", "yes", "no", "on", "off", "null", "y", "n"];
    text.parse::<f64>().is_ok() || words.contains(&text.to_ascii_lowercase().as_str())
}

/// A JSON Schema of job files: names, aliases and what each field does.
pub fn schema() -> Json {
    let described = |field: &Field| {
        json!({
            "description": format!("{} Values: {}. Default: {}.", field.help, field.values, field.default)
        })
    };
    let named = |prefix: Option<&str>| {
        let mut properties = Map::new();
        for field in fields() {
            let name = match prefix {
                Some(prefix) => field.name.strip_prefix(prefix),
                None => Some(field.name).filter(|name| !name.contains('.')),
            };
            let Some(name) = name else {
                continue;
            };
            properties.insert(name.to_owned(), described(field));
            for alias in field.aliases {
                let alias_of =
                    json!({"description": format!("Another name of {name}. {}", field.help)});
                properties.insert((*alias).to_owned(), alias_of);
            }
        }
        properties
    };
    let mut top = named(None);
    let entry = json!({
        "type": "object",
        "properties": named(Some("datasets[].")),
    });
    for (list, what) in [
        ("datasets", "The training data"),
        ("test_datasets", "The data to evaluate"),
    ] {
        top.insert(
            list.to_owned(),
            json!({
                "description": format!("{what}: a path, or a list of paths or of mappings."),
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"anyOf": [{"type": "string"}, entry]}}
                ]
            }),
        );
    }
    top.insert(
        "cluster".to_owned(),
        json!({
            "description": "How many workers take part.",
            "type": "object",
            "properties": named(Some("cluster.")),
            "additionalProperties": false
        }),
    );
    // Keys of other programs are known, too, and what is done about them is told by `check`.
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Muster job",
        "type": "object",
        "properties": top
    })
}
