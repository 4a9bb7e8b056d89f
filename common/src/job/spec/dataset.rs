//! A dataset of a job: where it is, which of its rows are read, and what they look like.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::mixture::Selection;
use crate::job::mask::MaskSpec;
use crate::job::prompt_format::PromptFormat;
use crate::job::split::{Split, TRAIN};

/// The path that stands for standard input, and what it is called for people.
pub const STDIN: &str = "-";
pub const STANDARD_INPUT: &str = "standard input";

/// A dataset of the job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DatasetSpec {
    /// What the job names: a file of rows, a folder, a pattern of files, or a dataset on the hub.
    pub path: PathBuf,
    /// The files that it stands for, by split and in order; see [`files`](Self::files). Only where the data is prepared.
    #[serde(skip)]
    pub files: Vec<(String, Vec<PathBuf>)>,
    /// Files of it that are read alone. Default: all of a split.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data_files: Vec<String>,
    /// The same by split, where the job says which files are which. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub split_files: Vec<(String, Vec<String>)>,
    /// Folder in it that is read alone. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_dir: Option<String>,
    /// Configuration of a dataset on the hub. Default: its default one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Branch, tag or commit of a dataset on the hub. Default: main.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Where the files came from, where that is the hub.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hub: Option<HubSource>,
    /// Which content a run began with, by the name that the job has for it: of standard input the digest, of a file on the web the
    /// version.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pinned: Vec<(String, String)>,
    /// Format of the files. Default: they tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// Shape of the rows. Default: the columns of each row tell.
    pub kind: DatasetKind,
    /// `train`, or slices of it as in `train[100:200]` or `train[:20%]`; see [`Split`]. Default: every row.
    pub split: Option<String>,
    /// Number of rows of the split that are read at most, at least 1. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_samples: Option<u64>,
    /// Which rows of the split those are, and how they count. Default: the first ones, each once.
    #[serde(default, skip_serializing_if = "Selection::is_default")]
    pub selection: Selection,
    pub fields: FieldNames,
    /// The fixed text that rows of instructions are put into. Default: Alpaca's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<PromptFormat>,
    /// Roles of messages by the names that the data has for them, each with the role that the template knows. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub roles: Vec<(String, String)>,
    /// Whether the column of system messages is read beside a conversation. Default: off.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub has_system_column: bool,
    /// Whether system messages are left out of conversations. Default: off.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub drop_system_message: bool,
    /// Which messages of conversations are learned, and which of their ends. Default: the assistant's, with theirs.
    #[serde(default, skip_serializing_if = "MaskSpec::is_default")]
    pub mask: MaskSpec,
}

impl DatasetSpec {
    /// A dataset of all rows of a path.
    pub fn new(path: PathBuf, kind: DatasetKind, fields: FieldNames) -> Self {
        Self {
            path,
            files: Vec::new(),
            data_files: Vec::new(),
            split_files: Vec::new(),
            data_dir: None,
            name: None,
            revision: None,
            hub: None,
            pinned: Vec::new(),
            format: None,
            kind,
            split: None,
            max_samples: None,
            selection: Selection::default(),
            fields,
            prompt: None,
            roles: Vec::new(),
            has_system_column: false,
            drop_system_message: false,
            mask: MaskSpec::default(),
        }
    }

    /// The files by split; the path itself where nobody has looked what it stands for.
    pub fn files(&self) -> Vec<(String, Vec<PathBuf>)> {
        match self.files.is_empty() {
            true => vec![(TRAIN.to_owned(), vec![self.path.clone()])],
            false => self.files.clone(),
        }
    }

    /// One of the files, split after split; the path where there are fewer.
    pub fn file(&self, index: usize) -> &Path {
        let mut files = self.files.iter().flat_map(|(_, paths)| paths);
        files.nth(index).unwrap_or(&self.path)
    }

    /// The dataset as people know it: its path, standard input, or an address without what may be a key in it.
    pub fn shown(&self) -> String {
        match self.is_stdin() {
            true => STANDARD_INPUT.to_owned(),
            false => shown_address(&self.path.to_string_lossy()),
        }
    }

    /// One of the files as people know it: what came through standard input is in a copy that they do not.
    pub fn shown_file(&self, index: usize) -> &Path {
        match self.is_stdin() {
            true => Path::new(STANDARD_INPUT),
            false => self.file(index),
        }
    }

    /// Whether its rows come through standard input.
    pub fn is_stdin(&self) -> bool {
        self.path == Path::new(STDIN)
    }

    /// The files of the splits that are read, each once.
    pub fn read_files(&self) -> Vec<PathBuf> {
        let splits = self.read_splits().into_iter();
        splits.flat_map(|(_, paths)| paths).collect()
    }

    /// The splits that are read, and their files.
    pub fn read_splits(&self) -> Vec<(String, Vec<PathBuf>)> {
        let split = self.rows().unwrap_or_default();
        let files = self.files().into_iter();
        files.filter(|(name, _)| split.reads(name)).collect()
    }

    /// The files that the job names in it, by split; none where it leaves that open.
    pub fn named_files(&self) -> Vec<(String, Vec<String>)> {
        let mut named = self.split_files.clone();
        if !self.data_files.is_empty() {
            named.push((TRAIN.to_owned(), self.data_files.clone()));
        }
        named
    }

    /// Which rows are read; the error goes after the field's name.
    pub fn rows(&self) -> Result<Split, String> {
        let split = self
            .split
            .as_deref()
            .map_or(Ok(Split::default()), Split::parse)?;
        let names: Vec<&str> = self.files.iter().map(|(name, _)| name.as_str()).collect();
        Ok(split.among(&names))
    }
}

/// Schemes of object stores, in whose addresses `?` is a character and a container may stand before an `@`.
const OBJECT_STORES: [&str; 9] = [
    "s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss", "adl",
];

/// An address without its query and without what stands before an `@`, in which keys may be; any other text as it is.
pub fn shown_address(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else {
        return text.to_owned();
    };
    let bucket = rest.split('/').next().unwrap_or_default();
    let is_of_store = OBJECT_STORES.contains(&scheme.to_ascii_lowercase().as_str());
    if is_of_store && !bucket.contains(':') {
        return text.to_owned();
    }
    let rest = rest.split('?').next().unwrap_or_default();
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = host.rsplit('@').next().unwrap_or_default();
    format!("{scheme}://{host}{path}")
}

/// A dataset on the hub, as it was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HubSource {
    /// `owner/name`, as the hub has it.
    pub id: String,
    pub commit: String,
    /// Whether it is the hub's own conversion to Parquet.
    #[serde(default)]
    pub is_converted: bool,
}

/// Shape of the rows of a dataset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DatasetKind {
    /// The columns of each row tell.
    Auto,
    Messages,
    PromptCompletion,
    /// Axolotl's Alpaca: an instruction, perhaps an input, and an output, in a fixed text; see [`DatasetSpec::prompt`].
    Alpaca,
    /// Axolotl's `input_output`: texts one after the other, each of which says whether it is learned.
    Segments,
    /// Tokens and which of them are learned.
    Tokenized,
    /// LLaMA-Factory's Alpaca: the same columns, perhaps a system message and earlier turns, as a conversation.
    Instructions,
    Text,
}

/// Names under which a message has its thinking.
pub const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Column names, where a dataset has its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldNames {
    pub messages: String,
    pub prompt: String,
    pub completion: String,
    pub text: String,
    /// Key of the role in a message.
    pub role: String,
    /// Key of the text in a message.
    pub content: String,
    pub tools: String,
    // Left out of the wire and the digest where they have their usual names, as in jobs from before there were these fields.
    #[serde(
        default = "usual::instruction",
        skip_serializing_if = "usual::is_instruction"
    )]
    pub instruction: String,
    #[serde(default = "usual::input", skip_serializing_if = "usual::is_input")]
    pub input: String,
    #[serde(default = "usual::output", skip_serializing_if = "usual::is_output")]
    pub output: String,
    #[serde(default = "usual::system", skip_serializing_if = "usual::is_system")]
    pub system: String,
    #[serde(default = "usual::history", skip_serializing_if = "usual::is_history")]
    pub history: String,
    /// Key of the thinking in a message, where the data has its own, and the key that the template reads it from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thinking: Option<[String; 2]>,
}

/// Usual names of columns, and whether a name is one.
mod usual {
    macro_rules! names {
        ($($name:ident $is_usual:ident),*) => {
            $(pub fn $name() -> String {
                stringify!($name).to_owned()
            }

            pub fn $is_usual(name: &str) -> bool {
                name == stringify!($name)
            })*
        };
    }

    names!(instruction is_instruction, input is_input, output is_output, system is_system, history is_history);
}

impl Default for FieldNames {
    fn default() -> Self {
        let name = |s: &str| s.to_owned();
        Self {
            messages: name("messages"),
            prompt: name("prompt"),
            completion: name("completion"),
            text: name("text"),
            role: name("role"),
            content: name("content"),
            tools: name("tools"),
            instruction: usual::instruction(),
            input: usual::input(),
            output: usual::output(),
            system: usual::system(),
            history: usual::history(),
            thinking: None,
        }
    }
}

impl FieldNames {
    /// Names of rows of ShareGPT's shape: a column `conversations`, messages with `from` and `value`.
    pub fn sharegpt() -> Self {
        Self {
            messages: "conversations".to_owned(),
            role: "from".to_owned(),
            content: "value".to_owned(),
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::shown_address;

    #[test]
    fn addresses_are_shown_without_what_may_be_a_key() {
        for (address, shown) in [
            ("https://h/a.jsonl?sig=SECRET", "https://h/a.jsonl"),
            (
                "https://user:SECRET@h:80/a@b.jsonl",
                "https://h:80/a@b.jsonl",
            ),
            ("http://h?x=1", "http://h"),
            ("what?.jsonl", "what?.jsonl"),
            ("s3://b/part-?.jsonl", "s3://b/part-?.jsonl"),
            ("s3://KEY:SECRET@b/x", "s3://b/x"),
            ("abfss://box@account.host/x", "abfss://box@account.host/x"),
            ("data/a@b.jsonl", "data/a@b.jsonl"),
        ] {
            assert_eq!(shown_address(address), shown);
        }
    }
}
