//! What a `config.json` of Gemma 4 means, and which are refused.

use std::path::Path;

use serde_json::json;

use super::*;
use crate::model::{ModelConfig, Rotation, base_tensors, linears};

fn parse(change: impl FnOnce(&mut Value)) -> Result<ModelConfig, String> {
    let mut json = json!({
        "architectures": ["Gemma4ForCausalLM"], "vocab_size": 100, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32, "sliding_window": 8,
        "hidden_size_per_layer_input": 0
    });
    change(&mut json);
    ModelConfig::parse(&json, Path::new("config.json")).map_err(|error| error.to_string())
}

fn layer_types(kinds: &str) -> Value {
    let kinds = kinds.chars().map(|kind| match kind {
        's' => "sliding_attention",
        _ => "full_attention",
    });
    kinds.collect::<Vec<_>>().into()
}

#[test]
fn every_sixth_layer_sees_everything_and_has_larger_heads() {
    let plain = parse(|_| {}).unwrap();
    let windows: Vec<Option<usize>> = plain.layer_kinds.iter().map(|kind| kind.window).collect();
    assert_eq!(windows, [Some(8), Some(8), Some(8), Some(8), Some(8), None]);
    assert_eq!(
        (plain.sizes_of(0).head_dim, plain.sizes_of(5).head_dim),
        (16, 32)
    );
    assert_eq!((plain.rotary_dim, plain.local_rotary_dim), (32, 16));
    assert_eq!(plain.layer_kinds[0].rotation, Rotation::Local);
    assert!(plain.tied && plain.value_norms && !plain.norm_offset && !plain.qkv_bias);
    assert_eq!((plain.scales.attention, plain.scales.embedding), (1.0, 8.0));
    // A quarter of the pairs turns, by the frequencies that they have among all.
    let frequencies = plain.rope.frequencies(plain.rotary_dim);
    let still = frequencies.iter().filter(|frequency| **frequency == 0.0);
    assert_eq!((frequencies.len(), still.count()), (16, 12));
    assert_eq!(frequencies[1], 1.0 / 1e6f64.powf(2.0 / 32.0) as f32);
    // The last layer sees everything, whatever its number.
    let seven = parse(|json| json["num_hidden_layers"] = 7.into()).unwrap();
    assert_eq!(seven.layer_kinds[6].window, None);
    assert_eq!(
        parse(|json| json["global_head_dim"] = Value::Null)
            .unwrap()
            .rotary_dim,
        512
    );
}

#[test]
fn values_may_be_keys_in_layers_that_see_everything() {
    let same = parse(|json| {
        json["attention_k_eq_v"] = true.into();
        json["num_global_key_value_heads"] = 1.into();
    });
    let same = same.unwrap();
    let names = |layer| -> Vec<(&str, usize)> {
        let linears = linears(&same, layer).into_iter();
        linears
            .map(|linear| (linear.name(), linear.out))
            .take(4)
            .collect()
    };
    let apart = [
        ("q_proj", 64),
        ("k_proj", 32),
        ("v_proj", 32),
        ("o_proj", 64),
    ];
    assert_eq!(names(0), apart);
    let merged = [
        ("q_proj", 128),
        ("k_proj", 32),
        ("o_proj", 64),
        ("gate_proj", 96),
    ];
    assert_eq!(names(5), merged);
    // As Transformers 5.24 writes the same.
    let written = parse(|json| {
        json["attention_k_eq_v"] = true.into();
        json.as_object_mut().unwrap().remove("global_head_dim");
        json["per_layer_config"] = json!({"05": {"head_dim": 32, "num_key_value_heads": 1}});
    });
    assert_eq!(written.unwrap(), same);
    // Without it the other number counts for nothing.
    let plain = parse(|json| json["num_global_key_value_heads"] = 1.into()).unwrap();
    assert_eq!(plain.sizes_of(5).key_value_heads, 2);
}

#[test]
fn the_last_layers_have_keys_of_the_last_before_them_of_their_kind() {
    let config = parse(|json| {
        json["layer_types"] = layer_types("sfsssf");
        json["num_kv_shared_layers"] = 3.into();
        json["use_double_wide_mlp"] = true.into();
    });
    let config = config.unwrap();
    let of: Vec<KeyValues> = (0..6)
        .map(|layer| config.sizes_of(layer).key_values)
        .collect();
    let (apart, of_one) = (KeyValues::Apart, KeyValues::Of(1));
    assert_eq!(
        of,
        [
            apart,
            apart,
            apart,
            KeyValues::Of(2),
            KeyValues::Of(2),
            of_one
        ]
    );
    let wide: Vec<usize> = (0..6)
        .map(|l| config.sizes_of(l).intermediate_size)
        .collect();
    assert_eq!(wide, [96, 96, 96, 192, 192, 192]);
    let tensors = base_tensors(&config);
    let has = |name: &str| tensors.iter().any(|(found, _)| found == name);
    assert!(has("model.layers.2.self_attn.k_norm.weight"));
    assert!(has("model.layers.3.self_attn.q_norm.weight"));
    for gone in ["k_norm", "k_proj", "v_proj"] {
        assert!(
            !has(&format!("model.layers.3.self_attn.{gone}.weight")),
            "{gone}"
        );
    }
}

#[test]
fn layers_have_inputs_of_their_own() {
    let config = parse(|json| {
        json["hidden_size_per_layer_input"] = 8.into();
        json["vocab_size_per_layer_input"] = 120.into();
    });
    let tensors = base_tensors(&config.unwrap());
    let shape = |name: &str| tensors.iter().find(|(n, _)| n == name).map(|(_, s)| &s[..]);
    for (name, expected) in [
        ("model.embed_tokens_per_layer.weight", &[120, 48][..]),
        ("model.per_layer_model_projection.weight", &[48, 64]),
        ("model.per_layer_projection_norm.weight", &[8]),
        ("model.layers.5.per_layer_input_gate.weight", &[8, 64]),
        ("model.layers.5.per_layer_projection.weight", &[64, 8]),
        ("model.layers.5.post_per_layer_input_norm.weight", &[64]),
        ("model.layers.5.layer_scalar", &[1]),
    ] {
        assert_eq!(shape(name), Some(expected), "{name}");
    }
}

#[test]
fn what_contradicts_itself_is_refused_in_a_line() {
    for (key, value, word) in [
        (
            "num_kv_shared_layers",
            json!(6),
            "leaves none of the 6 layers",
        ),
        ("num_kv_shared_layers", json!(-1), "num_kv_shared_layers"),
        ("num_kv_shared_layers", json!(1), "layer 5 shares keys"),
        (
            "layer_types",
            layer_types("sf"),
            "2 entries for num_hidden_layers 6",
        ),
        ("layer_types", layer_types("ssssss"), "last layer"),
        ("global_head_dim", json!(33), "odd"),
        ("global_head_dim", json!(1 << 20), "above"),
        (
            "hidden_size_per_layer_input",
            Value::Null,
            "hidden_size_per_layer_input",
        ),
        (
            "use_bidirectional_attention",
            json!("all"),
            "use_bidirectional_attention",
        ),
        ("enable_moe_block", json!(true), "num_experts is missing"),
        ("per_layer_config", json!({"6": {}}), "none of its layers"),
        ("per_layer_config", json!({"5": {"head_dim": 0}}), "no size"),
        (
            "per_layer_config",
            json!({"5": {"skip": []}}),
            "per_layer_config with skip",
        ),
        (
            "per_layer_config",
            json!({"4": {"head_dim": 32}}),
            "of one type",
        ),
        ("per_layer_config", json!([]), "per_layer_config"),
        ("attention_k_eq_v", json!("yes"), "attention_k_eq_v"),
        (
            "rope_parameters",
            json!({"rope_theta": 1e4}),
            "full_attention and sliding_attention",
        ),
    ] {
        let told = parse(|json| json[key] = value.clone()).err();
        let told = told.unwrap_or_else(|| panic!("{key} {value} is taken"));
        assert!(told.contains(word) && !told.contains('\n'), "{key}: {told}");
    }
    let told = parse(|json| {
        json["attention_k_eq_v"] = true.into();
        json["num_global_key_value_heads"] = 3.into();
    });
    assert!(told.unwrap_err().contains("num_global_key_value_heads"));
    let few = parse(|json| {
        json["hidden_size_per_layer_input"] = 8.into();
        json["vocab_size_per_layer_input"] = 99.into();
    });
    assert!(few.unwrap_err().contains("vocab_size_per_layer_input 99"));
    parse(|json| json["use_bidirectional_attention"] = "vision".into()).unwrap();
}

#[test]
fn experts_stand_beside_a_dense_half() {
    let config = parse(|json| {
        json["enable_moe_block"] = true.into();
        for (key, size) in [
            ("num_experts", 8),
            ("top_k_experts", 2),
            ("moe_intermediate_size", 24),
        ] {
            json[key] = size.into();
        }
    });
    let config = config.unwrap();
    let experts = config.experts_of(5).unwrap();
    assert!(experts.normalises && experts.sizes.beside_dense);
    assert_eq!((experts.sizes.per_token, experts.sizes.width), (2, 24));
    let tensors = base_tensors(&config);
    let shape = |name: &str| tensors.iter().find(|(n, _)| n == name).map(|(_, s)| &s[..]);
    for (name, expected) in [
        ("mlp.gate_proj.weight", &[96, 64][..]),
        ("router.proj.weight", &[8, 64]),
        ("router.scale", &[64]),
        ("router.per_expert_scale", &[8]),
        ("experts.gate_up_proj", &[8, 48, 64]),
        ("experts.down_proj", &[8, 64, 24]),
        ("post_feedforward_layernorm_2.weight", &[64]),
    ] {
        let name = format!("model.layers.0.{name}");
        assert_eq!(shape(&name), Some(expected), "{name}");
    }
    // Without the switch the other keys count for nothing.
    let dense = parse(|json| json["num_experts"] = 8.into()).unwrap();
    assert_eq!(dense.experts, None);
    let many = parse(|json| {
        json["enable_moe_block"] = true.into();
        for (key, size) in [
            ("num_experts", 8),
            ("top_k_experts", 9),
            ("moe_intermediate_size", 24),
        ] {
            json[key] = size.into();
        }
    });
    assert!(
        many.unwrap_err()
            .contains("top_k_experts 9 is more than the 8")
    );
}
