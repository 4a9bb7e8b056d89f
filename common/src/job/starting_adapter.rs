//! Reads what `adapter_config.json` of `lora_model_dir` says about its adapter: the defaults of the job's `lora_*` fields.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{AdapterShape, TargetModules, TrainedBiases, TrainedTokens};
use crate::hub;

const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// What a job says of the adapter that it starts from, where there is no such folder.
#[derive(Clone, Copy, Debug)]
pub struct AdapterRequest<'a> {
    /// What the job names.
    pub written: &'a Path,
    /// The run's folder: one that goes on keeps to the adapter that it began with.
    pub output_dir: &'a Path,
    /// Whether the run begins anew, whatever is in the folder.
    pub begins_anew: bool,
}

/// An adapter that was found elsewhere, and brought into a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundAdapter {
    pub folder: PathBuf,
    /// Its id on the hub, as the hub has it.
    pub id: String,
    pub commit: String,
    /// What the user should know of it.
    pub notice: Option<String>,
}

/// Brings an adapter here that is no folder; None where there is none of that name, or why it cannot be had.
pub type FindAdapter<'a> = dyn Fn(&AdapterRequest<'_>) -> Result<Option<FoundAdapter>, String> + 'a;

/// Finds none: what a job names is a folder.
pub fn find_no_adapter(_: &AdapterRequest<'_>) -> Result<Option<FoundAdapter>, String> {
    Ok(None)
}

/// The shape of an adapter that exists.
#[derive(Debug, PartialEq)]
pub(super) struct StartingAdapter {
    pub r: usize,
    pub alpha: f64,
    pub dropout: f64,
    pub use_rslora: bool,
    pub use_dora: bool,
    pub biases: TrainedBiases,
    pub lora_bias: bool,
    pub target_modules: TargetModules,
    /// Rows of the embedding and the output layer, or all of either, that the adapter has in their place.
    pub tokens: TrainedTokens,
    /// Linears that are left out, parameters beside them, and other ranks and alphas.
    pub shape: AdapterShape,
}

/// Reads the shape of an adapter; the error names the file.
pub(super) fn read(dir: &Path) -> Result<StartingAdapter, String> {
    if !dir.is_dir() {
        let reason = match dir.exists() {
            true => "is a file; name the folder that it is in".to_owned(),
            false => hub::no_such_folder(dir),
        };
        return Err(format!("{}: {reason}", dir.display()));
    }
    let path = dir.join("adapter_config.json");
    if !path.is_file() && dir.join("config.json").is_file() {
        return Err(format!(
            "{} is the folder of a whole model, not of an adapter: name it as base_model",
            dir.display()
        ));
    }
    let json = read_json(&path).map_err(|reason| format!("{}: {reason}", path.display()))?;
    let fail = |reason: &str| Err(format!("{}: {reason}", path.display()));
    if json["peft_type"]
        .as_str()
        .is_some_and(|kind| kind != "LORA")
    {
        return fail("only adapters with peft_type LORA can be trained");
    }
    let r = json["r"].as_u64().filter(|r| (1..=4096).contains(r));
    let alpha = json["lora_alpha"].as_f64().filter(|alpha| *alpha > 0.0);
    let (Some(r), Some(alpha)) = (r, alpha) else {
        return fail("r and lora_alpha must be positive numbers");
    };
    let dropout = match &json["lora_dropout"] {
        Value::Null => Some(0.0),
        dropout => dropout
            .as_f64()
            .filter(|dropout| (0.0..1.0).contains(dropout)),
    };
    let switch = |name: &str| match &json[name] {
        Value::Null => Some(false),
        switch => switch.as_bool(),
    };
    let switches = ["use_rslora", "use_dora", "lora_bias"].map(switch);
    let (Some(dropout), [Some(use_rslora), Some(use_dora), Some(lora_bias)]) = (dropout, switches)
    else {
        return fail(
            "lora_dropout must be a number from 0, below 1, and use_rslora, use_dora and lora_bias true or false",
        );
    };
    let Some(biases) = TrainedBiases::of_adapter(&json["bias"]) else {
        return fail("bias must be none, lora_only or all");
    };
    let Some(target_modules) = TargetModules::of_adapter(&json) else {
        return fail("target_modules must be a list of module names, or a regular expression");
    };
    let Some(tokens) = TrainedTokens::of_adapter(&json) else {
        return fail(
            "trainable_token_indices and modules_to_save must name embed_tokens or lm_head",
        );
    };
    let shape = match AdapterShape::of_adapter(&json) {
        Ok(shape) => shape,
        Err(field) => {
            return fail(&format!(
                "{field} cannot be read, or asks for what is not done"
            ));
        }
    };
    Ok(StartingAdapter {
        r: r as usize,
        alpha,
        dropout,
        use_rslora,
        use_dora,
        biases,
        lora_bias,
        target_modules,
        tokens,
        shape,
    })
}

fn read_json(path: &Path) -> Result<Value, String> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_CONFIG_BYTES).read_to_end(&mut bytes))
        .map_err(|error| error.to_string())?;
    serde_json::from_slice(&bytes).map_err(|error| format!("not valid JSON: {error}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_hub_id_is_told_with_the_command_that_downloads_it() {
        let said = read(Path::new("owner/adapter")).unwrap_err();
        let command = "`hf download owner/adapter --local-dir models/adapter`";
        assert!(said.contains(command), "{said}");
        let file = tempfile::NamedTempFile::new().unwrap();
        let said = read(file.path()).unwrap_err();
        assert!(said.contains("name the folder that it is in"), "{said}");
    }
}
