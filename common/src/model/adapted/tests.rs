//! Which modules get an adapter, by the families' names, and what is refused.

use std::path::Path;

use serde_json::json;

use super::*;

fn config(class: &str) -> ModelConfig {
    let json = json!({
        "architectures": [class], "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40, "mlp_only_layers": [1], "full_attention_interval": 2
    });
    ModelConfig::parse(&json, Path::new("config.json")).unwrap()
}

fn named(names: &[&str]) -> TargetModules {
    TargetModules::Named(names.iter().map(|name| name.to_string()).collect())
}

#[test]
fn adapters_go_on_the_matrix_that_is_there() {
    let config = config("Phi3ForCausalLM");
    let modules = targets(&config, &named(&["qkv_proj", "gate_up_proj"])).unwrap();
    let paths: Vec<&str> = modules.iter().map(|module| module.path.as_str()).collect();
    let expected = [
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.mlp.gate_up_proj",
        "model.layers.1.self_attn.qkv_proj",
        "model.layers.1.mlp.gate_up_proj",
    ];
    assert_eq!(paths, expected);
    let all = targets(&config, &TargetModules::AllLinear).unwrap();
    assert_eq!(all.len(), 8);
    let message = targets(&config, &named(&["q_proj", "v_proj"])).unwrap_err();
    assert_eq!(
        message.to_string(),
        "lora_target_modules: no linear of the model is called q_proj (it has qkv_proj, o_proj, gate_up_proj, down_proj)"
    );
    let some = named(&["o_proj", "q_proj"]);
    assert_eq!(absent_targets(&config, &some), ["q_proj"]);
}

#[test]
fn the_embedding_and_the_output_layer_get_an_adapter_where_they_are_named() {
    let config = config("Qwen2ForCausalLM");
    let paths = |modules: &TargetModules| -> Vec<String> {
        let found = targets(&config, modules).unwrap().into_iter();
        found.map(|module| module.path).collect()
    };
    let both = ["model.embed_tokens", "lm_head"];
    assert_eq!(paths(&named(&["lm_head", "embed_tokens"])), both);
    let pattern = TargetModules::Matching(r"(.*\.)?(embed_tokens|lm_head)".to_owned());
    assert_eq!(paths(&pattern), both);
    assert!(!paths(&TargetModules::AllLinear).contains(&both[1].to_owned()));
    assert_eq!(pattern.name_tokens(), [true; 2]);
    assert_eq!(TargetModules::AllLinear.name_tokens(), [false; 2]);
    let modules = targets(&config, &named(&["embed_tokens"])).unwrap();
    assert!(modules[0].is_embedding());
    assert_eq!((modules[0].shape.width, modules[0].shape.out), (100, 64));
}

#[test]
fn what_goes_with_no_adapter_on_the_embedding_or_the_output_layer_is_refused_in_a_line() {
    let both = |names: &[&str]| LoraSpec {
        target_modules: named(names),
        ..lora(TrainedBiases::None)
    };
    let mut untied = config("Qwen2ForCausalLM");
    untied.tied = false;
    let tied = ModelConfig {
        tied: true,
        ..untied.clone()
    };
    let told = |config: &ModelConfig, lora: &LoraSpec| {
        adapted_modules(config, lora)
            .err()
            .map(|told| told.to_string())
    };
    let dora = LoraSpec {
        use_dora: true,
        ..both(&["embed_tokens"])
    };
    let refused = told(&untied, &dora).unwrap();
    assert!(
        refused.starts_with("use_dora: goes with no adapter on the embedding"),
        "{refused}"
    );
    let dora = LoraSpec {
        target_modules: named(&["lm_head"]),
        ..dora
    };
    assert_eq!(told(&untied, &dora), None);
    let biased = LoraSpec {
        lora_bias: true,
        ..both(&["lm_head"])
    };
    assert!(
        told(&untied, &biased)
            .unwrap()
            .contains("lm_head has no bias")
    );
    let rows = |names: &[&str]| LoraSpec {
        tokens: crate::job::TrainedTokens {
            embedding: crate::job::TrainedRows::These(vec![3]),
            ..Default::default()
        },
        ..both(names)
    };
    let refused = told(&untied, &rows(&["embed_tokens"])).unwrap();
    assert!(
        refused.contains("model.embed_tokens has rows that are trained"),
        "{refused}"
    );
    assert_eq!(told(&untied, &rows(&["lm_head"])), None);
    assert!(
        told(&tied, &rows(&["lm_head"]))
            .unwrap()
            .contains("lm_head has rows")
    );
    // In no layer, as in PEFT.
    let mut layered = both(&["lm_head"]);
    layered.shape.layers = Some(vec![0]);
    assert!(
        told(&untied, &layered)
            .unwrap()
            .contains("nothing would be trained")
    );
    assert_eq!(layered.adapts_tokens(), [false; 2]);
}

/// As PEFT 0.21 has it: it takes the names of experts for parameters where Transformers 5 made them of linears, but not in
/// Qwen2-MoE.
#[test]
fn routers_and_experts_get_no_adapter_and_are_named() {
    let qwen3 = config("Qwen3MoeForCausalLM");
    assert_eq!(linear_names(&qwen3), "q_proj, k_proj, v_proj, o_proj");
    let all = targets(&qwen3, &TargetModules::AllLinear).unwrap();
    assert_eq!(all.len(), 8, "a dense layer is no exception");
    let pattern = |pattern: &str| TargetModules::Matching(pattern.to_owned());
    for target in [
        named(&["q_proj", "gate_proj"]),
        named(&["q_proj", "mlp.gate"]),
        pattern(r".*_proj"),
        pattern(r".*layers\.1\.mlp\.experts\.\d+\.up_proj|.*q_proj"),
    ] {
        let refused = targets(&qwen3, &target);
        assert!(matches!(refused, Err(UnmatchedTarget::Experts { .. })));
    }
    assert_eq!(
        targets(&qwen3, &pattern(r".*self_attn\..*")).unwrap().len(),
        8
    );
    let mixtral = config("MixtralForCausalLM");
    assert!(targets(&mixtral, &named(&["q_proj", "w1"])).is_err());

    let qwen2 = config("Qwen2MoeForCausalLM");
    let paths = |target: &TargetModules| -> Vec<String> {
        let modules = targets(&qwen2, target).unwrap().into_iter();
        modules.map(|module| module.path).collect()
    };
    assert_eq!(
        paths(&named(&["gate_proj", "shared_expert_gate"])),
        [
            "model.layers.0.mlp.shared_expert.gate_proj",
            "model.layers.0.mlp.shared_expert_gate",
            "model.layers.1.mlp.gate_proj",
        ]
    );
    assert_eq!(paths(&TargetModules::AllLinear).len(), 8 + 7);
    assert!(targets(&qwen2, &named(&["q_proj", "gate"])).is_err());
}

/// PEFT 0.21 knows Qwen3-Next as a kin of Qwen3-MoE, and Qwen3.5-MoE not at all.
#[test]
fn shared_experts_have_an_adapter_where_peft_does_not_take_their_names_for_those_of_experts() {
    let next = config("Qwen3NextForCausalLM");
    let attention = "q_proj, k_proj, v_proj, o_proj";
    assert_eq!(
        linear_names(&next),
        format!("in_proj_qkvz, in_proj_ba, out_proj, shared_expert_gate, {attention}")
    );
    for target in [
        named(&["q_proj", "up_proj"]),
        TargetModules::Matching(r".*shared_expert\.up_proj".to_owned()),
    ] {
        let refused = targets(&next, &target);
        assert!(matches!(refused, Err(UnmatchedTarget::Experts { .. })));
    }
    let moe = config("Qwen3_5MoeForCausalLM");
    let linear = "in_proj_qkv, in_proj_z, in_proj_b, in_proj_a, out_proj";
    let shared = "gate_proj, up_proj, down_proj, shared_expert_gate";
    assert_eq!(
        linear_names(&moe),
        format!("{linear}, {shared}, {attention}")
    );
    assert!(targets(&moe, &named(&["q_proj", "experts"])).is_err());
}

fn lora(biases: TrainedBiases) -> LoraSpec {
    LoraSpec {
        r: 4,
        alpha: 8.0,
        dropout: 0.0,
        target_modules: TargetModules::AllLinear,
        use_rslora: false,
        use_dora: false,
        biases,
        lora_bias: false,
        init: Default::default(),
        shape: Default::default(),
        tokens: Default::default(),
        model_dir: None,
        model_source: None,
    }
}

#[test]
fn biases_of_routers_are_not_left_out_in_silence() {
    let gpt_oss = config("GptOssForCausalLM");
    let refused = adapted_modules(&gpt_oss, &lora(TrainedBiases::All)).unwrap_err();
    let told = refused.to_string();
    assert!(
        told.contains("mlp.router.bias") && told.ends_with("use bias: lora_only"),
        "{told}"
    );
    adapted_modules(&gpt_oss, &lora(TrainedBiases::LoraOnly)).unwrap();
    let others = config("Qwen2MoeForCausalLM");
    adapted_modules(&others, &lora(TrainedBiases::All)).unwrap();
}

/// As jobs for models that see name the linears of their decoder.
#[test]
fn patterns_may_name_the_decoder_as_a_part_of_a_larger_model() {
    let llama = config("LlamaForCausalLM");
    for pattern in [
        r"model.language_model.layers.[\d]+.(_checkpoint_wrapped_module.)?(mlp|self_attn).(up|q|k)_proj",
        r"language_model.model.layers.[\d]+.(mlp|self_attn).(up|q|k)_proj",
    ] {
        let pattern = TargetModules::Matching(pattern.to_owned());
        let found = targets(&llama, &pattern).unwrap();
        assert_eq!(found.len(), 3 * llama.layers);
        assert_eq!(pattern.name_tokens(), [false; 2]);
    }
    let all = TargetModules::Matching(r"model\.language_model\..*".to_owned());
    assert_eq!(all.name_tokens(), [true, false]);
}
