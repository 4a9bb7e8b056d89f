//! Parses flags and variables: one value of one field, given as text.

use std::net::{IpAddr, SocketAddr};

use super::error::{Origin, Problems};
use super::fields::{self, LISTS};
use super::yaml::{self, Node};

/// Names of `MUSTER_` variables that are not fields of a job.
const OTHER_VARIABLES: &[&str] = &[
    "BLESS",
    "CACHE_DIR",
    "COMMIT",
    "DEVICE",
    "EXCHANGE_HOST",
    "FAILPOINT",
    "ISA",
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

/// Parses a value given as text. Text fields take it as it is; others may be written as YAML lists or mappings.
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
        .strip_prefix("test_")
        .unwrap_or(name)
        .strip_prefix("datasets.")
        .and_then(|rest| rest.split_once('.'))
    {
        Some((_, name)) => fields::find_in_dataset(name),
        None => fields::find(name),
    };
    field.is_some_and(|field| matches!(field.values, "folder" | "file" | "text" | "column" | "key"))
}

/// A field's name with dots: `cluster_min_workers` -> `cluster.min_workers`, `datasets_0_path` -> `datasets.0.path`.
pub(super) fn dotted_name(name: &str) -> String {
    if let Some(rest) = name.strip_prefix("cluster_") {
        return format!("cluster.{rest}");
    }
    for list in LISTS {
        if let Some((index, field)) = name
            .strip_prefix(list)
            .and_then(|rest| rest.strip_prefix('_')?.split_once('_'))
            && index.bytes().all(|b| b.is_ascii_digit())
        {
            return format!("{list}.{index}.{field}");
        }
    }
    name.to_owned()
}

/// Whether a variable is one of the programs themselves, not of a job.
pub(super) fn is_other_variable(name: &str) -> bool {
    OTHER_VARIABLES.contains(&name)
}

/// Whether a variable was set by Kubernetes, which tells every container of each Service in its namespace by variables that begin
/// with the Service's name: those of one called `muster` or `muster-…` look like ours (kubernetes.io, "Service", environment
/// variables).
pub(super) fn is_service_variable(name: &str, value: &str) -> bool {
    // SERVICE_HOST, SERVICE_PORT, SERVICE_PORT_<name of the port>, PORT, PORT_7077_TCP and the last one's parts.
    let name = format!("_{name}");
    let is_port = |text: &str| text.parse::<u16>().is_ok();
    let is_address = |text: &str| text.parse::<IpAddr>().is_ok();
    let is_link = |text: &str| {
        let link = text.split_once("://");
        link.is_some_and(|(scheme, rest)| {
            PROTOCOLS.contains(&scheme) && rest.parse::<SocketAddr>().is_ok()
        })
    };
    let is_of_port = |text: &str| {
        let parts = text
            .rsplit_once("_PORT_")
            .and_then(|(_, rest)| rest.split_once('_'));
        parts.is_some_and(|(port, protocol)| {
            is_port(port) && PROTOCOLS.contains(&protocol.to_ascii_lowercase().as_str())
        })
    };
    if let Some((_, rest)) = name.split_once("_SERVICE_PORT") {
        return (rest.is_empty() || rest.starts_with('_')) && is_port(value);
    }
    match name.rsplit_once('_') {
        Some((before, "PORT")) if is_of_port(before) => is_port(value),
        Some((_, "PORT")) => is_link(value),
        Some((before, "ADDR")) => is_of_port(before) && is_address(value),
        Some((before, "PROTO")) => is_of_port(before) && PROTOCOLS.contains(&value),
        Some((before, "HOST")) => before.ends_with("_SERVICE") && is_address(value),
        _ => is_of_port(&name) && is_link(value),
    }
}

const PROTOCOLS: [&str; 3] = ["tcp", "udp", "sctp"];
