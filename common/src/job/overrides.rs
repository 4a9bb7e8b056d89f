//! Flags and variables: one value of one field, given as text.

use super::error::{Origin, Problems};
use super::fields;
use super::yaml::{self, Node};

/// Variables that are not fields of a job.
const OTHER_VARIABLES: &[&str] = &[
    "BLESS",
    "CACHE_DIR",
    "DEVICE",
    "EXCHANGE_HOST",
    "FAILPOINT",
    "JOB",
    "LISTEN",
    "LOCAL_WORKERS",
    "LOG",
    "NAME",
    "NEEDS_GPU",
    "PYTHON",
    "SIM_SEED",
    "SIM_SEEDS",
    "TEST_JOIN",
    "TEST_RECONNECT_SECONDS",
    "THREADS",
    "TOKEN",
    "TOKEN_FILE",
];

/// Text fields take a flag's value as it is; others may be written as YAML lists or mappings.
pub(super) fn parse_override(
    name: &str,
    value: &str,
    origin: &Origin,
    problems: &mut Problems,
) -> Option<Node> {
    let structured = value.starts_with('[') || value.starts_with('{');
    if !structured || is_free_text(name) {
        return Some(Node::scalar(value, false, origin));
    }
    match yaml::parse(value, &|_| origin.clone()) {
        Ok(node) => node,
        Err(error) => {
            problems.add(origin, error.message);
            None
        }
    }
}

fn is_free_text(name: &str) -> bool {
    let field = match name
        .strip_prefix("datasets.")
        .and_then(|rest| rest.split_once('.'))
    {
        Some((_, name)) => fields::find_in_dataset(name),
        None => fields::find(name),
    };
    field.is_some_and(|field| matches!(field.values, "folder" | "file" | "text" | "column" | "key"))
}

/// `cluster_min_workers` -> `cluster.min_workers`, `datasets_0_path` -> `datasets.0.path`.
pub(super) fn dotted_name(name: &str) -> String {
    if let Some(rest) = name.strip_prefix("cluster_") {
        return format!("cluster.{rest}");
    }
    if let Some((index, field)) = name
        .strip_prefix("datasets_")
        .and_then(|rest| rest.split_once('_'))
        && index.bytes().all(|b| b.is_ascii_digit())
    {
        return format!("datasets.{index}.{field}");
    }
    name.to_owned()
}

/// Variables of the programs themselves, and those that Kubernetes makes for a service named `muster-…`.
pub(super) fn is_other_variable(name: &str) -> bool {
    OTHER_VARIABLES.contains(&name)
        || name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.ends_with("_PORT")
        || name.contains("_PORT_")
}
