//! Whose names a job uses, where the same name means something else elsewhere.

use super::did_you_mean::did_you_mean;
use super::error::Problems;
use super::merge::Merged;
use super::quote::shorten;
use super::yaml::Value;

/// Programs whose names are read otherwise than Muster's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    /// Muster's own names, and those of Axolotl, TRL, PEFT and Transformers, which agree with them.
    Usual,
    /// LLaMA-Factory: `dataset` lists names of its dataset_info.json, and an adapter's alpha is twice its rank.
    LlamaFactory,
}

/// Keys that nobody but LLaMA-Factory has.
const OF_LLAMA_FACTORY: [&str; 3] = ["stage", "template", "dataset_dir"];

const NAMES: [&str; 2] = ["auto", "llama_factory"];

/// The dialect that the job names, or that its keys tell.
pub(super) fn told(merged: &Merged, problems: &mut Problems) -> Dialect {
    let told = match OF_LLAMA_FACTORY.iter().any(|key| merged.is_written(key)) {
        true => Dialect::LlamaFactory,
        false => Dialect::Usual,
    };
    let Some(given) = merged.get("dialect") else {
        return told;
    };
    let written = match &given.node.value {
        Value::Scalar { text, .. } => text.trim().to_ascii_lowercase().replace('-', "_"),
        _ => String::new(),
    };
    match written.as_str() {
        "auto" => told,
        "llama_factory" | "llamafactory" => Dialect::LlamaFactory,
        "muster" | "axolotl" | "trl" | "transformers" => Dialect::Usual,
        other => {
            let hint = did_you_mean(other, NAMES.into_iter());
            let message = format!(
                "`dialect` must be one of {}, found {}{hint}",
                NAMES.join(", "),
                match other.is_empty() {
                    true => given.node.describe(),
                    false => format!("`{}`", shorten(other)),
                }
            );
            problems.add(&given.origin, message);
            told
        }
    }
}
