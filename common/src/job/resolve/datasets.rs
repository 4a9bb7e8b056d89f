//! The datasets of a job: where they are, which rows of them, and what their rows look like.

use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::super::quote::shorten;
use super::super::read::Reader;
use super::super::spec::{DatasetKind, DatasetSpec, FieldNames, REASONING};
use super::super::split::Split;
use super::mixture::selection;

/// Most names that a dataset's roles have.
const MAX_ROLES: usize = 100;

pub(super) fn datasets(reader: &mut Reader<'_>) -> Vec<DatasetSpec> {
    let count = reader.merged.datasets();
    if count == 0 && !reader.datasets_given {
        reader.missing("`datasets` is missing: the data to train on");
    }
    // Its names were looked up already.
    reader.text("dataset_dir");
    let common_text_field = reader.text("dataset_text_field");
    (0..count)
        .map(|index| dataset(reader, index, common_text_field.as_deref()))
        .collect()
}

/// Formats of files by Axolotl's names.
const FORMATS: &[(&[&str], &str)] = &[
    (&["json", "jsonl"], "json"),
    (&["csv", "tsv"], "csv"),
    (&["parquet"], "parquet"),
    (&["arrow"], "arrow"),
    (&["text", "txt"], "text"),
];

/// Names of the shapes of rows; the first of each is what people are told.
const KINDS: &[(&[&str], Shape)] = &[
    (&["auto"], Shape::of(DatasetKind::Auto)),
    (
        &[
            "messages",
            "chat_template",
            "chat",
            "conversational",
            "openai",
        ],
        Shape::of(DatasetKind::Messages),
    ),
    (&["sharegpt"], Shape::ShareGpt),
    (
        &["prompt_completion"],
        Shape::of(DatasetKind::PromptCompletion),
    ),
    (&["alpaca"], Shape::of(DatasetKind::Alpaca)),
    (&["instructions"], Shape::of(DatasetKind::Instructions)),
    (
        &["text", "completion", "pretrain"],
        Shape::of(DatasetKind::Text),
    ),
];

/// What `type` says.
#[derive(Clone, Copy)]
enum Shape {
    Kind(DatasetKind),
    /// Messages under ShareGPT's names.
    ShareGpt,
}

impl Shape {
    const fn of(kind: DatasetKind) -> Self {
        Self::Kind(kind)
    }
}

/// Fields that only rows of instructions have, and those that only rows of other shapes have.
const OF_INSTRUCTIONS: [&str; 3] = ["field_instruction", "field_input", "field_output"];
const OF_CONVERTED: [&str; 1] = ["field_history"];
const OF_OTHERS: [&str; 6] = [
    "field_messages",
    "field_prompt",
    "field_completion",
    "field_text",
    "field_role",
    "field_content",
];

fn dataset(reader: &mut Reader<'_>, index: usize, common_text_field: Option<&str>) -> DatasetSpec {
    let name = |field: &str| format!("datasets.{index}.{field}");
    if let Some(given) = reader.merged.get_or_null(&name("path"))
        && given.node.is_null()
    {
        reader.wrong(given, "a file, a folder or a dataset on the hub");
    }
    let shape = reader.choice(&name("type"), KINDS);
    let mut fields = FieldNames::default();
    let kind = match shape {
        Some(Shape::ShareGpt) => {
            fields = FieldNames::sharegpt();
            DatasetKind::Messages
        }
        Some(Shape::Kind(kind)) => kind,
        None => DatasetKind::Auto,
    };
    if let Some(text) = common_text_field {
        fields.text = text.to_owned();
    }
    for (field, slot) in [
        ("field_messages", &mut fields.messages),
        ("field_prompt", &mut fields.prompt),
        ("field_completion", &mut fields.completion),
        ("field_text", &mut fields.text),
        ("field_role", &mut fields.role),
        ("field_content", &mut fields.content),
        ("field_tools", &mut fields.tools),
        ("field_instruction", &mut fields.instruction),
        ("field_input", &mut fields.input),
        ("field_output", &mut fields.output),
        ("field_system", &mut fields.system),
        ("field_history", &mut fields.history),
    ] {
        if let Some(text) = reader.text(&name(field)) {
            *slot = text;
        }
    }
    let has_system_column =
        kind == DatasetKind::Messages && reader.given(&name("field_system")).is_some();
    fields.thinking = thinking(reader, index);
    check_fields(reader, index, kind);
    if kind == DatasetKind::Alpaca && reader.given("test_prompts").is_some() {
        let notice = "test_prompts and `worker generate` ask in the model's chat template, not in the text of `type: alpaca`: write that \
                      text out to see what was learned";
        if !reader.notices.iter().any(|told| told == notice) {
            reader.notices.push(notice.to_owned());
        }
    }
    let max_samples = match reader.given(&name("max_samples")) {
        Some(_) => name("max_samples"),
        None => "max_samples".to_owned(),
    };
    if let Some(given) = reader.given(&max_samples)
        && given.written == "num_samples"
    {
        let notice = "num_samples: the first rows are taken, where LLaMA-Factory draws them";
        reader.notices.push(notice.to_owned());
    }
    let mut dataset = DatasetSpec {
        data_dir: reader.text(&name("data_dir")),
        name: reader.text(&name("name")),
        revision: reader.text(&name("revision")),
        format: reader.choice(&name("ds_type"), FORMATS).map(str::to_owned),
        split: split(reader, &name("split")),
        max_samples: reader.whole(&max_samples, 1..=u64::MAX),
        selection: selection(reader, index),
        roles: roles(reader, index),
        has_system_column,
        drop_system_message: reader.switch(&name("drop_system_message")).unwrap_or(false),
        ..DatasetSpec::new(PathBuf::new(), kind, fields)
    };
    name_files(reader, index, &mut dataset);
    dataset
}

/// Reads `path` and `data_files`: where the data is, and which of its files are read.
fn name_files(reader: &mut Reader<'_>, index: usize, dataset: &mut DatasetSpec) {
    let name = |field: &str| format!("datasets.{index}.{field}");
    let by_split = files_by_split(reader, &name("data_files"));
    let files = match &by_split {
        None => reader.texts(&name("data_files"), None).unwrap_or_default(),
        Some(_) => Vec::new(),
    };
    let has_files = !files.is_empty() || by_split.is_some();
    dataset.split_files = by_split.unwrap_or_default();
    let written = reader.given(&name("path")).is_some();
    let word = match written && has_files {
        true => reader.text(&name("path")),
        false => None,
    };
    // As the library `datasets` has it: a format in place of a path, whose files are given beside it.
    let format = word.filter(|word| !Path::new(word).exists());
    let format = format.and_then(|word| {
        let mut all = FORMATS.iter();
        all.find(|(names, _)| names.contains(&word.as_str()))
    });
    if let Some((_, format)) = format {
        dataset.format = Some((*format).to_owned());
    } else if written {
        dataset.path = reader.input_path(&name("path")).unwrap_or_default();
        dataset.data_files = files;
        return;
    }
    match files.as_slice() {
        [one] => dataset.path = reader.beside_job(Path::new(one)),
        _ => dataset.data_files = files,
    }
}

/// Reads `data_files` where it is a mapping of splits to their files.
fn files_by_split(reader: &mut Reader<'_>, name: &str) -> Option<Vec<(String, Vec<String>)>> {
    let given = reader.given(name)?;
    let Some(Json::Object(splits)) = given.node.to_json() else {
        return None;
    };
    let mut named = Vec::new();
    for (split, files) in splits {
        let texts = match files {
            Json::String(file) => Some(vec![file]),
            Json::Array(files) => files
                .into_iter()
                .map(|file| file.as_str().map(str::to_owned))
                .collect(),
            _ => None,
        };
        let is_name = |c: char| c.is_alphanumeric() || "_.".contains(c);
        match texts.filter(|texts| !texts.is_empty()) {
            Some(texts) if !split.is_empty() && split.chars().all(is_name) => {
                named.push((split, texts));
            }
            Some(_) => {
                let message = format!(
                    "names the split `{}`, which is no name of one: use letters, digits, `_` and `.`",
                    shorten(&split)
                );
                reader.problem(given, message);
            }
            None => reader.wrong(
                given,
                "a file, a list of files, or a mapping of splits to their files (train: a.jsonl)",
            ),
        }
    }
    Some(named)
}

/// Refuses names of columns that rows of this shape do not have.
fn check_fields(reader: &mut Reader<'_>, index: usize, kind: DatasetKind) {
    let is_instructions = matches!(kind, DatasetKind::Alpaca | DatasetKind::Instructions);
    let mut refuse = |fields: &[&str], message: &str| {
        for field in fields {
            if let Some(given) = reader.given(&format!("datasets.{index}.{field}")) {
                reader.problem(given, message.to_owned());
            }
        }
    };
    if !is_instructions {
        refuse(
            &OF_INSTRUCTIONS,
            "is read with `type: alpaca` or `type: instructions` only; without it, give field_prompt and field_completion",
        );
    }
    if kind != DatasetKind::Instructions {
        refuse(
            &OF_CONVERTED,
            "is read with `type: instructions` only; in a conversation it is a message",
        );
    }
    if !is_instructions && kind != DatasetKind::Messages || kind == DatasetKind::Alpaca {
        refuse(
            &["field_system"],
            "is read with `type: instructions`, messages and sharegpt only",
        );
    }
    if is_instructions {
        refuse(
            &OF_OTHERS,
            "is not read with `type: alpaca` and `type: instructions`, which have field_instruction, field_input and field_output",
        );
    }
    if kind == DatasetKind::Alpaca {
        refuse(
            &["field_tools"],
            "is not read with `type: alpaca`, whose text has no tools",
        );
    }
}

/// Reads under which key the data has a message's thinking, and under which one the template reads it.
fn thinking(reader: &mut Reader<'_>, index: usize) -> Option<[String; 2]> {
    let name = |field: &str| format!("datasets.{index}.{field}");
    let own = reader.text(&name("field_thinking"));
    let read = reader.text(&name("template_thinking_key"));
    if let Some(read) = &read
        && !REASONING.contains(&read.as_str())
        && let Some(given) = reader.given(&name("template_thinking_key"))
    {
        let message = format!(
            "must be one of {}, as templates have it",
            REASONING.join(", ")
        );
        reader.problem(given, message);
    }
    // Axolotl's defaults for the one that is not given.
    let usual = || REASONING[0].to_owned();
    let pair = match (own, read) {
        (None, None) => return None,
        (own, read) => [own.unwrap_or_else(usual), read.unwrap_or_else(usual)],
    };
    (pair[0] != pair[1]).then_some(pair)
}

/// Reads the data's own names of roles: Axolotl's `roles: {user: [human], assistant: [gpt]}`.
fn roles(reader: &mut Reader<'_>, index: usize) -> Vec<(String, String)> {
    let Some(given) = reader.given(&format!("datasets.{index}.roles")) else {
        return Vec::new();
    };
    let wanted =
        "a mapping of roles to the data's names for them, as in {user: [human], assistant: [gpt]}";
    let Some(Json::Object(roles)) = given.node.to_json() else {
        reader.wrong(given, wanted);
        return Vec::new();
    };
    let mut pairs: Vec<(String, String)> = Vec::new();
    for (role, own) in roles {
        let own = match own {
            Json::Array(own) => own,
            one => vec![one],
        };
        for own in own {
            match own.as_str() {
                Some(own) if pairs.iter().any(|(known, _)| known == own) => {
                    reader.problem(given, format!("has `{}` twice", shorten(own)));
                }
                Some(own) if pairs.len() < MAX_ROLES => pairs.push((own.to_owned(), role.clone())),
                Some(_) => {
                    reader.problem(given, format!("has more than {MAX_ROLES} names"));
                    return pairs;
                }
                None => reader.wrong(given, wanted),
            }
        }
    }
    pairs
}

/// Reads `split` of a dataset. Which splits there are is known once its files are.
fn split(reader: &mut Reader<'_>, name: &str) -> Option<String> {
    let split = reader.text(name)?;
    if let Err(reason) = Split::parse(&split)
        && let Some(given) = reader.given(name)
    {
        reader.problem(given, reason);
    }
    Some(split)
}
