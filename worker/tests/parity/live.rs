//! Against Transformers and PEFT themselves, where a Python that has them is at hand: `MUSTER_PYTHON`, else `python3`.
//! Elsewhere these tests pass with a message.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use common::data::block::Block;
use common::files::adapter::AdapterConfig;
use common::files::model::ModelFolder;
use common::files::tensors::Dtype;
use common::files::{Frozen, WeightsFormat};
use common::job::{
    AdapterInit, InitWeights, LoraSpec, Method, TargetModules, TrainedBiases, Unfrozen,
};
use common::model::{ModelConfig, frozen_tensors};
use common::rng::CounterRng;
use serde_json::{Value, json};
use worker::ComputeDevice;
use worker::engine::{Trainer, TrainerOptions};

use crate::support::{job, train_step};
use crate::{dataset, golden};

const PROMPT: &str = "What does a muster count? Zwölf Boxkämpfer…";
const MAX_NEW_TOKENS: &str = "40";
const SEQUENCE_LEN: usize = 32;

struct Python(PathBuf);

impl Python {
    /// None, and a message, where there is no Python with everything that is needed.
    fn find() -> Option<Self> {
        let python = std::env::var_os("MUSTER_PYTHON").unwrap_or_else(|| "python3".into());
        let found = Command::new(&python)
            .args(["-c", "import torch, transformers, peft, safetensors"])
            .output();
        if found.is_ok_and(|output| output.status.success()) {
            return Some(Self(python.into()));
        }
        eprintln!(
            "skipped: {python:?} does not have torch, transformers and peft (MUSTER_PYTHON names another)"
        );
        None
    }

    fn run(&self, script: &str, arguments: &[&str]) -> Output {
        let script = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/parity")
            .join(script);
        let output = Command::new(&self.0)
            .arg(script)
            .args(arguments)
            .env("HF_HUB_OFFLINE", "1")
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {error}");
        output
    }
}

fn worker_generate(arguments: &[&str]) -> Vec<u8> {
    let output = Command::new(env!("CARGO_BIN_EXE_worker"))
        .arg("generate")
        .args(arguments)
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {error}");
    output.stdout
}

/// The shipped model's configuration, changed, and tokenizer with random weights that matter, saved by a trainer.
fn random_model(dir: &Path, dtype: Dtype, change: impl FnOnce(&mut Value)) {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tiny-qwen3");
    let shipped = ModelFolder::open(&shipped, InitWeights::Random).unwrap();
    shipped.copy_tokenizer_files(dir, None).unwrap();
    let mut config = shipped.config_json().clone();
    config["initializer_range"] = 0.15.into();
    change(&mut config);
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut job = job(Method::Full, 0.0, SEQUENCE_LEN);
    job.init_weights = InitWeights::Random;
    let trainer = Trainer::load(TrainerOptions {
        job: Arc::new(job),
        model_dir: dir.to_owned(),
        adapter_dir: None,
        threads: 2,
        device: ComputeDevice::Cpu,
    })
    .unwrap();
    let model = ModelConfig::parse(&config, &dir.join("config.json")).unwrap();
    let tensors = frozen_tensors(&model, &Unfrozen::default()).unwrap();
    let frozen = (!tensors.is_empty()).then_some(Frozen {
        files: None,
        tensors,
    });
    let format = WeightsFormat::Model {
        config,
        dtype,
        frozen,
    };
    trainer
        .snapshot()
        .unwrap()
        .write_weights(dir, &format)
        .unwrap();
}

/// An adapter on these linears of that model, trained so far that its answers differ.
fn trained_adapter(model_dir: &Path, dir: &Path, targets: [&str; 2], kind: fn(&mut LoraSpec)) {
    let targets = targets.map(str::to_owned);
    let mut lora = LoraSpec {
        r: 4,
        alpha: 8.0,
        dropout: 0.0,
        target_modules: TargetModules::Named(targets.to_vec()),
        use_rslora: true,
        use_dora: false,
        biases: Default::default(),
        lora_bias: false,
        init: Default::default(),
        shape: Default::default(),
        tokens: Default::default(),
        model_dir: None,
        model_source: None,
    };
    kind(&mut lora);
    let config = AdapterConfig::from_lora(&lora, model_dir.to_str().unwrap(), targets);
    let mut trainer = Trainer::load(TrainerOptions {
        job: Arc::new(job(Method::Lora(lora), 1e-2, SEQUENCE_LEN)),
        model_dir: model_dir.to_owned(),
        adapter_dir: None,
        threads: 2,
        device: ComputeDevice::Cpu,
    })
    .unwrap();
    for step in 0..5 {
        train_step(&mut trainer, step, &[&[random_block(step)]], 1e-2);
    }
    let format = WeightsFormat::Adapter(config);
    trainer
        .snapshot()
        .unwrap()
        .write_weights(dir, &format)
        .unwrap();
}

fn random_block(seed: u64) -> Block {
    let mut rng = CounterRng::new(seed, &[]);
    Block {
        tokens: (0..SEQUENCE_LEN).map(|_| rng.below(256) as u32).collect(),
        segments: vec![1; SEQUENCE_LEN],
        trained: (0..SEQUENCE_LEN).map(|index| index > 0).collect(),
    }
}

#[test]
fn freshly_made_golden_files_agree() {
    let Some(python) = Python::find() else { return };
    let folder = tempfile::tempdir().unwrap();
    python.run("make_golden.py", &[folder.path().to_str().unwrap()]);
    golden::check_logits(folder.path());
    golden::check_lora_training(folder.path());
    golden::check_full_training(folder.path());
    golden::check_greedy(folder.path());
    dataset::check_dataset(folder.path());
}

/// A configuration of this class.
fn of(class: &'static str, kind: &'static str) -> impl Fn(&mut Value) + Copy {
    move |config: &mut Value| {
        config["architectures"] = json!([class]);
        config["model_type"] = kind.into();
    }
}

/// [`of`] a mixture of four experts.
fn of_experts(class: &'static str, kind: &'static str) -> impl Fn(&mut Value) + Copy {
    move |config: &mut Value| {
        of(class, kind)(config);
        for (key, value) in [
            ("num_experts", 4),
            ("num_experts_per_tok", 2),
            ("moe_intermediate_size", 24),
            ("shared_expert_intermediate_size", 40),
        ] {
            config[key] = value.into();
        }
    }
}

fn gpt_oss(config: &mut Value) {
    of("GptOssForCausalLM", "gpt_oss")(config);
    config["attention_bias"] = true.into();
    config["num_local_experts"] = 4.into();
    config["num_experts_per_tok"] = 2.into();
    config["intermediate_size"] = 24.into();
    config["swiglu_limit"] = 0.8.into();
    config["sliding_window"] = 7.into();
    config["rope_scaling"] = json!({
        "rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0, "truncate": false,
        "original_max_position_embeddings": 64
    });
}

/// Sizes of linear attention, in every other layer.
fn linear(config: &mut Value) {
    config["layer_types"] = Value::Null;
    config["full_attention_interval"] = 2.into();
    for (key, value) in [
        ("linear_num_key_heads", 2),
        ("linear_num_value_heads", 4),
        ("linear_key_head_dim", 8),
        ("linear_value_head_dim", 12),
    ] {
        config[key] = value.into();
    }
}

#[test]
fn peft_loads_every_kind_of_adapter_and_generates_the_same_text() {
    let Some(python) = Python::find() else { return };
    check_adapter(&python, ["q_proj", "down_proj"], |_| {});
    for kind in [
        |lora: &mut LoraSpec| lora.use_dora = true,
        |lora: &mut LoraSpec| lora.init = AdapterInit::Gaussian,
        |lora: &mut LoraSpec| lora.init = AdapterInit::Orthogonal,
    ] {
        check_kind(&python, ["q_proj", "down_proj"], kind, |_| {});
    }
    for tied in [true, false] {
        let head = |config: &mut Value| config["tie_word_embeddings"] = tied.into();
        check_adapter(&python, ["embed_tokens", "lm_head"], head);
        check_adapter(&python, ["embed_tokens", "q_proj"], head);
        let dora = |lora: &mut LoraSpec| lora.use_dora = true;
        check_kind(&python, ["lm_head", "q_proj"], dora, head);
    }
    for kind in [
        |lora: &mut LoraSpec| lora.biases = TrainedBiases::LoraOnly,
        |lora: &mut LoraSpec| lora.biases = TrainedBiases::All,
        |lora: &mut LoraSpec| lora.lora_bias = true,
    ] {
        check_kind(
            &python,
            ["q_proj", "v_proj"],
            kind,
            of("Qwen2ForCausalLM", "qwen2"),
        );
    }
}

#[test]
fn peft_loads_the_adapters_of_families_and_generates_the_same_text() {
    let Some(python) = Python::find() else { return };
    let glm = of("Glm4ForCausalLM", "glm4");
    check_adapter(&python, ["q_proj", "gate_up_proj"], glm);
    check_adapter(&python, ["qkv_proj", "gate_up_proj"], |config| {
        of("Phi3ForCausalLM", "phi3")(config);
        config["partial_rotary_factor"] = 0.75.into();
        // The answer makes the text longer than this.
        config["original_max_position_embeddings"] = 48.into();
        config["rope_scaling"] = json!({
            "type": "longrope", "short_factor": vec![1.25; 12], "long_factor": vec![4.0; 12]
        });
    });
    check_adapter(&python, ["in_proj_qkv", "out_proj"], |config| {
        of("Qwen3_5ForCausalLM", "qwen3_5_text")(config);
        linear(config);
    });
}

#[test]
fn peft_loads_the_adapters_of_gemma_4_and_generates_the_same_text() {
    let Some(python) = Python::find() else { return };
    // In the last of two layers that see everything values are keys: nothing has the name of their linear there.
    check_adapter(&python, ["v_proj", "down_proj"], |config| {
        gemma4(config);
        config["attention_k_eq_v"] = true.into();
        config["num_global_key_value_heads"] = 1.into();
    });
    let targets = ["k_proj", "per_layer_input_gate"];
    check_adapter(&python, targets, shared_gemma4);
    let targets = ["per_layer_projection", "per_layer_model_projection"];
    let dora = |lora: &mut LoraSpec| lora.use_dora = true;
    check_kind(&python, targets, dora, shared_gemma4);
}

fn gemma4(config: &mut Value) {
    of("Gemma4ForCausalLM", "gemma4_text")(config);
    let kinds = ["sliding_attention", "full_attention"];
    config["num_hidden_layers"] = 4.into();
    config["layer_types"] = json!([kinds, kinds].concat());
    config["hidden_activation"] = "gelu_pytorch_tanh".into();
    // Else a token would mostly be followed by itself, because embeddings are multiplied.
    config["tie_word_embeddings"] = false.into();
    for (key, size) in [
        ("sliding_window", 7),
        ("global_head_dim", 48),
        ("hidden_size_per_layer_input", 0),
    ] {
        config[key] = size.into();
    }
    // Transformers takes what an older spelling says, or null there, for the whole.
    for key in ["rope_theta", "rope_scaling", "rope_parameters"] {
        config.as_object_mut().unwrap().remove(key);
    }
}

/// With keys and values of others in the last two layers, and inputs of the layers' own.
fn shared_gemma4(config: &mut Value) {
    gemma4(config);
    config["use_double_wide_mlp"] = true.into();
    config["hidden_size_per_layer_input"] = 8.into();
    config["vocab_size_per_layer_input"] = 512.into();
    config["num_kv_shared_layers"] = 2.into();
}

#[test]
fn peft_loads_the_adapters_of_mixtures_and_generates_the_same_text() {
    let Some(python) = Python::find() else { return };
    let qwen2 = of_experts("Qwen2MoeForCausalLM", "qwen2_moe");
    check_adapter(&python, ["shared_expert_gate", "down_proj"], qwen2);
    let qwen3 = of_experts("Qwen3MoeForCausalLM", "qwen3_moe");
    check_adapter(&python, ["q_proj", "o_proj"], qwen3);
    check_adapter(&python, ["q_proj", "o_proj"], gpt_oss);
    let experts = |lora: &mut LoraSpec| {
        let names = ["experts.down_proj", "experts.gate_up_proj"];
        lora.shape.parameters = names.map(str::to_owned).to_vec();
    };
    let qwen3 = of_experts("Qwen3MoeForCausalLM", "qwen3_moe");
    check_kind(&python, ["q_proj", "o_proj"], experts, qwen3);
    let mixtral = of_experts("MixtralForCausalLM", "mixtral");
    check_kind(&python, ["q_proj", "o_proj"], experts, |config| {
        mixtral(config);
        config["num_local_experts"] = 4.into();
    });
    check_kind(&python, ["q_proj", "o_proj"], experts, gpt_oss);
    check_adapter(&python, ["in_proj_z", "down_proj"], |config| {
        of_experts("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text")(config);
        linear(config);
    });
    check_adapter(&python, ["in_proj_qkvz", "in_proj_ba"], |config| {
        of_experts("Qwen3NextForCausalLM", "qwen3_next")(config);
        linear(config);
    });
}

/// Trains an adapter on these linears of a random model, and compares its answer with PEFT's.
fn check_adapter(python: &Python, targets: [&str; 2], change: impl FnOnce(&mut Value)) {
    check_kind(python, targets, |_| {}, change);
}

/// [`check_adapter`] for an adapter of another kind.
fn check_kind(
    python: &Python,
    targets: [&str; 2],
    kind: fn(&mut LoraSpec),
    change: impl FnOnce(&mut Value),
) {
    let (model, adapter) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    random_model(model.path(), Dtype::F32, change);
    trained_adapter(model.path(), adapter.path(), targets, kind);
    let model = model.path().to_str().unwrap();
    let adapter = adapter.path().to_str().unwrap();
    let expected = python.run(
        "peft_roundtrip.py",
        &[model, PROMPT, MAX_NEW_TOKENS, adapter],
    );
    let common = [
        "--model",
        model,
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        MAX_NEW_TOKENS,
    ];
    let found = worker_generate(&[&common[..], &["--adapter", adapter]].concat());
    assert_eq!(found, expected.stdout);
    assert_ne!(
        worker_generate(&common),
        found,
        "the adapter changes nothing"
    );
}

#[test]
fn transformers_loads_the_model_and_generates_the_same_text() {
    let Some(python) = Python::find() else { return };
    for dtype in [Dtype::F32, Dtype::BF16] {
        let model = tempfile::tempdir().unwrap();
        random_model(model.path(), dtype, |_| {});
        let model = model.path().to_str().unwrap();
        let expected = python.run("peft_roundtrip.py", &[model, PROMPT, MAX_NEW_TOKENS]);
        let found = worker_generate(&[
            "--model",
            model,
            "--prompt",
            PROMPT,
            "--max-new-tokens",
            MAX_NEW_TOKENS,
        ]);
        assert_eq!(found, expected.stdout, "{dtype:?}");
    }
}
