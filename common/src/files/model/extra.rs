//! Tensors of a model folder that its configuration does not call for: which of them may be left out, and why there may be
//! others.

use serde_json::Value;

/// Prefixes of the tensors of parts that some folders carry beside a language model.
const PARTS: [&str; 18] = [
    "visual.",
    "vision_tower.",
    "vision_model.",
    "vision_encoder.",
    "multi_modal_projector.",
    "mm_projector.",
    "image_newline",
    "audio_tower.",
    "audio_encoder.",
    "embed_vision.",
    "embed_audio.",
    "speech_encoder.",
    "v_head.",
    "value_head.",
    "score.",
    "classifier.",
    "reward_head.",
    "mtp.",
];

/// Name endings of buffers that can be computed again, and of scales of caches that Muster does not have.
const BUFFERS: [&str; 7] = [
    ".inv_freq",
    ".cos_cached",
    ".sin_cached",
    ".masked_bias",
    "position_ids",
    ".k_scale",
    ".v_scale",
];

/// Whether a tensor takes no part in what the model computes of text. `config` is that of the language model.
pub(super) fn is_harmless(name: &str, config: &Value) -> bool {
    if is_of_shared_keys(name, config) {
        return true;
    }
    let inner = name.strip_prefix("model.").unwrap_or(name);
    let is_buffer = BUFFERS.iter().any(|ending| name.ends_with(ending));
    is_buffer || PARTS.iter().any(|part| inner.starts_with(part)) || is_foreign(name)
}

/// Whether a tensor would make keys and values in a layer that has an earlier one's: some folders have them, and nobody reads them.
fn is_of_shared_keys(name: &str, config: &Value) -> bool {
    const MODULES: [&str; 4] = ["k_proj", "v_proj", "k_norm", "v_norm"];
    let size = |key: &str| config[key].as_u64().unwrap_or(0);
    let sharing = size("num_kv_shared_layers");
    let first = size("num_hidden_layers").saturating_sub(sharing);
    let is_one = MODULES
        .iter()
        .any(|module| name.contains(&format!(".self_attn.{module}.")));
    sharing > 0 && is_one && layer_of(name).is_some_and(|layer| layer >= first)
}

/// Whether a tensor is not of the decoder at all: nothing in its name is a part of one.
fn is_foreign(name: &str) -> bool {
    const DECODER: [&str; 10] = [
        "model.",
        "lm_head",
        "layers.",
        "transformer",
        "decoder",
        "attn",
        "mlp",
        "norm",
        "embed",
        "lora",
    ];
    !DECODER.iter().any(|part| name.contains(part))
}

/// Why a tensor may be there that cannot be left out, and what to do.
pub(super) fn reason(name: &str, config: &Value) -> String {
    if name.contains(".lora_") || name.contains(".base_layer.") {
        return "they are an adapter's: merge it into its model first".to_owned();
    }
    const QUANTISED: [&str; 9] = [
        "scale",
        "scale_inv",
        "zero_point",
        "qweight",
        "qzeros",
        "scales",
        "g_idx",
        "absmax",
        "quant_map",
    ];
    let last = name.rsplit('.').next().unwrap_or(name);
    if QUANTISED
        .iter()
        .any(|word| last == *word || last.ends_with(&format!("_{word}")))
        || name.contains(".quant_state.")
    {
        return "its weights are quantised: use the model before that".to_owned();
    }
    if let (Some(layer), Some(layers)) = (layer_of(name), config["num_hidden_layers"].as_u64())
        && layer >= layers
    {
        return format!(
            "num_hidden_layers in config.json is {layers}; without the other layers it would be another model"
        );
    }
    let why = if name.contains(".q_norm.") || name.contains(".k_norm.") {
        "Qwen3ForCausalLM has them"
    } else if name.ends_with(".bias") {
        "attention_bias or mlp_bias in config.json say that there are none, or it is of another architecture"
    } else {
        "config.json is of another model or architecture"
    };
    format!("{why}; without them it would be another model")
}

/// The layer that a tensor is of.
fn layer_of(name: &str) -> Option<u64> {
    let (_, rest) = name.split_once("layers.")?;
    rest.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_reason_follows_the_tensor() {
        let config = json!({"num_hidden_layers": 2});
        for (name, word) in [
            ("model.layers.0.self_attn.q_norm.weight", "Qwen3ForCausalLM"),
            ("model.layers.1.self_attn.q_proj.bias", "attention_bias"),
            (
                "model.layers.2.mlp.up_proj.weight",
                "num_hidden_layers in config.json is 2",
            ),
            ("model.layers.0.mlp.up_proj.lora_B.weight", "adapter"),
            ("model.layers.0.mlp.up_proj.weight_scale_inv", "quantised"),
            ("model.layers.0.mlp.up_proj.qweight", "quantised"),
            (
                "model.layers.0.pre_feedforward_layernorm.weight",
                "another model or architecture",
            ),
        ] {
            let reason = reason(name, &config);
            assert!(reason.contains(word), "{name}: {reason}");
            assert!(!is_harmless(name, &config), "{name}");
        }
    }

    #[test]
    fn keys_of_layers_that_have_those_of_an_earlier_one_are_passed_over() {
        let config = json!({"num_hidden_layers": 4, "num_kv_shared_layers": 2});
        let own = |layer: usize, module: &str| {
            let name = format!("model.layers.{layer}.self_attn.{module}.weight");
            is_harmless(&name, &config)
        };
        assert!(own(2, "k_proj") && own(3, "v_proj") && own(3, "k_norm"));
        assert!(!own(1, "k_proj") && !own(3, "q_proj") && !own(3, "k_proj_of"));
        let without = json!({"num_hidden_layers": 4});
        let name = "model.layers.4.self_attn.k_proj.weight";
        assert!(!is_harmless(name, &without));
    }
}
