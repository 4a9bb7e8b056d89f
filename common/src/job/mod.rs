//! The job: what the user wrote (a YAML file, environment variables, flags), checked once into a [`JobSpec`] that
//! cannot be wrong.
//!
//! A value of the file gives way to the environment (`MUSTER_<FIELD>`), and that to a flag. Every problem is reported,
//! not only the first, each with its file and line, variable or flag. Nothing here opens a dataset or a model; the one
//! file read besides the job file is `adapter_config.json` of `lora_model_dir`, whose values are the defaults of `lora_*`; who
//! loads a job says where one is found that is no folder.

mod adapter_init;
mod adapter_shape;
mod adapter_sizes;
mod convert;
mod dialect;
mod did_you_mean;
mod digest;
mod error;
mod fields;
mod limits;
mod llama_factory;
mod llama_factory_columns;
mod loss;
mod lr_scheduler;
mod mask;
mod merge;
mod number;
mod optimizer;
mod overrides;
mod pattern;
mod prompt_format;
mod quote;
mod read;
mod received;
mod resolve;
mod router_loss;
mod spec;
mod split;
mod starting_adapter;
mod switch;
mod target_modules;
mod target_parameters;
#[cfg(test)]
mod tests;
mod tokens;
mod trained_biases;
mod unfrozen;
mod unsupported;
mod without_effect;
mod yaml;
mod yaml_hint;

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dialect::Dialect;
use error::Problems;
use merge::{Merged, Override};
use read::Reader;

pub use adapter_init::AdapterInit;
pub use adapter_shape::AdapterShape;
pub use adapter_sizes::AdapterSizes;
pub use convert::schema;
pub use digest::NOT_PART_OF_THE_RESULT;
pub use error::{JobErrors, Origin, Problem};
pub use fields::{Field, FlagValue, fields, flag_names, flag_value, negations};
pub use loss::{Eaft, MAX_EAFT_K, TokenLoss};
pub use lr_scheduler::{Anneal, LrScheduler, OneCycle, Stage, WarmupStableDecay};
pub use mask::{EndOfTurn, MaskSpec, SHAREGPT_ROLES};
pub use optimizer::{
    MAGNITUDE, MomentDtype, Moments, Optimizer, RateGroup, RateGroups, TensorRate, is_embedding,
    is_magnitude,
};
pub use pattern::{spellings, whole_path};
pub use prompt_format::{PromptFormat, SystemFormat, fill};
pub use router_loss::RouterLoss;
pub use spec::*;
pub use split::{RowRange, Slice, Split, TRAIN};
pub use starting_adapter::{AdapterRequest, FindAdapter, FoundAdapter, find_no_adapter};
pub use target_modules::{TOKEN_MODULES, is_named};
pub use target_parameters::{
    EXPERT_PARAMETERS, ExpertParameter, is_of_parameter, is_parameter, named_parameters,
    router_parameter,
};
pub use tokens::{NewToken, TrainedRows, TrainedTokens};
pub use trained_biases::TrainedBiases;
pub use unfrozen::{NamePatterns, Unfrozen};

/// Where a job comes from. Later sources win: file, environment, flags.
#[derive(Clone, Debug, Default)]
pub struct JobSources {
    pub file: Option<PathBuf>,
    /// All variables of the process; those that do not begin with `MUSTER_` are ignored.
    pub environment: Vec<(String, String)>,
    /// Flags as field and value, in order; two values of one field are refused. A name with leading dashes is a flag of its own
    /// (`--learning-rate`), any other was given as `--set name=value`; problems name it that way.
    pub flags: Vec<(String, String)>,
}

/// Reads and checks a job, whose starting adapter is a folder.
pub fn load(sources: JobSources) -> Result<JobSpec, JobErrors> {
    load_with_adapter(sources, &find_no_adapter)
}

/// Reads and checks a job.
pub fn load_with_adapter(
    sources: JobSources,
    find_adapter: &FindAdapter<'_>,
) -> Result<JobSpec, JobErrors> {
    let file = match sources.file.map(Arc::new) {
        None => None,
        Some(path) => match read_bounded(&path) {
            Ok(text) => Some((path, text)),
            Err(problem) => {
                return Err(JobErrors {
                    problems: vec![problem],
                });
            }
        },
    };
    let checked = check_merged(file, sources.environment, &sources.flags, find_adapter);
    checked.map(|(job, _)| job)
}

/// The front matter of a Markdown file (YAML between two lines of `---` at its beginning) as JSON; null where it has none.
///
/// # Errors
/// Why it cannot be read, with its line.
pub fn front_matter(text: &str) -> Result<serde_json::Value, String> {
    let text = text
        .strip_prefix('\u{feff}')
        .unwrap_or(text)
        .replace("\r\n", "\n");
    let matter = text
        .strip_prefix("---\n")
        .and_then(|rest| rest.split_once("\n---"));
    let Some((matter, _)) = matter else {
        return Ok(serde_json::Value::Null);
    };
    match yaml::parse(matter, &|_| Origin::Nowhere) {
        Ok(Some(root)) => Ok(root.to_json().unwrap_or_default()),
        Ok(None) => Ok(serde_json::Value::Null),
        Err(error) => Err(format!("line {}: {}", error.line + 1, error.message)),
    }
}

/// Reads and checks a job file, and writes it in Muster's own spelling.
pub fn convert(path: &Path, find_adapter: &FindAdapter<'_>) -> Result<String, JobErrors> {
    let path = Arc::new(path.to_owned());
    let text = read_bounded(&path).map_err(|problem| JobErrors {
        problems: vec![problem],
    })?;
    let (job, merged) = check_merged(Some((path, text)), Vec::new(), &[], find_adapter)?;
    let dialect = dialect::told(&merged, &mut Problems::default());
    Ok(convert::to_yaml(&merged, &job, dialect))
}

/// Checks a job, with its file's text at hand.
fn check_merged(
    file: Option<(Arc<PathBuf>, String)>,
    mut environment: Vec<(String, String)>,
    flags: &[(String, String)],
    find_adapter: &FindAdapter<'_>,
) -> Result<(JobSpec, Merged), JobErrors> {
    let mut problems = Problems::default();
    let mut merged = Merged::default();
    if let Some((path, text)) = &file
        && !add_file(path, text, &mut merged, &mut problems)
    {
        return Err(problems.into_errors());
    }
    environment.sort();
    let variables = environment
        .iter()
        .filter_map(|(variable, value)| merged.variable(variable, value));
    let mut overrides: Vec<Override> = variables.collect();
    overrides.extend(
        flags
            .iter()
            .map(|(flag, value)| Override::of_flag(flag, value)),
    );
    overrides.sort_by_key(Override::turn);
    for given in &overrides {
        merged.add_override(given, &mut problems);
    }
    let path = file.map(|(path, _)| path);
    let job_dir = path.as_deref().and_then(|path| path.parent());
    let dialect = dialect::told(&merged, &mut problems);
    if dialect == Dialect::LlamaFactory {
        for list in fields::LISTS {
            llama_factory::name_datasets(&mut merged, list, job_dir, &mut problems);
        }
    }
    let mut reader = Reader {
        notices: merged.notices(),
        merged: &merged,
        problems: &mut problems,
        job_dir,
        dialect,
        datasets_given: merged.datasets_given,
        file: path.clone(),
        find_adapter,
    };
    if dialect == Dialect::LlamaFactory {
        let notice = "read by LLaMA-Factory's names (dialect: llama_factory); what it leaves out is as Muster has it, but for the adapter";
        reader.notices.push(notice.to_owned());
    }
    let mut job = resolve::resolve(&mut reader);
    without_effect::tell(&mut reader, &job);
    job.reading.notices = reader.notices;
    if problems.is_empty() {
        Ok((job, merged))
    } else {
        Err(problems.into_errors())
    }
}

/// Adds a job file's values. False where it is no job at all, so that what follows would only repeat it.
fn add_file(path: &Arc<PathBuf>, text: &str, merged: &mut Merged, problems: &mut Problems) -> bool {
    let origin_of_line = |line| Origin::Line(path.clone(), line);
    match yaml::parse(text, &origin_of_line) {
        // What looks like a row of data would be called a job of unknown fields.
        Ok(Some(root)) if is_row(&root) => {
            let message = "this is a row of data, not a job: name the file with --dataset";
            problems.add(&root.origin, message);
            false
        }
        Ok(Some(root)) => merged.add_file(root, problems),
        Ok(None) => true,
        Err(error) => {
            problems.add(&origin_of_line(error.line), error.message);
            false
        }
    }
}

/// Whether the file is a row of data: a mapping of nothing but what rows have.
fn is_row(root: &yaml::Node) -> bool {
    const COLUMNS: [&str; 8] = [
        "messages",
        "conversations",
        "prompt",
        "completion",
        "text",
        "instruction",
        "output",
        "chosen",
    ];
    match &root.value {
        yaml::Value::Mapping(entries) => {
            let keys: Vec<&str> = entries.iter().map(|(key, _)| key.text.as_str()).collect();
            keys.iter().any(|key| COLUMNS.contains(key))
                && !keys.iter().any(|key| fields::find(key).is_some())
        }
        _ => false,
    }
}

fn read_bounded(path: &Arc<PathBuf>) -> Result<String, Problem> {
    let whole_file = |message: String| Problem {
        origin: Origin::File(path.clone()),
        message,
    };
    let bytes = read_start(path, yaml::MAX_FILE_BYTES as u64 + 1)
        .map_err(|error| whole_file(unreadable(path, &error)))?;
    if bytes.len() > yaml::MAX_FILE_BYTES {
        let limit = yaml::MAX_FILE_BYTES;
        return Err(whole_file(format!(
            "too big for a job file (more than {limit} bytes)"
        )));
    }
    String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + valid.iter().filter(|byte| **byte == b'\n').count();
        Problem {
            origin: Origin::Line(path.clone(), line),
            message: "not UTF-8 text".to_owned(),
        }
    })
}

fn unreadable(path: &Path, error: &std::io::Error) -> String {
    let looks_like_data = path.extension().is_some_and(|end| end == "jsonl");
    match error.kind() {
        _ if path.is_dir() => "is a folder: name the job file in it".to_owned(),
        ErrorKind::NotFound if looks_like_data => {
            "there is no such file (a job file is YAML; data is named with --dataset)".to_owned()
        }
        ErrorKind::NotFound => "there is no such job file".to_owned(),
        _ => format!("cannot read the job file: {error}"),
    }
}

fn read_start(path: &Path, limit: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}
