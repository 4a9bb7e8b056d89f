//! Partial rotation and LongRoPE, as a `config.json` says them.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use serde_json::{Value, json};

use crate::model::ModelConfig;

/// Phi-4-mini in small: heads of 32 dimensions, of which 24 are rotated.
fn phi(change: impl FnOnce(&mut Value)) -> Result<ModelConfig, String> {
    let mut json = json!({
        "architectures": ["Phi3ForCausalLM"], "vocab_size": 100, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "partial_rotary_factor": 0.75, "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096, "rope_theta": 10000.0,
        "rope_scaling": {"type": "longrope", "short_factor": vec![1.0; 12], "long_factor": vec![2.0; 12]}
    });
    change(&mut json);
    ModelConfig::parse(&json, Path::new("config.json")).map_err(|error| error.to_string())
}

#[test]
fn long_texts_have_frequencies_of_their_own_and_all_the_same_factor() {
    let config = phi(|_| {}).unwrap();
    assert_eq!(config.rotary_dim, 24);
    let short = config.rope.frequencies(config.rotary_dim);
    assert_eq!(short.len(), 12);
    assert_eq!(short[0], 1.0);
    let long = config.rope.long_texts(config.rotary_dim).unwrap();
    assert_eq!(long.above, 4096);
    assert!(
        short
            .iter()
            .zip(&long.frequencies)
            .all(|(short, long)| *long == short / 2.0)
    );
    // sqrt(1 + ln(32) / ln(4096)), as Phi-3-mini-128k and Phi-4-mini have it.
    let factor = config.rope.attention_factor();
    assert!((factor - 1.190_238_1).abs() < 1e-6, "{factor}");
    let given = phi(|json| json["rope_scaling"]["attention_factor"] = 1.5.into()).unwrap();
    assert_eq!(given.rope.attention_factor(), 1.5);
    let not_longer = phi(|json| json["max_position_embeddings"] = 4096.into()).unwrap();
    assert_eq!(not_longer.rope.attention_factor(), 1.0);
    let by_factor = phi(|json| json["rope_scaling"]["factor"] = 64.0.into()).unwrap();
    let factor = by_factor.rope.attention_factor();
    assert!((factor - (1.5f64).sqrt()).abs() < 1e-9, "{factor}");
}

#[test]
fn older_and_newer_spellings_of_longrope_mean_the_same() {
    let expected = phi(|_| {}).unwrap();
    for kind in ["su", "yarn"] {
        assert_eq!(
            phi(|json| json["rope_scaling"]["type"] = kind.into()).unwrap(),
            expected
        );
    }
    let newer = phi(|json| {
        let scaling = json["rope_scaling"].take();
        json["rope_parameters"] = json!({
            "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 4096,
            "short_factor": scaling["short_factor"], "long_factor": scaling["long_factor"]
        });
        json["rope_theta"] = Value::Null;
        json["partial_rotary_factor"] = Value::Null;
    });
    assert_eq!(newer.unwrap(), expected);
}

/// Transformers takes the older key then.
#[test]
fn an_older_key_that_says_something_else_than_the_newer_is_refused() {
    let with = |older: Value| {
        phi(|json| {
            json["rope_parameters"] = json["rope_scaling"].take();
            json["rope_parameters"]["rope_type"] = "longrope".into();
            json["rope_scaling"] = older;
        })
    };
    with(json!({"type": "longrope"})).unwrap();
    for older in [
        json!({"type": "linear"}),
        json!({"rope_type": "longrope", "factor": 8.0}),
    ] {
        let refused = with(older).unwrap_err();
        assert!(
            refused.contains("rope_scaling says something else"),
            "{refused}"
        );
    }
}

#[test]
fn contradictions_of_longrope_are_refused_by_name() {
    type Change = fn(&mut Value);
    let cases: [(Change, &str); 9] = [
        (
            |json| json["rope_scaling"]["long_factor"] = json!(vec![1.0; 11]),
            "long_factor of the rope scaling has 11 entries, but 12 pairs are rotated",
        ),
        (
            |json| json["partial_rotary_factor"] = 1.0.into(),
            "short_factor of the rope scaling has 12 entries, but 16 pairs are rotated",
        ),
        (
            |json| json["rope_scaling"]["short_factor"] = Value::Null,
            "rope scaling \"longrope\" without a valid short_factor",
        ),
        (
            |json| json["rope_scaling"]["short_factor"][3] = 0.into(),
            "rope_scaling.short_factor is",
        ),
        (
            |json| json["rope_scaling"]["original_max_position_embeddings"] = 8192.into(),
            "original_max_position_embeddings is 4096, but 8192 in the rope scaling",
        ),
        (
            |json| json["original_max_position_embeddings"] = 1.into(),
            "original_max_position_embeddings of 1",
        ),
        (
            |json| json["rope_scaling"]["type"] = "linear".into(),
            "rope scaling \"linear\" (supported with this architecture: \"default\", \"longrope\")",
        ),
        (
            |json| json["rope_scaling"]["long_mscale"] = 1.2.into(),
            "long_mscale",
        ),
        (
            |json| json["partial_rotary_factor"] = 0.1.into(),
            "partial_rotary_factor 0.1 of a head_dim of 32 rotates 3 dimensions",
        ),
    ];
    for (change, expected) in cases {
        let message = phi(change).unwrap_err();
        assert!(
            message.contains(expected) && !message.contains('\n'),
            "{message}"
        );
    }
}

#[test]
fn families_that_rotate_whole_heads_refuse_a_part() {
    let llama = |factor: f64| {
        phi(|json| {
            json["architectures"][0] = "LlamaForCausalLM".into();
            json["rope_scaling"] = Value::Null;
            json["partial_rotary_factor"] = factor.into();
        })
    };
    assert_eq!(llama(1.0).unwrap().rotary_dim, 32);
    assert!(llama(0.5).unwrap_err().contains("partial_rotary_factor"));
}

/// Numbers of Transformers 5.24's `GptOssRotaryEmbedding`.
#[test]
fn yarn_blends_from_whole_pairs_on_unless_it_is_not_truncated() {
    let gpt_oss = |change: &dyn Fn(&mut Value)| {
        let config = phi(|json| {
            json["architectures"][0] = "GptOssForCausalLM".into();
            json["partial_rotary_factor"] = Value::Null;
            json["rope_scaling"] = Value::Null;
            json["rope_theta"] = 150_000.into();
            json["num_local_experts"] = 4.into();
            json["num_experts_per_tok"] = 2.into();
            change(json);
        });
        config.unwrap()
    };
    let check = |config: &ModelConfig, expected: [f64; 3]| {
        let frequencies = config.rope.frequencies(config.rotary_dim);
        for (pair, expected) in [8, 9, 17].into_iter().zip(expected) {
            let found = f64::from(frequencies[pair]);
            assert!((found / expected - 1.0).abs() < 2e-6, "{pair}: {found}");
        }
    };
    let usual = gpt_oss(&|_| {});
    assert_eq!((usual.head_dim, usual.rope.theta), (64, 150_000.0));
    check(
        &usual,
        [
            0.050_813_272_595_4,
            0.031_705_696_135_8,
            0.000_129_318_694_2,
        ],
    );
    assert!((usual.rope.attention_factor() - 1.346_573_590_28).abs() < 1e-9);
    let yarn = json!({
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "original_max_position_embeddings": 4096
    });
    let truncated = gpt_oss(&|json| json["rope_scaling"] = yarn.clone());
    check(
        &truncated,
        [
            0.050_813_272_595_4,
            0.031_620_752_066_4,
            0.000_227_947_835_8,
        ],
    );
    let said = gpt_oss(&|json| {
        json["rope_scaling"] = yarn.clone();
        json["rope_scaling"]["truncate"] = false.into();
    });
    assert_eq!(said, usual);
    let plain = gpt_oss(&|json| json["rope_scaling"] = json!({"rope_type": "default"}));
    assert_eq!(plain.rope.attention_factor(), 1.0);
}
