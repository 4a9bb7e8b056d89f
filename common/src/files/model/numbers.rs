//! What `config.json` says in numbers and switches: of the right kind and within bounds wherever it is given, so that
//! nobody who reads it later takes a default for what was meant otherwise, or computes with sizes that overflow.
//!
//! In: the JSON. Out: nothing, or every value that cannot be. What is left out is not missed here.

use std::path::Path;

use serde_json::Value;

use super::{Architecture, CONFIG};
use crate::files::FileError;

// The largest sizes that are believed: the product of a matrix's sides, the layers and the bytes of a number stays far
// below what 64 bits hold.
/// Largest side of a matrix, but for the vocabulary's.
const MAX_WIDTH: u64 = 1 << 20;
const MAX_HEADS: u64 = 4096;
const MAX_VOCABULARY: u64 = 0x00ff_ffff;
const MAX_LAYERS: u64 = 4096;
const MAX_POSITIONS: u64 = 1 << 40;
const MAX_EXPERTS: u64 = 4096;
/// Largest side of the state of a head of linear attention.
const MAX_HEAD_STATE: u64 = 4096;
/// Most tokens that a convolution reads.
const MAX_KERNEL: u64 = 64;
/// Experts of all layers, each of which has tensors of its own.
const MAX_EXPERTS_IN_ALL: u64 = 1 << 17;

/// The values of a config, and the problems found in them so far.
struct Values<'a> {
    config: &'a Value,
    problems: Vec<String>,
}

/// Refuses a `config.json` (`path` is named) in which a value that is used cannot be, with all of them.
pub fn check_numbers(path: &Path, config: &Value) -> Result<(), FileError> {
    if !config.is_object() {
        return Err(FileError::malformed(path, "is not a JSON object"));
    }
    let mut values = Values {
        config,
        problems: Vec::new(),
    };
    values.sizes();
    values.heads();
    values.factors();
    values.rope();
    values.layer_types();
    values.no_rope_layers();
    if values.problems.is_empty() {
        return Ok(());
    }
    Err(FileError::malformed(path, values.problems.join("; ")))
}

impl Values<'_> {
    fn sizes(&mut self) {
        for (key, most) in [
            ("vocab_size", MAX_VOCABULARY),
            ("hidden_size", MAX_WIDTH),
            ("intermediate_size", MAX_WIDTH),
            ("num_hidden_layers", MAX_LAYERS),
            ("num_attention_heads", MAX_HEADS),
            ("num_key_value_heads", MAX_HEADS),
            ("head_dim", MAX_WIDTH),
            ("max_position_embeddings", MAX_POSITIONS),
            ("original_max_position_embeddings", MAX_POSITIONS),
            ("sliding_window", MAX_POSITIONS),
            ("sliding_window_pattern", MAX_LAYERS),
            ("no_rope_layer_interval", MAX_LAYERS),
            ("num_experts", MAX_EXPERTS),
            ("num_local_experts", MAX_EXPERTS),
            ("num_experts_per_tok", MAX_EXPERTS),
            ("top_k_experts", MAX_EXPERTS),
            ("moe_intermediate_size", MAX_WIDTH),
            ("shared_expert_intermediate_size", MAX_WIDTH),
            ("decoder_sparse_step", MAX_LAYERS),
            ("full_attention_interval", MAX_LAYERS),
            ("linear_num_key_heads", MAX_HEADS),
            ("linear_num_value_heads", MAX_HEADS),
            ("linear_key_head_dim", MAX_HEAD_STATE),
            ("linear_value_head_dim", MAX_HEAD_STATE),
            ("linear_conv_kernel_dim", MAX_KERNEL),
            ("global_head_dim", MAX_WIDTH),
            ("num_global_key_value_heads", MAX_HEADS),
            ("vocab_size_per_layer_input", MAX_VOCABULARY),
        ] {
            let value = &self.config[key];
            let is_size = value
                .as_u64()
                .is_some_and(|size| (1..=most).contains(&size));
            // What Qwen2-MoE writes where it has none.
            let is_off = key == "sliding_window" && self.says_no_window() && value == 0;
            if !value.is_null() && !is_size && !is_off {
                self.refuse(key, value, &format!("a whole number from 1 to {most}"));
            }
        }
        self.sizes_that_may_be_zero();
        for key in ["num_experts", "num_local_experts"] {
            let size = |key: &str| self.config[key].as_u64().unwrap_or(0);
            let layers = size("num_hidden_layers").max(1);
            if size(key).saturating_mul(layers) > MAX_EXPERTS_IN_ALL {
                let most = MAX_EXPERTS_IN_ALL / layers;
                let value = self.config[key].clone();
                self.refuse(
                    key,
                    &value,
                    &format!("at most {most} in each of {layers} layers"),
                );
            }
        }
        for key in [
            "attention_bias",
            "qkv_bias",
            "mlp_bias",
            "tie_word_embeddings",
            "use_sliding_window",
            "norm_topk_prob",
            "output_router_logits",
            "attn_output_gate",
            "attention_k_eq_v",
            "use_double_wide_mlp",
            "enable_moe_block",
        ] {
            let value = &self.config[key];
            if !value.is_null() && !value.is_boolean() {
                self.refuse(key, value, "true or false");
            }
        }
    }

    fn sizes_that_may_be_zero(&mut self) {
        let config = self.config;
        let layers = config["num_hidden_layers"].as_u64().unwrap_or(1).max(1);
        for (key, most) in [
            ("num_kv_shared_layers", MAX_LAYERS),
            // All layers' side by side are a side of a matrix.
            ("hidden_size_per_layer_input", MAX_WIDTH / layers),
        ] {
            if let Some(value) = config.get(key)
                && value.as_u64().is_none_or(|size| size > most)
            {
                self.refuse(key, value, &format!("a whole number from 0 to {most}"));
            }
        }
        let own = &config["per_layer_config"];
        if !own.is_null() && !own.is_object() {
            self.refuse("per_layer_config", own, "an object");
        }
    }

    fn says_no_window(&self) -> bool {
        self.config["use_sliding_window"] == false
    }

    /// Checks what must divide: heads, their groups and widths.
    fn heads(&mut self) {
        let size = |key: &str| self.config[key].as_u64().filter(|size| *size > 0);
        let Some(heads) = size("num_attention_heads") else {
            return;
        };
        let head_dim = size("head_dim");
        let mut problems = Vec::new();
        if let Some(shared) = size("num_key_value_heads")
            && heads % shared != 0
        {
            problems.push(format!(
                "num_key_value_heads {shared} does not divide num_attention_heads {heads}"
            ));
        }
        if let Some(hidden) = size("hidden_size")
            && head_dim.is_none()
            && hidden % heads != 0
        {
            problems.push(format!(
                "num_attention_heads {heads} does not divide hidden_size {hidden}, and there is no head_dim"
            ));
        }
        if let Some(odd) = head_dim.filter(|size| size % 2 == 1) {
            problems.push(format!("head_dim {odd} is odd, where pairs are rotated"));
        }
        if let Some(head_dim) = head_dim
            && heads.saturating_mul(head_dim) > MAX_WIDTH
        {
            problems.push(format!(
                "num_attention_heads {heads} times head_dim {head_dim} is above {}",
                MAX_WIDTH
            ));
        }
        for part in ["key", "value"] {
            let keys = [
                format!("linear_num_{part}_heads"),
                format!("linear_{part}_head_dim"),
            ];
            let [heads, width] = [&keys[0], &keys[1]].map(|key| size(key).unwrap_or(1));
            if heads.saturating_mul(width) > MAX_WIDTH {
                problems.push(format!(
                    "{} {heads} times {} {width} is above {MAX_WIDTH}",
                    keys[0], keys[1]
                ));
            }
        }
        self.problems.extend(problems);
    }

    fn factors(&mut self) {
        let config = self.config;
        // Without it there is a default; null would not be read by Transformers either.
        if let Some(value) = config.get("rms_norm_eps") {
            let fits = |number| number > 0.0 && number < 1.0;
            self.number("rms_norm_eps", value, fits, "a number above 0 and below 1");
        }
        let range = &config["initializer_range"];
        if !range.is_null() {
            let fits = |number| (0.0..=1e3).contains(&number);
            self.number("initializer_range", range, fits, "a number from 0 to 1000");
        }
        for key in [
            "attention_dropout",
            "resid_pdrop",
            "embd_pdrop",
            "router_jitter_noise",
        ] {
            let dropout = &config[key];
            if !dropout.is_null() {
                let fits = |number| (0.0..1.0).contains(&number);
                self.number(key, dropout, fits, "a number from 0, below 1");
            }
        }
        for key in ["hidden_act", "hidden_activation"] {
            let activation = &config[key];
            if !activation.is_null() && !activation.is_string() {
                self.refuse(key, activation, "the name of an activation");
            }
        }
        let key = "router_aux_loss_coef";
        if !config[key].is_null() {
            let fits = |number| (0.0..=1e3).contains(&number);
            self.number(key, &config[key], fits, "a number from 0 to 1000");
        }
        for key in [
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "embedding_multiplier",
            "attention_multiplier",
            "residual_multiplier",
            "logits_scaling",
            "rope_local_base_freq",
            "clip_qkv",
            "swiglu_alpha",
            "swiglu_limit",
        ] {
            let value = &config[key];
            if !value.is_null() {
                let fits = |number| number > 0.0 && number <= 1e9;
                self.number(key, value, fits, "a number above 0, at most 1e9");
            }
        }
    }

    /// Checks the rotary embedding: `rope_theta` beside `rope_scaling`, or Transformers 5's `rope_parameters`, which holds both.
    fn rope(&mut self) {
        self.rope_theta("rope_theta", &self.config["rope_theta"]);
        self.rotated(
            "partial_rotary_factor",
            &self.config["partial_rotary_factor"],
        );
        for key in ["rope_scaling", "rope_parameters"] {
            let scaling = &self.config[key];
            if scaling.is_null() {
                continue;
            }
            if !scaling.is_object() {
                self.refuse(key, scaling, "an object");
                continue;
            }
            self.rope_scaling(key, scaling);
            // One of each type of layer.
            for kind in ["full_attention", "sliding_attention"] {
                let own = &scaling[kind];
                match own.is_object() {
                    true => self.rope_scaling(&format!("{key}.{kind}"), own),
                    false if own.is_null() => {}
                    false => self.refuse(&format!("{key}.{kind}"), own, "an object"),
                }
            }
        }
    }

    fn rope_scaling(&mut self, key: &str, scaling: &Value) {
        self.rope_theta(&format!("{key}.rope_theta"), &scaling["rope_theta"]);
        self.rotated(
            &format!("{key}.partial_rotary_factor"),
            &scaling["partial_rotary_factor"],
        );
        for name in ["rope_type", "type"] {
            let kind = &scaling[name];
            if !kind.is_null() && !kind.is_string() {
                self.refuse(&format!("{key}.{name}"), kind, "a name");
            }
        }
        for name in [
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "attention_factor",
        ] {
            let value = &scaling[name];
            if !value.is_null() {
                let fits = |number| number > 0.0 && number <= MAX_POSITIONS as f64;
                self.number(&format!("{key}.{name}"), value, fits, "a number above 0");
            }
        }
        let truncate = &scaling["truncate"];
        if !truncate.is_null() && !truncate.is_boolean() {
            self.refuse(&format!("{key}.truncate"), truncate, "true or false");
        }
        for name in ["short_factor", "long_factor"] {
            let list = &scaling[name];
            let fits = |number: f64| number > 0.0 && number <= 1e9;
            let is_factor = |value: &Value| value.as_f64().is_some_and(fits);
            let is_list = |list: &Vec<Value>| {
                list.len() as u64 <= MAX_WIDTH / 2 && list.iter().all(is_factor)
            };
            if !list.is_null() && !list.as_array().is_some_and(is_list) {
                let key = format!("{key}.{name}");
                self.refuse(&key, list, "a list of numbers above 0, at most 1e9");
            }
        }
        let factor = |name: &str| scaling[name].as_f64();
        if let (Some(low), Some(high)) = (factor("low_freq_factor"), factor("high_freq_factor"))
            && low >= high
        {
            self.problems.push(format!(
                "{key}.low_freq_factor {low} is not below high_freq_factor {high}"
            ));
        }
    }

    fn rope_theta(&mut self, key: &str, value: &Value) {
        if !value.is_null() {
            let fits = |number| (1.0..=1e18).contains(&number);
            self.number(key, value, fits, "a number from 1 to 1e18");
        }
    }

    fn rotated(&mut self, key: &str, value: &Value) {
        if !value.is_null() {
            let fits = |number| number > 0.0 && number <= 1.0;
            self.number(key, value, fits, "a number above 0, at most 1");
        }
    }

    /// SmolLM3's list of layers with positions (1) and without (0).
    fn no_rope_layers(&mut self) {
        let list = &self.config["no_rope_layers"];
        if list.is_null() {
            return;
        }
        let layers = self.config["num_hidden_layers"].as_u64();
        let is_flag = |value: &Value| matches!(value.as_u64(), Some(0 | 1));
        let fits = list
            .as_array()
            .is_some_and(|list| Some(list.len() as u64) == layers && list.iter().all(is_flag));
        if !fits {
            self.refuse(
                "no_rope_layers",
                list,
                "a list of 0 and 1, one for each layer",
            );
        }
    }

    fn layer_types(&mut self) {
        let types = &self.config["layer_types"];
        if types.is_null() {
            return;
        }
        let Some(types) = types.as_array() else {
            return self.refuse("layer_types", types, "a list");
        };
        let architecture = Architecture::of_config(Path::new(CONFIG), self.config);
        let known = match architecture {
            Ok(Architecture::Qwen35 | Architecture::Qwen35Moe | Architecture::Qwen3Next) => {
                ["full_attention", "linear_attention"]
            }
            _ => ["full_attention", "sliding_attention"],
        };
        let other = types
            .iter()
            .find(|kind| !known.iter().any(|known| *kind == known));
        if let Some(other) = other {
            let expected = format!("a list of {}", known.join(" and "));
            self.refuse("layer_types", other, &expected);
        }
        if let Some(layers) = self.config["num_hidden_layers"].as_u64()
            && types.len() as u64 != layers
        {
            self.problems.push(format!(
                "layer_types has {} entries for num_hidden_layers {layers}",
                types.len()
            ));
        }
    }

    fn number(&mut self, key: &str, value: &Value, fits: impl Fn(f64) -> bool, expected: &str) {
        if !value.as_f64().is_some_and(fits) {
            self.refuse(key, value, expected);
        }
    }

    fn refuse(&mut self, key: &str, value: &Value, expected: &str) {
        let found = shortened(value);
        self.problems
            .push(format!("{key} is {found}, not {expected}"));
    }
}

/// A value as JSON, as much of it as fits a line.
fn shortened(value: &Value) -> String {
    const MOST: usize = 40;
    let text = value.to_string();
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config() -> Value {
        json!({
            "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 2,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000, "tie_word_embeddings": true, "max_position_embeddings": 40960,
            "hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02
        })
    }

    fn check(change: impl FnOnce(&mut Value)) -> Result<(), String> {
        let mut config = config();
        change(&mut config);
        check_numbers(Path::new("m/config.json"), &config).map_err(|error| error.to_string())
    }

    #[test]
    fn what_models_have_is_taken() {
        check(|_| {}).unwrap();
        for key in [
            "head_dim",
            "num_key_value_heads",
            "rope_theta",
            "rope_scaling",
            "rope_parameters",
            "sliding_window",
            "layer_types",
            "attention_bias",
            "tie_word_embeddings",
            "initializer_range",
        ] {
            check(|config| config[key] = Value::Null).unwrap();
        }
        check(|config| *config = json!({})).unwrap();
        let llama3 = json!({
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192
        });
        check(|config| config["rope_scaling"] = llama3).unwrap();
        check(|config| config["layer_types"] = json!(["full_attention", "sliding_attention"]))
            .unwrap();
    }

    #[test]
    fn what_cannot_be_is_refused_with_file_and_key() {
        for (key, value) in [
            ("rms_norm_eps", json!("x")),
            ("rms_norm_eps", json!(0)),
            ("rms_norm_eps", json!(-1e-6)),
            ("rms_norm_eps", json!(1)),
            ("rms_norm_eps", Value::Null),
            ("rms_norm_eps", json!(true)),
            ("rope_theta", json!("abc")),
            ("rope_theta", json!(-1)),
            ("rope_theta", json!(0.0)),
            ("rope_theta", json!([10000])),
            ("hidden_size", json!(0)),
            ("hidden_size", json!(-1)),
            ("hidden_size", json!(1024.0)),
            ("hidden_size", json!("1024")),
            ("hidden_size", json!(16_777_215)),
            ("vocab_size", json!(u64::MAX)),
            ("num_hidden_layers", json!(5000)),
            ("num_attention_heads", json!("sixteen")),
            ("num_key_value_heads", json!(3)),
            ("num_key_value_heads", json!(0)),
            ("head_dim", json!(31)),
            ("head_dim", json!(1 << 20)),
            ("max_position_embeddings", json!(-5)),
            ("sliding_window", json!("wide")),
            ("attention_bias", json!("false")),
            ("tie_word_embeddings", json!(1)),
            ("attention_dropout", json!(1.5)),
            ("initializer_range", json!(-0.02)),
            ("hidden_act", json!(3)),
            ("rope_scaling", json!("linear")),
            ("rope_scaling", json!({"type": 3})),
            ("rope_scaling", json!({"type": "linear", "factor": "2"})),
            (
                "rope_scaling",
                json!({"low_freq_factor": 4.0, "high_freq_factor": 4.0}),
            ),
            ("rope_parameters", json!({"rope_theta": "abc"})),
            ("rope_parameters", json!({"truncate": "no"})),
            ("swiglu_limit", json!(0)),
            ("swiglu_alpha", json!("wide")),
            ("partial_rotary_factor", json!("half")),
            ("layer_types", json!("full_attention")),
            ("layer_types", json!(["full_attention"])),
            ("layer_types", json!(["full_attention", "linear_attention"])),
        ] {
            let message = check(|config| config[key] = value.clone()).unwrap_err();
            assert!(message.starts_with("m/config.json: "), "{message}");
            assert!(message.contains(key), "{key} {value}: {message}");
        }
        let message = check(|config| *config = json!([])).unwrap_err();
        assert!(message.contains("object"), "{message}");
    }

    #[test]
    fn heads_must_divide_where_nothing_else_gives_their_size() {
        let message = check(|config| {
            config["head_dim"] = Value::Null;
            config["hidden_size"] = json!(1000);
        });
        assert!(
            message
                .unwrap_err()
                .contains("does not divide hidden_size 1000")
        );
    }

    #[test]
    fn all_problems_are_told_at_once_and_no_value_fills_the_screen() {
        let message = check(|config| {
            config["rms_norm_eps"] = json!("x".repeat(100_000));
            config["rope_theta"] = json!(-1);
        })
        .unwrap_err();
        assert!(message.contains("rms_norm_eps") && message.contains("rope_theta is -1"));
        assert!(message.len() < 300, "{}", message.len());
    }
}
