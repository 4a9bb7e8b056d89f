//! The part of a model of texts and images that is a language model, in folders of both: its configuration is one within the other,
//! and its tensors have a prefix. It is trained by itself, as Transformers' `AutoModelForCausalLM` loads it.

use serde_json::{Value, json};

use super::Architecture;

/// Classes whose language model is a part of them.
const WHOLES: [(&str, &str, Architecture); 3] = [
    (
        "Gemma4ForConditionalGeneration",
        "gemma4",
        Architecture::Gemma4,
    ),
    (
        "Qwen3_5ForConditionalGeneration",
        "qwen3_5",
        Architecture::Qwen35,
    ),
    (
        "Qwen3_5MoeForConditionalGeneration",
        "qwen3_5_moe",
        Architecture::Qwen35Moe,
    ),
];

/// What the names of its tensors begin with there, and by itself.
const PREFIXES: [&str; 2] = ["model.language_model.", "model."];

/// The configuration of the language model within a configuration of both; None where it is not one.
pub(super) fn text_config(config: &Value) -> Option<Value> {
    let class = config["architectures"].get(0).and_then(Value::as_str);
    let kind = config["model_type"].as_str();
    let is_whole = |(name, own, _): &&(&str, &str, _)| match class {
        Some(class) => class == *name,
        None => kind == Some(own),
    };
    let (_, _, architecture) = WHOLES.iter().find(is_whole)?;
    let mut text = config["text_config"].clone();
    if !text.is_object() {
        return None;
    }
    let (class, kind) = architecture.names();
    text["architectures"] = json!([class]);
    if text["model_type"].is_null() {
        text["model_type"] = kind.into();
    }
    // What stands beside it in some folders.
    for key in [
        "tie_word_embeddings",
        "dtype",
        "torch_dtype",
        "quantization_config",
    ] {
        if text[key].is_null() && !config[key].is_null() {
            text[key] = config[key].clone();
        }
    }
    Some(text)
}

/// What a tensor is called in the language model by itself.
pub(super) fn own_name(stored: &str) -> String {
    let [prefix, own] = PREFIXES;
    match stored.strip_prefix(prefix) {
        Some(rest) => format!("{own}{rest}"),
        None => stored.to_owned(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_language_model_within_is_as_if_it_were_by_itself() {
        let whole = json!({
            "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5",
            "tie_word_embeddings": true, "vision_config": {"depth": 3},
            "text_config": {"model_type": "qwen3_5_text", "hidden_size": 64, "dtype": "bfloat16"}
        });
        let expected = json!({
            "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text",
            "tie_word_embeddings": true, "hidden_size": 64, "dtype": "bfloat16"
        });
        assert_eq!(text_config(&whole).unwrap(), expected);
        let mixture = json!({"model_type": "qwen3_5_moe", "text_config": {"num_experts": 8}});
        let expected_mixture = json!({
            "architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text",
            "num_experts": 8
        });
        assert_eq!(text_config(&mixture).unwrap(), expected_mixture);
        assert_eq!(text_config(&expected), None);
        let without = json!({"architectures": ["Qwen3_5ForConditionalGeneration"]});
        assert_eq!(text_config(&without), None);
        assert_eq!(
            own_name("model.language_model.norm.weight"),
            "model.norm.weight"
        );
        assert_eq!(own_name("lm_head.weight"), "lm_head.weight");
    }
}
