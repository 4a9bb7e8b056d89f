//! `coordinator check`: what it says of a good job, and that it finds what would fail.
#![allow(clippy::unwrap_used)]

mod adapters;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value as Json, json};

struct Setup {
    folder: tempfile::TempDir,
    job: Json,
}

const CHAT: &str = r#"{"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A pirate."}]}"#;

impl Setup {
    /// A job on a copy of the shipped model's configuration and tokenizer, with random weights.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tiny-qwen3");
        let model = folder.path().join("model");
        std::fs::create_dir(&model).unwrap();
        for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(shipped.join(name), model.join(name)).unwrap();
        }
        let data = folder.path().join("data.jsonl");
        std::fs::write(&data, format!("{CHAT}\n{}\n", r#"{"text": "Ahoy"}"#)).unwrap();
        let job = json!({
            "base_model": model, "init_weights": "random", "datasets": [{"path": data}], "sequence_len": 64,
            "global_batch_size": 4, "micro_batch_size": 2, "num_epochs": 3,
            "output_dir": folder.path().join("out"),
        });
        Self { folder, job }
    }

    fn model(&self, name: &str) -> PathBuf {
        self.folder.path().join("model").join(name)
    }

    fn set(mut self, name: &str, value: Json) -> Self {
        self.job[name] = value;
        self
    }

    fn run(&self, options: &[&str]) -> Output {
        let path = self.folder.path().join("job.yaml");
        std::fs::write(&path, self.job.to_string()).unwrap();
        Command::new(env!("CARGO_BIN_EXE_coordinator"))
            .arg("check")
            .arg(&path)
            .args(options)
            .output()
            .unwrap()
    }

    /// The problems, with the test's folder taken out of the paths.
    fn problems(&self) -> Vec<String> {
        let output = self.run(&[]);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(3), "{text}");
        let dir = format!("{}/", self.folder.path().display());
        let text = text.replace(&dir, "");
        let problems = text.lines();
        let problems = problems.map(|line| line.strip_prefix("error: ").unwrap().to_owned());
        problems.collect()
    }
}

#[test]
fn the_type_of_the_weights_may_be_left_to_the_model() {
    let of = |config: Json, more: &[(&str, Json)]| {
        let setup = Setup::new().set("torch_dtype", json!("auto"));
        let setup = more
            .iter()
            .fold(setup, |setup, (name, value)| setup.set(name, value.clone()));
        let path = setup.model("config.json");
        let text = std::fs::read(&path).unwrap();
        let mut all: Json = serde_json::from_slice(&text).unwrap();
        let all = all.as_object_mut().unwrap();
        all.retain(|name, _| !["dtype", "torch_dtype"].contains(&name.as_str()));
        all.extend(config.as_object().unwrap().clone());
        std::fs::write(&path, json!(all).to_string()).unwrap();
        let output = setup.run(&["--json", "--show", "0"]);
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{text}");
        let document: Json = serde_json::from_slice(&output.stdout).unwrap();
        let notices = document["notices"].as_array().unwrap();
        let told = notices.iter().filter_map(Json::as_str);
        let told = told.filter(|line| line.starts_with("base_dtype: auto"));
        let told: Vec<&str> = told.collect();
        let dtype = document["job"]["base_dtype"].as_str().unwrap();
        format!("{dtype}: {}", told.join("; "))
    };
    let held = "base_dtype: auto: the base weights are held in";
    for (config, expected) in [
        (
            json!({"torch_dtype": "bfloat16"}),
            format!("bfloat16: {held} bfloat16, as config.json of the model says"),
        ),
        (
            json!({"dtype": "float16"}),
            format!(
                "float32: {held} float32, because float16, which config.json of the model says, is no type of base weights here"
            ),
        ),
        (
            json!({}),
            format!("float32: {held} float32, because config.json of the model names none"),
        ),
    ] {
        assert_eq!(of(config, &[]), expected);
    }
    // The switch says it, whatever the model is.
    let switched = of(json!({"dtype": "float32"}), &[("bf16", json!(true))]);
    assert_eq!(switched, "bfloat16: ");
}

#[test]
fn groups_of_weights_that_name_no_matrix_are_told() {
    let group = |part: &str| json!([{"name": "a", "modules": ["o_proj", part], "lr": 1e-5}]);
    let notes = |part: &str| {
        let output = Setup::new().set("lr_groups", group(part)).run(&[]);
        String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap()
    };
    let told = "lr_groups: no matrix that is trained has a name with \"o_prok\"";
    assert!(notes("o_prok").contains(told), "{}", notes("o_prok"));
    assert!(!notes("layers.0").contains("no matrix that is trained"));
}

#[test]
fn json_is_one_document_of_the_promised_shape() {
    let setup = Setup::new();
    let output = setup.run(&["--json", "--show", "2"]);
    assert!(output.status.success());
    let document: Json = serde_json::from_slice(&output.stdout).unwrap();
    let keys =
        |value: &Json| -> Vec<String> { value.as_object().unwrap().keys().cloned().collect() };
    assert_eq!(
        keys(&document),
        ["job", "dataset", "plan", "memory", "notices", "samples"]
    );
    assert_eq!(
        keys(&document["dataset"]),
        ["rows", "examples", "blocks", "tokens", "trained_tokens"]
    );
    assert_eq!(document["plan"], json!({"steps": 3, "slots_per_step": 1}));
    assert_eq!(document["dataset"]["rows"], 2);
    assert_eq!(document["dataset"]["blocks"], 1);
    let samples = document["samples"].as_array().unwrap();
    assert_eq!(samples.len(), 2);
    assert_eq!(keys(&samples[0]), ["text", "input_ids", "labels"]);
    let mut trained = 0;
    for sample in samples {
        let ids = sample["input_ids"].as_array().unwrap();
        let labels = sample["labels"].as_array().unwrap();
        assert_eq!(ids.len(), labels.len());
        for (id, label) in ids.iter().zip(labels) {
            assert!(label == id || label == -100);
            trained += usize::from(label == id);
        }
    }
    assert_eq!(document["dataset"]["trained_tokens"], trained);
    for device in ["processor", "gpu"] {
        let need = &document["memory"][device]["recomputing"];
        assert!(need["weights"].as_u64() > Some(0), "{need}");
    }
    let methods = document["memory"]["methods"].as_array().unwrap();
    let own: Vec<&Json> = methods.iter().filter(|one| one["is_own"] == true).collect();
    let processor = &document["memory"]["processor"]["recomputing"];
    let parts = processor.as_object().unwrap().values();
    let total: u64 = parts.filter_map(Json::as_u64).sum();
    // Its weights are random, so that no adapter is put on them.
    assert_eq!((methods.len(), own.len()), (4, 1), "{methods:?}");
    let needs: Vec<_> = methods.iter().map(|need| need["bytes"].as_u64()).collect();
    assert!(needs.is_sorted_by(|more, less| more > less), "{methods:?}");
    assert_eq!(own[0]["bytes"], total);
    let text = samples[0]["text"].as_str().unwrap();
    assert!(text.contains("A pirate.<|im_end|>"), "{text}");
    let out = setup.folder.path().join("out");
    assert!(!out.exists(), "check leaves nothing behind");
}

#[test]
fn the_table_shows_counts_and_the_learned_text() {
    let output = Setup::new().run(&["--show", "1"]);
    let text = String::from_utf8(output.stdout).unwrap();
    for part in [
        "2 rows, 2 examples",
        "3 steps",
        "memory       about",
        "methods      all weights ",
        "⟦A pirate.<|im_end|>⟧",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let of_gpus = text.contains("GPU memory   about");
    assert_eq!(of_gpus, cfg!(feature = "cuda"), "{text}");
}

#[test]
fn everything_that_would_fail_is_said_at_once() {
    let setup = Setup::new();
    std::fs::remove_file(setup.model("tokenizer.json")).unwrap();
    std::fs::remove_file(setup.folder.path().join("data.jsonl")).unwrap();
    std::fs::write(setup.folder.path().join("out"), "in the way").unwrap();
    let problems = setup.problems();
    assert_eq!(problems.len(), 3, "{problems:?}");
    assert!(problems[1].contains("out is not a folder"), "{problems:?}");
    assert!(
        problems[0].contains("model has no tokenizer.json"),
        "{problems:?}"
    );
    assert_eq!(problems[2], "data.jsonl: no such file");
}

#[test]
fn an_unsupported_architecture_is_named_with_the_supported_ones() {
    let setup = Setup::new();
    let config = std::fs::read_to_string(setup.model("config.json")).unwrap();
    let config = config.replace("Qwen3ForCausalLM", "GPT2LMHeadModel");
    std::fs::write(setup.model("config.json"), config).unwrap();
    let problems = setup.problems();
    assert_eq!(problems.len(), 1, "{problems:?}");
    for name in [
        "GPT2LMHeadModel",
        "LlamaForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "MixtralForCausalLM",
    ] {
        assert!(problems[0].contains(name), "{problems:?}");
    }
}

#[test]
fn sizes_that_no_model_has_are_named() {
    for (field, size) in [
        ("num_hidden_layers", 4_000_000_000u64),
        ("head_dim", 1 << 40),
    ] {
        let setup = Setup::new();
        let config = std::fs::read_to_string(setup.model("config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
        config[field] = json!(size);
        std::fs::write(setup.model("config.json"), config.to_string()).unwrap();
        let problems = setup.problems();
        assert!(problems[0].contains(field), "{problems:?}");
    }
}

#[test]
fn weights_that_are_not_there_or_truncated_are_named() {
    let setup = Setup::new().set("init_weights", json!("pretrained"));
    let problems = setup.problems();
    assert!(problems[0].contains("has no weights"), "{problems:?}");
    let truncated = [8, 0, 0, 0, 0, 0, 0, 0, b'{'];
    std::fs::write(setup.model("model.safetensors"), truncated).unwrap();
    let problems = setup.problems();
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].contains("model.safetensors"), "{problems:?}");
    let header = br#"{"other":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}      "#;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header);
    file.extend_from_slice(&[0; 4]);
    std::fs::write(setup.model("model.safetensors"), file).unwrap();
    let problems = setup.problems();
    let missing = "model: no tensor model.embed_tokens.weight, ";
    assert!(problems[0].starts_with(missing), "{problems:?}");
    assert_eq!(problems.len(), 1, "{problems:?}");
}

#[test]
fn a_missing_model_folder_is_one_problem() {
    let setup = Setup::new();
    std::fs::remove_dir_all(setup.folder.path().join("model")).unwrap();
    let problems = setup.problems();
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].contains("model"), "{problems:?}");
}

#[test]
fn bad_rows_are_listed_with_their_lines() {
    let setup = Setup::new();
    let rows = format!("{CHAT}\n{{\"messages\": [\n{{\"texts\": 1}}\n");
    std::fs::write(setup.folder.path().join("data.jsonl"), rows).unwrap();
    let problems = setup.problems();
    assert!(
        problems[0].contains("data.jsonl:2: broken JSON"),
        "{problems:?}"
    );
    assert!(
        problems[1].contains("data.jsonl:3: no column"),
        "{problems:?}"
    );
}

/// A job with an adapter, on the shipped model with its weights.
fn adapted(name: &str, value: Json) -> Setup {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tiny-qwen3");
    Setup::new()
        .set("init_weights", json!("pretrained"))
        .set("base_model", json!(shipped))
        .set("adapter", json!("lora"))
        .set(name, value)
}

#[test]
fn a_beginning_token_that_nothing_writes_is_told_and_one_that_a_template_writes_is_refused() {
    let named = |template: &str| {
        adapted("special_tokens", json!({"bos_token": "<s>"})).set("chat_template", json!(template))
    };
    let told = named("chatml").run(&[]);
    let text = String::from_utf8(told.stdout).unwrap();
    assert!(told.status.success(), "{text}");
    assert!(
        text.contains("special_tokens.bos_token: <s> is put before no text"),
        "{text}"
    );
    let problems = named("llama3").problems().join("\n");
    assert!(
        problems.contains("bos_token is <s>, and the tokenizer has none"),
        "{problems}"
    );
}
