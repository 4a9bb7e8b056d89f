//! What families have that their `config.json` does not say.

use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::model::{ModelConfig, ModelError};

fn parse(class: &str, change: impl FnOnce(&mut Value)) -> Result<ModelConfig, ModelError> {
    let mut json = json!({
        "architectures": [class], "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2
    });
    change(&mut json);
    ModelConfig::parse(&json, Path::new("config.json"))
}

#[test]
fn phi_3_has_a_window_where_one_is_given_and_no_biases() {
    let plain = parse("Phi3ForCausalLM", |json| {
        json["attention_bias"] = true.into();
    });
    let plain = plain.unwrap();
    assert_eq!(plain.smallest_window(), None);
    assert!(!plain.qkv_bias && !plain.output_bias && !plain.tied);
    assert_eq!((plain.rms_norm_epsilon, plain.rotary_dim), (1e-5, 16));
    let windowed = parse("Phi3ForCausalLM", |json| {
        json["sliding_window"] = 2047.into();
        // It reads none.
        json["layer_types"] = json!(["full_attention", "full_attention"]);
    });
    let windows = windowed.unwrap().layer_kinds;
    assert!(windows.iter().all(|kind| kind.window == Some(2047)));
}

#[test]
fn gpt_oss_has_sinks_biases_and_a_window_on_every_other_layer() {
    let parse = |change: &dyn Fn(&mut Value)| {
        let config = parse("GptOssForCausalLM", |json| {
            json["num_local_experts"] = 4.into();
            json["num_experts_per_tok"] = 2.into();
            change(json);
        });
        config.unwrap()
    };
    let windows = |config: &ModelConfig| {
        let kinds = config.layer_kinds.iter();
        kinds.map(|kind| kind.window).collect::<Vec<_>>()
    };
    let plain = parse(&|_| {});
    assert!(plain.sinks && plain.qkv_bias && plain.output_bias && !plain.tied);
    assert_eq!((plain.head_dim, plain.rms_norm_epsilon), (64, 1e-5));
    assert_eq!(windows(&plain), [Some(128), None]);
    let said = parse(&|json| {
        json["attention_bias"] = false.into();
        json["sliding_window"] = 16.into();
        json["layer_types"] = json!(["full_attention", "sliding_attention"]);
    });
    assert!(!said.qkv_bias && !said.output_bias);
    assert_eq!(windows(&said), [None, Some(16)]);
}

#[test]
fn dropouts_of_phi_3_are_refused_by_name() {
    for key in ["resid_pdrop", "embd_pdrop", "attention_dropout"] {
        let message = parse("Phi3ForCausalLM", |json| json[key] = 0.1.into());
        let message = message.unwrap_err().to_string();
        assert!(message.contains(&format!("{key} 0.1")), "{message}");
        parse("Phi3ForCausalLM", |json| json[key] = 0.0.into()).unwrap();
    }
}

#[test]
fn glm_rotates_half_of_each_head_and_glm_4_0414_has_four_norms() {
    let glm4 = parse("Glm4ForCausalLM", |_| {}).unwrap();
    assert_eq!((glm4.head_dim, glm4.rotary_dim), (128, 64));
    assert_eq!(glm4.rotary_pairs, RotaryPairs::Neighbours);
    assert!(glm4.qkv_bias && !glm4.output_bias);
    assert_eq!(glm4.rms_norm_epsilon, 1.5625e-7);
    let norms: Vec<&str> = glm4.norms.names().collect();
    let expected = [
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
    ];
    assert_eq!(norms, expected);
    let glm = parse("GlmForCausalLM", |json| {
        json["attention_bias"] = false.into();
        json["partial_rotary_factor"] = 0.25.into();
    });
    let glm = glm.unwrap();
    assert_eq!((glm.norms, glm.qkv_bias), (LayerNorms::BEFORE, false));
    assert_eq!(glm.rotary_dim, 32);
}
