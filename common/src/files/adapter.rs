//! PEFT adapters: `adapter_config.json` as PEFT 0.21 writes it, read back tolerantly, refused where it asks for what
//! Muster does not do. The tensors beside it are in `tensors`, compared with what a job trains in `contents`.

mod contents;
mod tensors;

use std::path::Path;

use serde_json::{Value, json};

use super::FileError;
use super::json::json_text;
use super::json::read_json;
use super::sink::Sink;
use crate::job::{
    AdapterInit, AdapterShape, AdapterSizes, LoraSpec, TargetModules, TrainedBiases, TrainedRows,
    TrainedTokens,
};

use super::names::MAX_CONFIG_BYTES;
pub use super::names::{ADAPTER_CONFIG, ADAPTER_WEIGHTS};
pub use contents::check_adapter;
pub use tensors::{
    Adapted, Factor, adapter_tensors, factors_at, is_kept_beside_factors, is_kept_beside_tokens,
    parse_tensor_name, tensor_name, trained_rows_name, trained_whole_name,
};

/// Version of PEFT whose format is written. PEFT compares it with its own to decide which fields it may not know.
const PEFT_VERSION: &str = "0.21.2";

/// The fields of an `adapter_config.json` that vary.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// Where the user's base model is: a folder, or a name on the Hub.
    pub base_model_name_or_path: Option<String>,
    pub revision: Option<String>,
    pub r: usize,
    pub lora_alpha: f64,
    pub lora_dropout: f64,
    pub use_rslora: bool,
    /// Whether the rows of the adapted weights have magnitudes of their own.
    pub use_dora: bool,
    /// Biases of the base model that it has in their place.
    pub biases: TrainedBiases,
    /// Whether each factor B has a bias.
    pub lora_bias: bool,
    /// What its factors started with.
    pub init: AdapterInit,
    /// Module names (`q_proj`) or path endings, sorted; or PEFT's regular expression.
    pub target_modules: TargetModules,
    /// Linears that are left out, parameters of experts beside them, and other ranks and alphas.
    pub shape: AdapterShape,
    /// Rows of the embedding and the output layer, or all of either, that the adapter has in their place.
    pub tokens: TrainedTokens,
}

impl AdapterConfig {
    /// An adapter that is as PEFT makes it where nothing else is said.
    pub fn new(r: usize, lora_alpha: f64, target_modules: TargetModules) -> Self {
        Self {
            base_model_name_or_path: None,
            revision: None,
            r,
            lora_alpha,
            lora_dropout: 0.0,
            use_rslora: false,
            use_dora: false,
            biases: TrainedBiases::default(),
            lora_bias: false,
            init: AdapterInit::default(),
            target_modules,
            shape: AdapterShape::default(),
            tokens: TrainedTokens::default(),
        }
    }

    /// The config of a job's adapter. `target_modules` are the resolved ones, in any order.
    pub fn from_lora(
        lora: &LoraSpec,
        base_model_name_or_path: &str,
        target_modules: impl IntoIterator<Item = String>,
    ) -> Self {
        let mut target_modules: Vec<String> = target_modules.into_iter().collect();
        target_modules.sort();
        target_modules.dedup();
        // What has a second half is an adapter of twice the rank, and of the same scale.
        let (ranks, alphas) = match (lora.init.is_from_base(), lora.use_rslora) {
            (false, _) => (1, 1.0),
            (true, false) => (2, 2.0),
            (true, true) => (2, std::f64::consts::SQRT_2),
        };
        let mut shape = lora.shape.as_ref().clone();
        shape.ranks.iter_mut().for_each(|(_, rank)| *rank *= ranks);
        shape.alphas.iter_mut().for_each(|(_, a)| *a *= alphas);
        Self {
            base_model_name_or_path: Some(base_model_name_or_path.to_owned()),
            revision: None,
            r: lora.r * ranks,
            lora_alpha: lora.alpha * alphas,
            lora_dropout: lora.dropout,
            use_rslora: lora.use_rslora,
            use_dora: lora.use_dora,
            biases: lora.biases,
            lora_bias: lora.lora_bias,
            init: match lora.init.is_from_base() {
                true => AdapterInit::default(),
                false => lora.init,
            },
            target_modules: TargetModules::Named(target_modules),
            shape,
            tokens: lora.tokens.clone(),
        }
    }

    pub fn to_lora(&self) -> LoraSpec {
        LoraSpec {
            r: self.r,
            alpha: self.lora_alpha,
            dropout: self.lora_dropout,
            target_modules: self.target_modules.clone(),
            use_rslora: self.use_rslora,
            use_dora: self.use_dora,
            biases: self.biases,
            lora_bias: self.lora_bias,
            init: self.init,
            shape: Box::new(self.shape.clone()),
            tokens: self.tokens.clone(),
            model_dir: None,
            model_source: None,
        }
    }

    /// Rank and scale of the adapter of each linear.
    pub fn sizes(&self) -> AdapterSizes {
        AdapterSizes::new(self.r, self.lora_alpha, self.use_rslora, &self.shape)
    }

    /// Reads the `adapter_config.json` of a folder. Refuses what Muster does not do.
    pub fn read(dir: &Path) -> Result<Self, FileError> {
        let path = dir.join(ADAPTER_CONFIG);
        let found: Value = read_json(&path, MAX_CONFIG_BYTES)?;
        if !found.is_object() {
            return Err(FileError::malformed(&path, "is not a JSON object"));
        }
        check_supported(&path, &found)?;
        let wrong = |field: &str| {
            FileError::malformed(&path, format!("{field} is missing or of the wrong kind"))
        };
        let text = |field: &str| match &found[field] {
            Value::Null => Ok(None),
            Value::String(text) => Ok(Some(text.clone())),
            _ => Err(wrong(field)),
        };
        let switch = |field: &str| match &found[field] {
            Value::Null => Ok(false),
            switch => switch.as_bool().ok_or_else(|| wrong(field)),
        };
        Ok(Self {
            base_model_name_or_path: text("base_model_name_or_path")?,
            revision: text("revision")?,
            r: found["r"]
                .as_u64()
                .filter(|r| (1..=1 << 20).contains(r))
                .ok_or_else(|| wrong("r"))? as usize,
            lora_alpha: found["lora_alpha"]
                .as_f64()
                .filter(|alpha| *alpha > 0.0)
                .ok_or_else(|| wrong("lora_alpha"))?,
            lora_dropout: match &found["lora_dropout"] {
                Value::Null => 0.0,
                dropout => dropout
                    .as_f64()
                    .filter(|dropout| (0.0..1.0).contains(dropout))
                    .ok_or_else(|| wrong("lora_dropout"))?,
            },
            use_rslora: switch("use_rslora")?,
            use_dora: switch("use_dora")?,
            biases: TrainedBiases::of_adapter(&found["bias"]).ok_or_else(|| wrong("bias"))?,
            lora_bias: switch("lora_bias")?,
            init: found["init_lora_weights"]
                .as_str()
                .and_then(AdapterInit::of_adapter)
                .unwrap_or_default(),
            target_modules: TargetModules::of_adapter(&found)
                .ok_or_else(|| wrong("target_modules"))?,
            shape: AdapterShape::of_adapter(&found).map_err(wrong)?,
            tokens: TrainedTokens::of_adapter(&found).ok_or_else(|| {
                let reason = "trainable_token_indices and modules_to_save must name embed_tokens or lm_head, as nothing else is trained beside adapters";
                FileError::malformed(&path, reason)
            })?,
        })
    }

    /// Writes `adapter_config.json`, with every field that PEFT writes.
    pub fn write(&self, mut sink: impl Sink) -> Result<(), FileError> {
        let mut config = defaults();
        for (field, value) in [
            (
                "base_model_name_or_path",
                json!(self.base_model_name_or_path),
            ),
            ("revision", json!(self.revision)),
            ("r", json!(self.r)),
            ("lora_alpha", number(self.lora_alpha)),
            ("lora_dropout", json!(self.lora_dropout)),
            ("use_rslora", json!(self.use_rslora)),
            ("use_dora", json!(self.use_dora)),
            ("bias", json!(self.biases.name())),
            ("lora_bias", json!(self.lora_bias)),
            (
                "init_lora_weights",
                self.init.in_adapter().map_or(json!(true), Value::from),
            ),
            ("target_modules", self.target_modules.in_adapter()),
            ("exclude_modules", self.excluded()),
            ("layers_to_transform", json!(self.shape.layers)),
            (
                "rank_pattern",
                pairs(self.shape.ranks.iter().map(|(p, r)| (p, json!(r)))),
            ),
            (
                "alpha_pattern",
                pairs(self.shape.alphas.iter().map(|(p, a)| (p, number(*a)))),
            ),
            ("target_parameters", self.target_parameters()),
            ("trainable_token_indices", self.trainable_token_indices()),
            ("modules_to_save", self.modules_to_save()),
        ] {
            config[field] = value;
        }
        sink.small_file(ADAPTER_CONFIG, &json_text(ADAPTER_CONFIG, &config)?)
    }

    fn target_parameters(&self) -> Value {
        match self.shape.parameters.is_empty() {
            true => Value::Null,
            false => json!(self.shape.parameters),
        }
    }

    fn excluded(&self) -> Value {
        match &self.shape.excluded {
            None | Some(TargetModules::AllLinear) => Value::Null,
            Some(TargetModules::Named(names)) => json!(names),
            Some(TargetModules::Matching(pattern)) => json!(pattern),
        }
    }

    /// A list where only rows of the embedding are trained, as PEFT writes it.
    fn trainable_token_indices(&self) -> Value {
        let (embedding, head) = (self.tokens.embedding.listed(), self.tokens.head.listed());
        match (embedding.is_empty(), head.is_empty()) {
            (true, true) => Value::Null,
            (false, true) => json!(embedding),
            (true, false) => json!({"lm_head": head}),
            (false, false) => json!({"embed_tokens": embedding, "lm_head": head}),
        }
    }

    fn modules_to_save(&self) -> Value {
        let both = [
            ("embed_tokens", &self.tokens.embedding),
            ("lm_head", &self.tokens.head),
        ];
        let whole = both.iter().filter(|(_, rows)| **rows == TrainedRows::All);
        let names: Vec<&str> = whole.map(|(name, _)| *name).collect();
        match names.is_empty() {
            true => Value::Null,
            false => json!(names),
        }
    }
}

/// Every field as PEFT writes it for a plain LoRA adapter, in its order.
fn defaults() -> Value {
    json!({
        "alora_invocation_tokens": null,
        "alpha_pattern": {},
        "arrow_config": null,
        "auto_mapping": null,
        "base_model_name_or_path": null,
        "bias": "none",
        "corda_config": null,
        "ensure_weight_tying": false,
        "eva_config": null,
        "exclude_modules": null,
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "kasa_config": null,
        "layer_replication": null,
        "layers_pattern": null,
        "layers_to_transform": null,
        "loftq_config": {},
        "lora_alpha": 8,
        "lora_bias": false,
        "lora_dropout": 0.0,
        "lora_ga_config": null,
        "megatron_config": null,
        "megatron_core": "megatron.core",
        "modules_to_save": null,
        "monteclora_config": null,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "qalora_group_size": 16,
        "r": 8,
        "rank_pattern": {},
        "revision": null,
        "target_modules": [],
        "target_parameters": null,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": null,
        "use_bdlora": null,
        "use_dora": false,
        "use_qalora": false,
        "use_rslora": false,
        "velora_config": null,
    })
}

/// Fields that are read, or that have no effect on what the adapter computes.
const FREE_FIELDS: [&str; 24] = [
    "alpha_pattern",
    "arrow_config",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
];

/// Refuses a config in which a field that PEFT has and Muster does not read is not off.
fn check_supported(path: &Path, found: &Value) -> Result<(), FileError> {
    let Value::Object(plain) = defaults() else {
        return Ok(());
    };
    for (field, default) in &plain {
        let value = &found[field.as_str()];
        let off = match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(items) => items.is_empty(),
            Value::Object(entries) => entries.is_empty(),
            _ => false,
        };
        // PiSSA, OLoRA and the like change the base weights, which are not in the adapter.
        let harmless_init = field == "init_lora_weights"
            && matches!(value.as_str(), Some("gaussian" | "eva" | "orthogonal"));
        let required = field == "peft_type";
        if value == default || harmless_init || FREE_FIELDS.contains(&field.as_str()) {
            continue;
        }
        if !off || required {
            return Err(FileError::UnsupportedField {
                path: path.to_owned(),
                field: field.clone(),
                found: value.to_string(),
                remedy: match field.as_str() {
                    // PiSSA, OLoRA and the like.
                    "init_lora_weights" => {
                        "it stands on a base that it was taken out of; have PEFT save it as LoRA \
                         (`path_initial_model_for_weight_conversion`)"
                    }
                    _ => "a plain LoRA adapter is needed",
                },
            });
        }
    }
    Ok(())
}

fn pairs<'a>(entries: impl Iterator<Item = (&'a String, Value)>) -> Value {
    let entries = entries.map(|(pattern, value)| (pattern.clone(), value));
    Value::Object(entries.collect())
}

/// A number as JSON, without a fraction where it has none, as Python writes integers.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        json!(value as i64)
    } else {
        json!(value)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn config() -> AdapterConfig {
        AdapterConfig {
            base_model_name_or_path: Some("models/tiny".into()),
            lora_dropout: 0.05,
            use_rslora: true,
            use_dora: true,
            biases: TrainedBiases::LoraOnly,
            lora_bias: true,
            init: AdapterInit::Orthogonal,
            ..AdapterConfig::new(
                4,
                8.0,
                TargetModules::Named(vec!["q_proj".into(), "v_proj".into()]),
            )
        }
    }

    /// A written config with one field changed.
    fn with(field: &str, value: Value) -> (tempfile::TempDir, Result<AdapterConfig, FileError>) {
        let folder = tempfile::tempdir().unwrap();
        config().write(folder.path()).unwrap();
        let path = folder.path().join(ADAPTER_CONFIG);
        let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        json[field] = value;
        std::fs::write(&path, json.to_string()).unwrap();
        let read = AdapterConfig::read(folder.path());
        (folder, read)
    }

    #[test]
    fn what_was_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        config().write(folder.path()).unwrap();
        assert_eq!(AdapterConfig::read(folder.path()).unwrap(), config());
    }

    #[test]
    fn what_is_trained_of_tokens_is_read_back() {
        let these = |ids: &[u32]| TrainedRows::These(ids.to_vec());
        for (embedding, head) in [
            (these(&[7, 2]), these(&[])),
            (these(&[7]), these(&[3, 4])),
            (these(&[]), these(&[3])),
            (TrainedRows::All, these(&[3])),
            (TrainedRows::All, TrainedRows::All),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let config = AdapterConfig {
                tokens: TrainedTokens { embedding, head },
                ..config()
            };
            config.write(folder.path()).unwrap();
            assert_eq!(AdapterConfig::read(folder.path()).unwrap(), config);
        }
    }

    #[test]
    fn parameters_of_experts_may_be_all_that_has_an_adapter() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = config();
        config.target_modules = TargetModules::Named(Vec::new());
        config.shape.parameters = vec!["experts.down_proj".to_owned()];
        config.write(folder.path()).unwrap();
        assert_eq!(AdapterConfig::read(folder.path()).unwrap(), config);
        let told = with("target_parameters", json!("down_proj")).1.unwrap_err();
        assert!(told.to_string().contains("target_parameters"), "{told}");
    }

    #[test]
    fn fields_nobody_knows_are_ignored() {
        assert_eq!(with("invented_in_2030", json!(7)).1.unwrap(), config());
    }

    #[test]
    fn targets_may_be_a_regular_expression_as_peft_keeps_it() {
        let pattern = r".*layers\.[\d]+\.(q|v)_proj";
        let (folder, read) = with("target_modules", json!(pattern));
        let read = read.unwrap();
        assert_eq!(
            read.target_modules,
            TargetModules::Matching(pattern.to_owned())
        );
        read.write(folder.path()).unwrap();
        assert_eq!(AdapterConfig::read(folder.path()).unwrap(), read);
    }

    #[test]
    fn unsupported_fields_are_named() {
        for (field, value) in [
            ("use_dora", json!("yes")),
            ("bias", json!("some")),
            ("modules_to_save", json!(["score"])),
            ("ensure_weight_tying", json!(true)),
            ("trainable_token_indices", json!({"wte": [1]})),
            ("rank_pattern", json!({"q_proj": 0})),
            ("peft_type", json!("IA3")),
            ("peft_type", json!(null)),
            ("layers_to_transform", json!(["first"])),
            ("layers_pattern", json!("h")),
            ("init_lora_weights", json!("pissa")),
            ("r", json!(0)),
            ("r", json!("four")),
            ("lora_alpha", json!("16")),
            ("lora_alpha", json!(0)),
            ("lora_dropout", json!("0.1")),
            ("lora_dropout", json!(1.5)),
            ("use_rslora", json!("yes")),
            ("revision", json!(7)),
            ("alpha_pattern", json!({"q_proj": "two"})),
            ("lora_bias", json!("yes")),
            ("target_modules", json!("model.(q_proj")),
            ("target_modules", json!([])),
        ] {
            let message = with(field, value).1.unwrap_err().to_string();
            assert!(message.contains(field), "{message}");
        }
    }
}
