//! `worker generate` as a user meets it: the same answer for the same seed, and one clear line for what is wrong with
//! a model or an adapter.
#![allow(clippy::unwrap_used)]

#[allow(dead_code)]
#[path = "parity/support.rs"]
mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use common::files::adapter::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterConfig};
use common::files::model::ModelFolder;
use common::files::tensors::{Dtype, write};
use common::files::{Snapshot, WeightsFormat};
use common::job::{InitWeights, Method, TargetModules};
use worker::ComputeDevice;
use worker::engine::{Trainer, TrainerOptions};

/// The shipped model's configuration and tokenizer, with random weights.
fn model() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tiny-qwen3");
    let shipped = ModelFolder::open(&shipped, InitWeights::Random).unwrap();
    shipped.copy_tokenizer_files(dir, None).unwrap();
    let mut config = shipped.config_json().clone();
    config["num_hidden_layers"] = 1.into();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut job = support::job(Method::Full, 0.0, 16);
    job.init_weights = InitWeights::Random;
    let options = TrainerOptions {
        job: Arc::new(job),
        model_dir: dir.to_owned(),
        adapter_dir: None,
        threads: 1,
        device: ComputeDevice::Cpu,
    };
    let snapshot: Snapshot = Trainer::load(options).unwrap().snapshot().unwrap();
    let dtype = Dtype::F32;
    snapshot
        .write_weights(
            dir,
            &WeightsFormat::Model {
                config,
                dtype,
                frozen: None,
            },
        )
        .unwrap();
    folder
}

/// An adapter of rank 1 for one module.
fn adapter(module: &str, columns: usize) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let config = AdapterConfig::new(1, 2.0, TargetModules::Named(vec!["q_proj".into()]));
    config.write(folder.path()).unwrap();
    let zeros = vec![0u8; 4 * columns];
    let name = |factor| format!("base_model.model.{module}.lora_{factor}.weight");
    let tensors = [
        (name('A'), Dtype::F32, vec![1, columns], zeros.as_slice()),
        (name('B'), Dtype::F32, vec![columns, 1], zeros.as_slice()),
    ];
    write(folder.path(), ADAPTER_WEIGHTS, tensors, &[]).unwrap();
    folder
}

fn generate(model: &Path, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_worker"))
        .args(["generate", "--max-new-tokens", "12", "--prompt", "Count."])
        .arg("--model")
        .arg(model)
        .args(more)
        .output()
        .unwrap()
}

fn assert_fails(output: Output, parts: &[&str]) {
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert_eq!(message.lines().count(), 1, "{message}");
    for part in parts {
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
}

#[test]
fn the_seed_decides_the_answer() {
    let model = model();
    let answer = |more: &[&str]| {
        let output = generate(model.path(), more);
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{message}");
        output.stdout
    };
    let warm = ["--temperature", "1"];
    let seeded = |seed| answer(&[&warm[..], &["--seed", seed]].concat());
    assert_eq!(seeded("7"), seeded("7"));
    assert_ne!(seeded("7"), seeded("8"));
    assert_eq!(answer(&["--seed", "7"]), answer(&["--seed", "8"]));
}

#[test]
fn a_damaged_model_is_one_clear_line() {
    let folder = model();
    let dir = folder.path();
    assert_fails(
        generate(&dir.join("absent"), &[]),
        &["absent: there is no such folder"],
    );

    let weights = dir.join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() - 100]).unwrap();
    let length = bytes.len().to_string();
    let parts = ["model.safetensors", "truncated", &length, "model."];
    assert_fails(generate(dir, &[]), &parts);
    fs::write(&weights, &bytes).unwrap();

    let config_path = dir.join("config.json");
    let config = fs::read_to_string(&config_path).unwrap();
    let with = |from: &str, to: &str| {
        assert!(config.contains(from), "{from}");
        fs::write(&config_path, config.replace(from, to)).unwrap();
        generate(dir, &[])
    };
    let parts = ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"];
    assert_fails(with("Qwen3ForCausalLM", "GPT2LMHeadModel"), &parts);
    let more_layers = with("\"num_hidden_layers\": 1", "\"num_hidden_layers\": 2");
    assert_fails(more_layers, &["model.layers.1."]);
    assert_fails(with("{", "["), &["config.json"]);
    fs::write(&config_path, &config).unwrap();

    fs::remove_file(dir.join("tokenizer.json")).unwrap();
    assert_fails(generate(dir, &[]), &["tokenizer.json"]);
}

#[test]
fn an_adapter_that_does_not_fit_is_one_clear_line() {
    let model = model();
    let with = |adapter: &tempfile::TempDir| {
        let path = adapter.path().to_str().unwrap().to_owned();
        generate(model.path(), &["--adapter", &path])
    };
    let hidden = 128;
    let module = "model.layers.0.self_attn.q_proj";
    assert_fails(with(&adapter(module, 7)), &[module, "lora_A", "[1, 7]"]);
    let far = "model.layers.9.self_attn.q_proj";
    assert_fails(with(&adapter(far, hidden)), &[far]);
    assert_fails(with(&tempfile::tempdir().unwrap()), &[ADAPTER_CONFIG]);
    let absent = generate(model.path(), &["--adapter", "/nosuch"]);
    assert_fails(absent, &["/nosuch: there is no such folder"]);

    let dora = adapter(module, hidden);
    let path = dora.path().join(ADAPTER_CONFIG);
    let text = fs::read_to_string(&path).unwrap();
    let text = text.replace("\"use_dora\": false", "\"use_dora\": true");
    fs::write(&path, text).unwrap();
    assert_fails(
        with(&dora),
        &["use_dora", ADAPTER_CONFIG, "lora_magnitude_vector"],
    );

    let broken = adapter(module, hidden);
    let path = broken.path().join(ADAPTER_WEIGHTS);
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    assert_fails(with(&broken), &["lora_B", "not finite"]);
}
