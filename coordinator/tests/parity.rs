//! The whole program against Transformers and PEFT: a job on dataset files, from `coordinator start` to the adapter in
//! the output folder. The golden files are made by `worker/tests/parity/make_golden.py`.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::files::tensors::TensorFile;
use serde_json::{Value, json};

const TOLERANCE: f64 = 1e-3;

struct Setup {
    folder: tempfile::TempDir,
    golden: Value,
}

impl Setup {
    fn new() -> Self {
        let text = std::fs::read_to_string(golden_dir().join("golden.json")).unwrap();
        let setup = Self {
            folder: tempfile::tempdir().unwrap(),
            golden: serde_json::from_str(&text).unwrap(),
        };
        let data = ["conversations", "completions", "texts"]
            .map(|name| json!({"path": golden_dir().join(name).with_extension("jsonl")}));
        // JSON is YAML.
        let job = json!({
            "base_model": golden_dir().join("model"),
            "datasets": data,
            "sequence_len": 96, "sample_packing": false, "shuffle": false,
            "adapter": "lora", "lora_model_dir": golden_dir().join("adapter"),
            "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj", "up_proj"],
            "global_batch_size": setup.golden["batch"], "micro_batch_size": 2, "num_epochs": 1,
            "learning_rate": setup.golden["learning_rate"], "lr_scheduler": "constant",
            "weight_decay": 0.01, "max_grad_norm": 1.0,
            "output_dir": setup.output(),
        });
        std::fs::write(setup.job(), job.to_string()).unwrap();
        setup
    }

    fn job(&self) -> PathBuf {
        self.folder.path().join("job.yaml")
    }

    fn output(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    fn coordinator(&self, command: &str, more: &[&str]) -> Output {
        let output = Command::new(env!("CARGO_BIN_EXE_coordinator"))
            .arg(command)
            .arg(self.job())
            .args(more)
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{error}");
        output
    }
}

fn golden_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../worker/tests/parity/golden/dataset")
}

fn scalars(file: &TensorFile, name: &str) -> Vec<f32> {
    let view = file.get(name).unwrap();
    let mut scalars = vec![0.0; view.scalars()];
    view.to_f32(&mut scalars).unwrap();
    scalars
}

#[test]
fn a_job_trains_the_adapter_that_peft_trains() {
    let setup = Setup::new();
    setup.coordinator("start", &["--single-node"]);
    let metrics = std::fs::read_to_string(setup.output().join("metrics.jsonl")).unwrap();
    let steps: Vec<Value> = metrics
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let expected = setup.golden["steps"].as_array().unwrap();
    assert_eq!(steps.len(), expected.len());
    for (step, expected) in steps.iter().zip(expected) {
        for field in ["loss", "grad_norm"] {
            let (found, expected) = (step[field].as_f64().unwrap(), expected[field].as_f64());
            let expected = expected.unwrap();
            let off = (found - expected).abs() / expected;
            assert!(off < TOLERANCE, "{field} is {found} for {expected}: {step}");
        }
    }
    let found = TensorFile::open(&setup.output().join("adapter_model.safetensors")).unwrap();
    let trained = golden_dir().join("trained_adapter/adapter_model.safetensors");
    let expected = TensorFile::open(&trained).unwrap();
    assert!(found.names().eq(expected.names()));
    for name in found.names() {
        let pairs = scalars(&found, name)
            .into_iter()
            .zip(scalars(&expected, name));
        for (found, expected) in pairs {
            let off = f64::from((found - expected).abs());
            assert!(off < TOLERANCE, "{name}: {found} for {expected}");
        }
    }
}

#[test]
fn the_adapter_s_configuration_is_peft_s() {
    let setup = Setup::new();
    setup.coordinator("start", &["--single-node", "--set", "max_steps=1"]);
    let read = |dir: &Path| -> Value {
        let text = std::fs::read_to_string(dir.join("adapter_config.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let mut expected = read(&golden_dir().join("adapter"));
    expected["base_model_name_or_path"] = json!(golden_dir().join("model"));
    assert_eq!(read(&setup.output()), expected);
}

#[test]
fn samples_are_tokenised_and_masked_as_with_transformers() {
    let setup = Setup::new();
    let output = setup.coordinator("check", &["--json", "--show", "40"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let expected = setup.golden["examples"].as_array().unwrap();
    let samples = report["samples"].as_array().unwrap();
    assert_eq!(samples.len(), expected.len());
    for (sample, expected) in samples.iter().zip(expected) {
        assert_eq!(
            sample["input_ids"], expected["tokens"],
            "{}",
            sample["text"]
        );
        let mut labels = expected["labels"].clone();
        // Nothing comes before the first token from which it could be predicted.
        labels[0] = json!(-100);
        assert_eq!(sample["labels"], labels, "{}", sample["text"]);
    }
}
