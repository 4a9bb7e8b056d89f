//! Datasets in object stores: the whole program against a store of our own.
#![cfg(feature = "object-store")]
#![allow(clippy::unwrap_used)]

mod faults;
mod reading;
mod stand_in;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value as Json, json};
use stand_in::{KEY_ID, REGION, SECRET, StandIn};

/// Rows of a file, each with these words.
fn rows(words: &str, count: usize) -> String {
    let rows = (0..count).map(|row| format!("{{\"text\": \"{words} {row}\"}}\n"));
    rows.collect()
}

/// A store, and a folder with a model to read its data with.
struct Fixture {
    store: StandIn,
    folder: tempfile::TempDir,
    /// Variables beside those that lead to the store; an empty value takes one away.
    variables: Vec<(&'static str, String)>,
}

/// What a command printed.
struct Told {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tiny-qwen3");
        let model = folder.path().join("model");
        fs::create_dir(&model).unwrap();
        for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
            fs::copy(shipped.join(name), model.join(name)).unwrap();
        }
        Self {
            store: StandIn::start(),
            folder,
            variables: Vec::new(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn with(mut self, name: &'static str, value: &str) -> Self {
        self.variables.push((name, value.to_owned()));
        self
    }

    /// Runs a command on a job with these datasets, in an environment that knows this store alone.
    fn run(&self, command: &str, datasets: &Json, options: &[&str]) -> Told {
        let job = json!({
            "base_model": "model", "init_weights": "random", "output_dir": "out", "datasets": datasets,
        });
        fs::write(self.path("job.yaml"), job.to_string()).unwrap();
        let mut run = Command::new(env!("CARGO_BIN_EXE_coordinator"));
        for (name, _) in std::env::vars() {
            let starts = ["AWS_", "GOOGLE_", "AZURE_", "HF_"];
            if starts.iter().any(|start| name.starts_with(start)) {
                run.env_remove(name);
            }
        }
        run.current_dir(self.folder.path())
            .args([command, "job.yaml"])
            .args(options)
            .env("HOME", self.folder.path())
            .env("HF_HOME", self.path("cache"))
            .env("NO_PROXY", "127.0.0.1")
            .env("AWS_ENDPOINT_URL", self.store.endpoint())
            .env("AWS_ALLOW_HTTP", "true")
            .env("AWS_REGION", REGION)
            .env("AWS_ACCESS_KEY_ID", KEY_ID)
            .env("AWS_SECRET_ACCESS_KEY", SECRET)
            // Nobody is there.
            .env("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1");
        for (name, value) in &self.variables {
            match value.is_empty() {
                true => run.env_remove(name),
                false => run.env(name, value),
            };
        }
        let output = run.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let told = Told {
            code: output.status.code(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        };
        for secret in [SECRET, "Signature="] {
            let is_told = told.stdout.contains(secret) || told.stderr.contains(secret);
            assert!(!is_told, "{}{}", told.stdout, told.stderr);
        }
        told
    }

    /// What `check` prints of a dataset that can be read.
    fn check(&self, dataset: &Json) -> String {
        let told = self.run("check", &json!([dataset]), &["--show", "0"]);
        assert_eq!(told.code, Some(0), "{}{}", told.stdout, told.stderr);
        told.stdout
    }

    /// The one line that `check` prints of a dataset that cannot; lines about tries come before it.
    fn refusal(&self, dataset: &Json) -> String {
        let told = self.run("check", &json!([dataset]), &["--log-level", "error"]);
        assert_eq!(told.code, Some(3), "{}{}", told.stdout, told.stderr);
        assert_eq!(told.stderr.lines().count(), 1, "{}", told.stderr);
        told.stderr
    }
}

#[track_caller]
fn assert_has(text: &str, words: &[&str]) {
    for words in words {
        assert!(text.contains(words), "no {words:?} in: {text}");
    }
}
