#![allow(clippy::unwrap_used)]

mod adapter_shape;
mod chat_template;
mod convert;
mod hostile;
mod meaning;
mod mixtures;
mod optimizers;
mod problems;
mod quantization;
mod schedules;
mod shapes;
mod sources;
mod table;
mod tokens;
mod validation;
mod without_effect;

use std::fs;
use std::path::PathBuf;

use super::*;

const SMALL: &str = "base_model: models/tiny\ndatasets: data.jsonl\n";

/// Loads a job file with this text in a folder of its own.
fn load_with(
    text: &str,
    environment: &[(&str, &str)],
    flags: &[(&str, &str)],
) -> Result<JobSpec, JobErrors> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("job.yaml");
    fs::write(&path, text).unwrap();
    let own = |pairs: &[(&str, &str)]| {
        pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    };
    load(JobSources {
        file: Some(path),
        environment: own(environment),
        flags: own(flags),
    })
}

fn load_text(text: &str) -> Result<JobSpec, JobErrors> {
    load_with(text, &[], &[])
}

fn job(lines: &str) -> JobSpec {
    load_text(&format!("{SMALL}{lines}")).unwrap_or_else(|errors| panic!("{errors}"))
}

/// The problems as `line 3: message`, where the file's path was.
fn problems(result: Result<JobSpec, JobErrors>) -> Vec<String> {
    result
        .expect_err("the job has problems")
        .problems
        .iter()
        .map(|problem| match &problem.origin {
            Origin::Line(_, line) => format!("{line}: {}", problem.message),
            Origin::File(_) => format!("file: {}", problem.message),
            other => format!("{other}: {}", problem.message),
        })
        .collect()
}

/// The problems of a job whose first two lines are right.
fn problems_of(lines: &str) -> Vec<String> {
    problems(load_text(&format!("{SMALL}{lines}")))
}

fn check_problems(lines: &str, expected: &[&str]) {
    assert_eq!(problems_of(lines), expected, "{lines}");
}
