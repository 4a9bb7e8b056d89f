//! LLaMA-Factory's datasets: names that its `dataset_info.json` explains.
//!
//! Source of the names: LLaMA-Factory, `data/README.md` and `hparams` (0.9.5).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};

use super::did_you_mean::did_you_mean;
use super::error::{Origin, Problems};
use super::merge::{Given, MAX_DATASETS, Merged};
use super::quote::shorten;
use super::yaml::{Key, Node, Value};

type Fields = Vec<(Key, Node)>;

/// The stage in which texts are learned whole.
const PRETRAINING: &str = "pt";
const WHOLE_TEXTS: &str = "`stage: pt` learns texts whole, and this dataset does not say that it is one: add `type: text`, or use stage: sft";
const INFO: &str = "dataset_info.json";
const USUAL_DIR: &str = "data";
const MAX_INFO_BYTES: u64 = 16 << 20;

/// Puts the files and shapes in place of the names that a list of datasets holds.
pub(super) fn name_datasets(
    merged: &mut Merged,
    list: &'static str,
    job_dir: Option<&Path>,
    problems: &mut Problems,
) {
    let info = Info::find(merged, job_dir);
    // As every value of a key of others is read.
    let pretraining = merged
        .written("stage")
        .is_some_and(|stage| stage.trim().eq_ignore_ascii_case(PRETRAINING));
    let mut entries = Vec::new();
    for index in 0..merged.datasets(list) {
        let Some(given) = merged.get(&format!("{list}.{index}.path")) else {
            return;
        };
        let Value::Scalar { text, .. } = &given.node.value else {
            return;
        };
        let names: Vec<&str> = text
            .split(',')
            .map(str::trim)
            .filter(|name| !name.is_empty())
            .collect();
        let is_named = merged.fields_of_dataset(list, index) == 1;
        if !is_named {
            // Written out, so there is nothing to look up.
            if pretraining {
                check_texts(merged, list, problems);
            }
            return;
        }
        for name in names {
            let found = entry(&info, given, name);
            let found = found.and_then(|fields| match pretraining {
                true => whole_texts(&info, name, fields, &given.origin),
                false => Ok(fields),
            });
            let mapping = |entries| Node {
                origin: given.origin.clone(),
                value: Value::Mapping(entries),
            };
            match found.map(mapping) {
                Ok(node) => entries.push((given.layer, key(given), node)),
                Err(message) => problems.add(&given.origin, message),
            }
        }
    }
    if entries.len() > MAX_DATASETS {
        return;
    }
    merged.replace_datasets(list, entries, problems);
}

/// Refuses datasets that are written out and do not say what they are, where the stage learns texts whole.
fn check_texts(merged: &Merged, list: &str, problems: &mut Problems) {
    for index in 0..merged.datasets(list) {
        let of = |field: &str| merged.get(&format!("{list}.{index}.{field}"));
        if let (Some(path), None) = (of("path"), of("type")) {
            problems.add(&path.origin, WHOLE_TEXTS.to_owned());
        }
    }
}

/// Whether a name is of a file or folder, or an id on the hub, rather than one of dataset_info.json.
fn is_path(name: &str) -> bool {
    name.contains(['/', '.', '\\']) || Path::new(name).exists()
}

fn key(given: &Given) -> Key {
    Key {
        text: given.written.clone(),
        origin: given.origin.clone(),
    }
}

/// What a name stands for: the fields of an entry of `datasets`.
fn entry(info: &Info, given: &Given, name: &str) -> Result<Fields, String> {
    let described = match &info.datasets {
        Ok(datasets) => datasets.get(name),
        Err(_) if is_path(name) => None,
        Err(reason) => {
            return Err(format!(
                "`{}` names `{}`, but {}: {reason}; give dataset_dir, or the path of a file",
                shorten(&given.written),
                shorten(name),
                info.path.display()
            ));
        }
    };
    let Some(described) = described else {
        // A path, which LLaMA-Factory does not take.
        if let Ok(datasets) = &info.datasets
            && !is_path(name)
        {
            let hint = did_you_mean(name, datasets.keys().map(String::as_str));
            return Err(format!(
                "`{}` names `{}`, which is neither in {} nor a file{hint}",
                shorten(&given.written),
                shorten(name),
                info.path.display()
            ));
        }
        let path = Key {
            text: "path".to_owned(),
            origin: given.origin.clone(),
        };
        let node = Node::scalar(name, true, &given.origin);
        return Ok(vec![(path, node)]);
    };
    if !["hf_hub_url", "file_name"]
        .iter()
        .any(|key| described.contains_key(*key))
    {
        return Err(format!(
            "`{}` in {} has neither hf_hub_url nor file_name: nothing else is read",
            shorten(name),
            info.path.display()
        ));
    }
    Ok(fields_of(described, info, &given.origin))
}

/// The same fields where the stage learns texts whole: those of the column that LLaMA-Factory takes for the prompt.
///
/// Source: LLaMA-Factory 0.9.5, `PretrainDatasetProcessor` and `AlpacaDatasetConverter`.
fn whole_texts(
    info: &Info,
    name: &str,
    mut fields: Fields,
    origin: &Origin,
) -> Result<Fields, String> {
    let described = info.datasets.as_ref().ok().and_then(|all| all.get(name));
    let column = described.map(text_column).transpose().map_err(|why| {
        format!(
            "`stage: pt` learns the text of one column whole, and `{}` {why}",
            shorten(name)
        )
    })?;
    fields.retain(|(key, _)| !["formatting", "columns", "tags"].contains(&key.text.as_str()));
    let mut say = |text: &str, value: &str| {
        let key = Key {
            text: text.to_owned(),
            origin: origin.clone(),
        };
        fields.push((key, Node::scalar(value, true, origin)));
    };
    say("type", "text");
    if let Some(column) = column {
        say("field", column);
    }
    Ok(fields)
}

/// The column of a dataset whose text is learned whole, or why there is none, in words that follow the dataset's name.
fn text_column(described: &Map<String, Json>) -> Result<&str, &'static str> {
    let formatting = described.get("formatting").and_then(Json::as_str);
    if formatting.is_some_and(|formatting| formatting != "alpaca") {
        return Err("holds conversations; stage: sft learns their answers");
    }
    let column = |name: &str| described.get("columns")?.get(name)?.as_str();
    match (column("prompt"), column("query")) {
        (Some(text), None) => Ok(text),
        (Some(_), Some(_)) => Err(
            "has a `query` beside the `prompt`; leave it out of `columns` in dataset_info.json, or use stage: sft",
        ),
        (None, _) => Err(
            "does not say which: write `columns: {prompt: COLUMN}` in dataset_info.json, or use stage: sft",
        ),
    }
}

/// The fields of a dataset that an entry of dataset_info.json describes.
fn fields_of(described: &Map<String, Json>, info: &Info, origin: &Origin) -> Fields {
    let scalar = |text: &str| Node::scalar(text, true, origin);
    let pair = |text: &str, node: Node| {
        let key = Key {
            text: text.to_owned(),
            origin: origin.clone(),
        };
        (key, node)
    };
    let mut entries = Vec::new();
    let mut has_format = false;
    for (name, value) in described {
        let text = match value {
            Json::String(text) => text.clone(),
            other => other.to_string(),
        };
        match name.as_str() {
            "file_name" if !described.contains_key("hf_hub_url") => {
                let path = info.folder.join(&text);
                entries.push(pair("path", scalar(&path.to_string_lossy())));
            }
            // Where it is on the hub, its files elsewhere do not count.
            "hf_hub_url" => entries.push(pair("path", scalar(&text))),
            // Where else the same data is.
            "file_name" | "ms_hub_url" | "om_hub_url" => {}
            "formatting" | "columns" | "tags" | "split" | "ranking" | "num_samples" => {
                has_format |= name == "formatting";
                entries.push(pair(name, node_of(value, origin)));
            }
            "subset" => entries.push(pair("name", scalar(&text))),
            "folder" => entries.push(pair("data_dir", scalar(&text))),
            other => entries.push(pair(other, node_of(value, origin))),
        }
    }
    if !has_format {
        entries.push(pair("formatting", scalar("alpaca")));
    }
    entries
}

/// A value of a JSON file as one of the job, at the place that named it.
fn node_of(json: &Json, origin: &Origin) -> Node {
    let value = match json {
        Json::Null => return Node::scalar("", false, origin),
        Json::String(text) => return Node::scalar(text, true, origin),
        Json::Bool(_) | Json::Number(_) => return Node::scalar(&json.to_string(), false, origin),
        Json::Array(items) => {
            Value::Sequence(items.iter().map(|item| node_of(item, origin)).collect())
        }
        Json::Object(fields) => Value::Mapping(
            fields
                .iter()
                .map(|(name, value)| {
                    let key = Key {
                        text: name.clone(),
                        origin: origin.clone(),
                    };
                    (key, node_of(value, origin))
                })
                .collect(),
        ),
    };
    Node {
        origin: origin.clone(),
        value,
    }
}

/// What a dataset_info.json says.
struct Info {
    path: PathBuf,
    folder: PathBuf,
    datasets: Result<BTreeMap<String, Map<String, Json>>, String>,
}

impl Info {
    /// Reads the file in `dataset_dir`, which is meant from the current folder or from the job file's.
    fn find(merged: &Merged, job_dir: Option<&Path>) -> Self {
        let named = merged.get("dataset_dir").map(|given| &given.node.value);
        let folder = match named {
            Some(Value::Scalar { text, .. }) => PathBuf::from(text),
            _ => PathBuf::from(USUAL_DIR),
        };
        let beside = job_dir.map(|dir| dir.join(&folder));
        let folder = match beside {
            Some(beside) if !folder.join(INFO).exists() && beside.join(INFO).exists() => beside,
            _ => folder,
        };
        let path = folder.join(INFO);
        Self {
            datasets: read(&path),
            folder,
            path,
        }
    }
}

fn read(path: &Path) -> Result<BTreeMap<String, Map<String, Json>>, String> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_INFO_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => "there is no such file".to_owned(),
            _ => error.to_string(),
        })?;
    if bytes.len() as u64 > MAX_INFO_BYTES {
        return Err(format!("it is longer than {MAX_INFO_BYTES} bytes"));
    }
    let json: Json =
        serde_json::from_slice(&bytes).map_err(|error| format!("it is not valid JSON: {error}"))?;
    let Json::Object(datasets) = json else {
        return Err("it is no object of datasets by name".to_owned());
    };
    let described = datasets
        .into_iter()
        .filter_map(|(name, value)| match value {
            Json::Object(fields) => Some((name, fields)),
            _ => None,
        });
    Ok(described.collect())
}
