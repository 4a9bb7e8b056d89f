//! The datasets of a job: where they are, which rows of them, and what their rows look like.

use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::super::dialect::Dialect;
use super::super::fields::{DATASETS, LISTS, TEST_DATASETS};
use super::super::merge::PRETRAINING;
use super::super::prompt_format::PromptFormat;
use super::super::quote::shorten;
use super::super::read::Reader;
use super::super::spec::{DatasetKind, DatasetSpec, FieldNames, REASONING, Selection};
use super::super::split::{Split, TRAIN};
use super::super::yaml::Value;
use super::mask::mask;
use super::mixture::selection;
use super::{prompt_types, user_defined};

/// Most names that a dataset's roles have.
const MAX_ROLES: usize = 100;

/// Split that TRL evaluates where none is named.
const TEST: &str = "test";

/// Names of the entries of both lists of datasets, such as `datasets.0`.
pub(super) fn names(reader: &Reader<'_>) -> Vec<String> {
    let of = |list: &'static str| {
        let entries = 0..reader.merged.datasets(list);
        entries.map(move |index| format!("{list}.{index}"))
    };
    LISTS.into_iter().flat_map(of).collect()
}

/// Reads the datasets to train on.
pub(super) fn datasets(reader: &mut Reader<'_>) -> Vec<DatasetSpec> {
    let count = reader.merged.datasets(DATASETS);
    if count == 0 && !reader.datasets_given {
        reader.missing("`datasets` is missing: the data to train on");
    }
    // Its names were looked up already.
    reader.text("dataset_dir");
    let split = split(reader, "dataset_train_split");
    let entries = (0..count).map(|index| {
        let mut entry = dataset(reader, &format!("{DATASETS}.{index}"), &["max_samples"]);
        entry.split = entry.split.or_else(|| split.clone());
        entry
    });
    let entries = entries.collect();
    tell_streamed(reader);
    entries
}

/// Says what becomes of data that Axolotl reads only as far as `max_steps` go.
fn tell_streamed(reader: &mut Reader<'_>) {
    let is_limited = reader
        .given("max_steps")
        .is_some_and(|given| !given.node.is_text("-1"));
    if is_limited && reader.merged.is_written(PRETRAINING) {
        let notice = format!(
            "{PRETRAINING}: every row is read before training, and the blocks of max_steps are of all of them, drawn from the seed unless \
             shuffle is off; max_samples reads fewer"
        );
        reader.notices.push(notice);
    }
}

/// What the job says of evaluations beside naming data for them.
pub(super) struct Wishes {
    /// Whether some of the training data is held out.
    pub holds_out: bool,
    /// Whether nothing shall be evaluated.
    pub is_off: bool,
    /// Whether the run shall stop for evaluations.
    pub is_asked: bool,
}

/// Reads the datasets that are evaluated and never trained on: those that the job names, or another split of `trained`.
pub(super) fn test_datasets(
    reader: &mut Reader<'_>,
    trained: &[DatasetSpec],
    Wishes {
        holds_out,
        is_off,
        is_asked,
    }: Wishes,
) -> Vec<DatasetSpec> {
    let count = reader.merged.datasets(TEST_DATASETS);
    let held_out = reader.given("val_set_size").filter(|_| holds_out);
    let split = split(reader, "dataset_test_split");
    let by_split = reader.given("dataset_test_split");
    if let Some(given) = held_out.filter(|_| count > 0 || by_split.is_some()) {
        let other = if count > 0 {
            TEST_DATASETS
        } else {
            "dataset_test_split"
        };
        let message = format!("and `{other}` both say what is evaluated; remove one");
        reader.problem(given, message);
    }
    if let Some(given) = by_split.filter(|_| count > 0) {
        let message = "and `test_datasets` both say what is evaluated; remove one";
        reader.problem(given, message.to_owned());
    }
    let samples = ["max_eval_samples", "max_samples"];
    // Read with each entry where there are any.
    let max_samples = match count {
        0 => reader.whole(samples[0], 1..=u64::MAX),
        _ => None,
    };
    let named: Vec<DatasetSpec> = (0..count)
        .map(|index| {
            let mut entry = dataset(reader, &format!("{TEST_DATASETS}.{index}"), &samples);
            if reader.dialect == Dialect::LlamaFactory {
                entry.split.get_or_insert_with(|| TRAIN.to_owned());
            }
            entry
        })
        .collect();
    let of_trl = reader.given("datasets.0.path");
    let is_trl = of_trl.is_some_and(|given| given.written == "dataset_name");
    let split = match split {
        None if is_trl && is_asked && count == 0 && held_out.is_none() => Some(TEST.to_owned()),
        split => split,
    };
    match split {
        Some(split) if named.is_empty() && is_off => {
            let notice = format!(
                "dataset_test_split: {split} is not evaluated, because eval_strategy is no"
            );
            reader.notices.push(notice);
            named
        }
        Some(split) if named.is_empty() => {
            let of_split = |dataset: &DatasetSpec| DatasetSpec {
                split: Some(split.clone()),
                max_samples: max_samples.or(dataset.max_samples),
                // Which of the rows to train on are read says nothing of these.
                selection: Selection::default(),
                ..dataset.clone()
            };
            trained.iter().map(of_split).collect()
        }
        _ => named,
    }
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
    (&["user_defined"], Shape::UserDefined),
    (&["input_output"], Shape::of(DatasetKind::Segments)),
    (
        &["tokenized", "tokenised", "pretokenized"],
        Shape::of(DatasetKind::Tokenized),
    ),
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
    /// A fixed text that the job gives.
    UserDefined,
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

/// Reads an entry, `datasets.0` or another. `common_samples` are fields of the job that say how many rows of it are read where it
/// does not, the first that is given.
fn dataset(reader: &mut Reader<'_>, entry: &str, common_samples: &[&str]) -> DatasetSpec {
    let name = |field: &str| format!("{entry}.{field}");
    if let Some(given) = reader.merged.get_or_null(&name("path"))
        && given.node.is_null()
    {
        reader.wrong(given, "a file, a folder or a dataset on the hub");
    }
    let (kind, mut fields, prompt) = shape(reader, entry);
    if let Some(text) = reader.text("dataset_text_field") {
        fields.text = text;
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
    fields.thinking = thinking(reader, entry);
    check_fields(reader, entry, kind, prompt.as_ref());
    if kind == DatasetKind::Alpaca && reader.given("test_prompts").is_some() {
        let notice = "test_prompts and `worker generate` ask in the model's chat template, not in the text of `type: alpaca`: write that \
                      text out to see what was learned";
        if !reader.notices.iter().any(|told| told == notice) {
            reader.notices.push(notice.to_owned());
        }
    }
    let common = common_samples.iter().map(|field| (*field).to_owned());
    let max_samples = std::iter::once(name("max_samples")).chain(common);
    let max_samples = { max_samples }.find(|field| reader.given(field).is_some());
    let max_samples = max_samples.unwrap_or_else(|| name("max_samples"));
    if let Some(given) = reader.given(&max_samples)
        && given.written == "num_samples"
    {
        let notice = "num_samples: the first rows are taken, where LLaMA-Factory draws them";
        reader.notices.push(notice.to_owned());
    }
    let roles = roles(reader, entry);
    let mask = mask(reader, entry, kind, &roles);
    let mut dataset = DatasetSpec {
        data_dir: reader.text(&name("data_dir")),
        name: reader.text(&name("name")),
        revision: reader.text(&name("revision")),
        format: reader.choice(&name("ds_type"), FORMATS).map(str::to_owned),
        split: split(reader, &name("split")),
        max_samples: reader.whole(&max_samples, 1..=u64::MAX),
        selection: selection(reader, entry),
        prompt,
        roles,
        mask,
        has_system_column,
        drop_system_message: reader.switch(&name("drop_system_message")).unwrap_or(false),
        ..DatasetSpec::new(PathBuf::new(), kind, fields)
    };
    name_files(reader, entry, &mut dataset);
    dataset
}

/// Reads `type`: the shape of the rows, the names of their columns, and the text that instructions are put into where
/// that is not Alpaca's.
fn shape(reader: &mut Reader<'_>, entry: &str) -> (DatasetKind, FieldNames, Option<PromptFormat>) {
    let name = format!("{entry}.type");
    let usual = FieldNames::default();
    let written = reader
        .given(&name)
        .and_then(|given| match &given.node.value {
            Value::Scalar { text, .. } => Some((given, text.trim())),
            _ => None,
        });
    if let Some((_, text)) = written
        && let Some(found) = prompt_types::find(text)
    {
        let prompt = Some(found.format).filter(|format| *format != PromptFormat::alpaca());
        return (DatasetKind::Alpaca, found.fields, prompt);
    }
    if let Some((given, text)) = written
        && let Some(reason) = prompt_types::refusal(text)
    {
        reader.problem(given, format!("`{}` {reason}", shorten(text)));
        return (DatasetKind::Auto, usual, None);
    }
    match reader.choice(&name, KINDS) {
        Some(Shape::ShareGpt) => (DatasetKind::Messages, FieldNames::sharegpt(), None),
        Some(Shape::UserDefined) => {
            let prompt = user_defined::prompt(reader, entry);
            (DatasetKind::Alpaca, usual, Some(prompt))
        }
        Some(Shape::Kind(kind)) => (kind, usual, None),
        None => (DatasetKind::Auto, usual, None),
    }
}

/// Reads `path` and `data_files`: where the data is, and which of its files are read.
fn name_files(reader: &mut Reader<'_>, entry: &str, dataset: &mut DatasetSpec) {
    let name = |field: &str| format!("{entry}.{field}");
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
fn check_fields(
    reader: &mut Reader<'_>,
    entry: &str,
    kind: DatasetKind,
    prompt: Option<&PromptFormat>,
) {
    let type_name = reader.given(&format!("{entry}.type"));
    let is_user_defined = type_name.is_some_and(|given| given.node.is_text("user_defined"));
    let is_instructions = matches!(kind, DatasetKind::Alpaca | DatasetKind::Instructions);
    let mut refuse = |fields: &[&str], message: &str| {
        for field in fields {
            if let Some(given) = reader.given(&format!("{entry}.{field}")) {
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
    let reads_system = match kind {
        DatasetKind::Alpaca => prompt.is_some_and(PromptFormat::reads_system),
        kind => is_instructions || kind == DatasetKind::Messages,
    };
    if !reads_system {
        refuse(
            &["field_system"],
            "is read with `type: instructions`, messages, sharegpt and those of a text with a system message only",
        );
    }
    if !is_user_defined {
        refuse(
            &user_defined::FIELDS,
            "is read with `type: user_defined` only",
        );
    }
    if matches!(kind, DatasetKind::Segments | DatasetKind::Tokenized) {
        refuse(
            &OF_OTHERS,
            "is not read with `type: input_output` and `type: tokenized`, whose columns have fixed names",
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
fn thinking(reader: &mut Reader<'_>, entry: &str) -> Option<[String; 2]> {
    let name = |field: &str| format!("{entry}.{field}");
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
fn roles(reader: &mut Reader<'_>, entry: &str) -> Vec<(String, String)> {
    let Some(given) = reader.given(&format!("{entry}.roles")) else {
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
