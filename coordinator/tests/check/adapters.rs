//! What `coordinator check` says of adapters and of weights that are trained in part.

use common::files::model::{MAX_SHARD_BYTES, ModelTensor, Scalars, write_model};
use common::files::tensors::Dtype;
use common::model::{ModelConfig, base_tensors};
use serde_json::{Value as Json, json};

use super::{Setup, adapted};

#[test]
fn kinds_of_adapters_are_told_and_what_the_model_has_no_place_for_is_too() {
    for (name, value, words) in [
        ("use_dora", json!(true), "DoRA, rank 16"),
        (
            "init_lora_weights",
            json!("olora"),
            "OLoRA start (saved with rank 32)",
        ),
        (
            "bias",
            json!("all"),
            "bias: changes nothing, because no linear of this model has one",
        ),
    ] {
        let told = adapted(name, value).run(&[]);
        let text = String::from_utf8(told.stdout).unwrap();
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(told.status.success() && text.contains(words), "{text}");
    }
    for (name, value, words) in [
        ("lora_bias", json!(true), "q_proj has no bias in this model"),
        ("init_lora_weights", json!("pissa"), "which has"),
    ] {
        let problems = adapted(name, value).set("lora_r", json!(200)).problems();
        assert!(problems[0].contains(words), "{problems:?}");
    }
}

/// An adapter on a small mixture of experts.
fn on_mixture(parameters: Json) -> Setup {
    on_mixture_of(["Qwen3MoeForCausalLM", "qwen3_moe"], parameters)
}

fn on_mixture_of([class, model_type]: [&str; 2], parameters: Json) -> Setup {
    let setup = Setup::new();
    let path = setup.model("config.json");
    let mut config: Json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (key, value) in [
        ("architectures", json!([class])),
        ("model_type", json!(model_type)),
        ("num_experts", json!(4)),
        ("num_experts_per_tok", json!(2)),
        ("moe_intermediate_size", json!(24)),
    ] {
        config[key] = value;
    }
    let sizes = ModelConfig::parse(&config, &path).unwrap();
    let tensors: Vec<_> = base_tensors(&sizes)
        .into_iter()
        .map(|(name, shape)| {
            let zeros = vec![0.0; shape.iter().product()];
            (name, shape, zeros)
        })
        .collect();
    let tensors: Vec<ModelTensor> = tensors
        .iter()
        .map(|(name, shape, zeros)| ModelTensor {
            name,
            shape,
            scalars: Scalars::Here(zeros),
        })
        .collect();
    let folder = path.parent().unwrap();
    write_model(folder, &config, &tensors, Dtype::F32, MAX_SHARD_BYTES).unwrap();
    setup
        .set("init_weights", json!("pretrained"))
        .set("adapter", json!("lora"))
        .set("lora_target_parameters", parameters)
}

#[test]
fn adapters_on_experts_are_told_and_what_is_none_of_their_parameters_is_refused() {
    let both = || on_mixture(json!(["experts.gate_up_proj", "experts.down_proj"]));
    let told = |setup: Setup| {
        let told = setup.run(&[]);
        let text = String::from_utf8(told.stdout).unwrap();
        let errors = String::from_utf8(told.stderr).unwrap();
        assert!(told.status.success(), "{errors}");
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let text = told(both()).replace(',', "");
    let config = std::fs::read(both().model("config.json")).unwrap();
    let config: Json = serde_json::from_slice(&config).unwrap();
    let size = |key: &str| config[key].as_u64().unwrap();
    let sides = 2 * size("hidden_size") + 3 * size("moe_intermediate_size");
    let scalars = size("num_hidden_layers") * size("num_experts") * 16 * sides;
    let words = format!("LoRA rank 16 alpha 32: {scalars} trainable parameters");
    assert!(text.contains(&words), "{words}: {text}");
    let words = "lora_target_parameters: done on processors; a worker on a GPU refuses the job";
    assert!(text.contains(words), "{text}");
    let beside = on_mixture(json!(["down_proj", "feed_forward.experts.down_proj"]));
    let beside = beside
        .set("lora_target_linear", json!(true))
        .set("layers_to_transform", json!([0]));
    let text = told(beside);
    for words in [
        "no parameter of this model's experts is called feed_forward.experts.down_proj",
        "layers_to_transform: leaves out none of the parameters of experts, as in PEFT",
        "get the adapters alone that lora_target_parameters names",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    let none = adapted("lora_target_parameters", json!(["experts.down_proj"]));
    let text = told(none.set("lora_target_modules", json!(["q_proj"])));
    let words = "the model has no experts, so that experts.down_proj changes nothing";
    assert!(text.contains(words), "{text}");
    for (setup, words) in [
        (
            on_mixture(json!(["q_proj.weight", "down_proj"])),
            "q_proj.weight is no parameter",
        ),
        (on_mixture(json!(["w1"])), "name experts.gate_up_proj"),
        (
            adapted("lora_target_parameters", json!(["experts.down_proj"])),
            "the model has no experts",
        ),
        (
            both().set("lora_target_modules", json!(["q_proj", "gate_proj"])),
            "and experts in lora_target_parameters",
        ),
    ] {
        let problems = setup.problems().join("\n");
        assert!(problems.contains(words), "{words}: {problems}");
    }
}

/// The names that its files have, which are not those that adapters on them are named by.
#[test]
fn patterns_of_weights_beside_adapters_on_experts_may_be_of_the_files_names() {
    let of = |patterns: Json| {
        let names = ["MixtralForCausalLM", "mixtral"];
        on_mixture_of(names, json!(["experts.down_proj"])).set("unfrozen_parameters", patterns)
    };
    let told = of(json!(["block_sparse_moe.experts"])).run(&[]);
    let text = String::from_utf8(told.stdout).unwrap();
    let words = "changes nothing, because an adapter is trained";
    assert!(text.contains(words), "{text}");
    let problems = of(json!(["self_attn"])).problems().join("\n");
    let words = "leaves out model.layers.0.mlp.experts.down_proj";
    assert!(problems.contains(words), "{problems}");
}

#[test]
fn full_training_of_some_weights_is_told_and_patterns_that_leave_nothing_are_refused() {
    let full =
        |patterns: Json| adapted("adapter", json!("full")).set("unfrozen_parameters", patterns);
    let told = full(json!(["layers.1.mlp", "^visual"])).run(&[]);
    let text = String::from_utf8(told.stdout).unwrap();
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(told.status.success(), "{text}");
    for words in [
        "the weights that unfrozen_parameters names: 147,456 trainable parameters",
        "no weight of the model has a name in which these fit: ^visual",
        "unfrozen weights with 8-bit moments",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    for (setup, words) in [
        (full(json!(["layers.77."])), "nothing would be trained"),
        (
            full(json!(["mlp"])).set("init_weights", json!("random")),
            "would leave weights as they are drawn",
        ),
        (
            full(json!(["norm"])).set("optimizer", json!("muon")),
            "names vectors alone",
        ),
        (
            full(json!(["mlp"])).set("tokens", json!(["<new>"])),
            "unfrozen_parameters leaves out model.embed_tokens.weight",
        ),
        (
            adapted("unfrozen_parameters", json!(["layers.1"])),
            "leaves out model.layers.0.self_attn.q_proj.weight",
        ),
    ] {
        let problems = setup.problems();
        let found = problems.iter().filter(|problem| problem.contains(words));
        assert_eq!(found.count(), 1, "{words}: {problems:?}");
    }
    let rate = full(json!(["layers.1"])).set("embedding_lr", json!(1e-5));
    let text = String::from_utf8(rate.run(&[]).stdout).unwrap();
    assert!(text.contains("embedding_lr: changes nothing"), "{text}");
    let alone = adapted("lora_target_modules", json!(["embed_tokens"]));
    let text = alone.set("lora_dropout", json!(0.1)).run(&[]);
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains("lora_dropout: of no effect"), "{text}");
    // What Axolotl's examples say of the part of a model that reads.
    let told = adapted(
        "unfrozen_parameters",
        json!(["^model.language_model.*", "^lm_head.*"]),
    );
    let text = String::from_utf8(told.run(&[]).stdout).unwrap();
    assert!(
        text.contains("changes nothing, because an adapter is trained"),
        "{text}"
    );
}

#[test]
fn second_halves_of_adapters_are_no_trainable_parameters_but_need_memory() {
    let of = |start: Json| {
        let told = adapted("init_lora_weights", start).run(&[]);
        let text = String::from_utf8(told.stdout).unwrap();
        let row = |name: &str| {
            let mut lines = text.lines();
            let line = lines.find(|line| line.starts_with(&format!("{name} ")));
            line.unwrap_or_else(|| panic!("{name} in {text}"))
                .to_owned()
        };
        let (_, trained) = row("method")
            .split_once(": ")
            .map(|(_, n)| ((), n.to_owned()))
            .unwrap();
        (trained, row("memory"), row("methods"))
    };
    let (usual, doubled) = (of(json!(true)), of(json!("olora")));
    assert!(usual.0.contains("trainable parameters"), "{}", usual.0);
    assert_eq!(doubled.0, usual.0);
    assert_ne!(doubled.1, usual.1);
    assert!(usual.2.contains("LoRA on 32 bits"), "{}", usual.2);
    assert!(
        doubled.2.contains("LoRA with OLoRA on 32 bits"),
        "{}",
        doubled.2
    );
}

#[test]
fn targets_that_other_models_have_are_passed_over_by_name_beside_those_of_this_one() {
    let told = adapted("lora_target_modules", json!(["q_proj", "in_proj"])).run(&[]);
    let text = String::from_utf8(told.stdout).unwrap();
    assert!(told.status.success(), "{text}");
    assert!(
        text.contains("no linear of this model is called in_proj (it has q_proj,"),
        "{text}"
    );
    let none = adapted("lora_target_modules", json!(["in_proj", "c_attn"]));
    let problems = none.problems().join("\n");
    assert!(problems.contains("is called c_attn"), "{problems}");
}

/// The shipped model's output layer is its embedding.
#[test]
fn adapters_on_embedding_and_output_layer_are_told_and_refused_where_they_go_with_something_else_not()
 {
    let on = |names: &[&str]| adapted("lora_target_modules", json!(names));
    for (names, words) in [
        (
            &["embed_tokens", "q_proj"][..],
            "the output layer, which is the embedding here, stays as it is",
        ),
        (
            &["lm_head"],
            "the embedding, which is the output layer here, stays as it is",
        ),
        (
            &["embed_tokens", "lm_head"],
            "get an adapter each, as in PEFT; a merged model has two matrices",
        ),
    ] {
        let told = on(names).run(&[]);
        let text = String::from_utf8(told.stdout).unwrap();
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(told.status.success() && text.contains(words), "{text}");
        assert!(text.contains("a worker on a GPU refuses the job"), "{text}");
    }
    let layered = on(&["lm_head", "q_proj"]).set("layers_to_transform", json!([0]));
    let text = String::from_utf8(layered.run(&[]).stdout).unwrap();
    assert!(
        text.contains("are in no layer and get no adapter"),
        "{text}"
    );
    for (name, value, words) in [
        (
            "use_dora",
            json!(true),
            "use_dora: goes with no adapter on the embedding",
        ),
        (
            "init_lora_weights",
            json!("pissa"),
            "init_lora_weights: goes with no adapter on the embedding",
        ),
        ("lora_bias", json!(true), "has no bias in this model"),
        (
            "lora_modules_to_save",
            json!(["embed_tokens"]),
            "an adapter would change them once more",
        ),
        (
            "trainable_token_indices",
            json!([3]),
            "an adapter would change them once more",
        ),
        (
            "tokens",
            json!(["<new>"]),
            "an adapter would change them once more",
        ),
    ] {
        let problems = on(&["embed_tokens"]).set(name, value).problems();
        assert!(
            problems.len() == 1 && problems[0].contains(words),
            "{problems:?}"
        );
    }
}
