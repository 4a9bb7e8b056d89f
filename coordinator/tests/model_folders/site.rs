//! A copy of the shipped model that a test changes, a small job on it, and both commands run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::files::tensors::{Dtype, TensorFile, write};
use serde_json::Value as Json;

pub const WEIGHTS: &str = "model.safetensors";
const CHAT: &str = r#"{"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A pirate."}]}"#;

/// A copy of the shipped model, and a job on it.
pub struct Site {
    pub folder: tempfile::TempDir,
}

/// Name, type, shape and bytes of each tensor.
pub type Tensors = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;

impl Site {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tiny-qwen3");
        fs::create_dir(folder.path().join("model")).unwrap();
        for name in [
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            WEIGHTS,
        ] {
            fs::copy(shipped.join(name), folder.path().join("model").join(name)).unwrap();
        }
        fs::write(folder.path().join("data.jsonl"), format!("{CHAT}\n")).unwrap();
        Self { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn model(&self, name: &str) -> PathBuf {
        self.path("model").join(name)
    }

    pub fn config(&self, change: impl FnOnce(&mut Json)) {
        let path = self.model("config.json");
        let mut config: Json = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut config);
        fs::write(&path, config.to_string()).unwrap();
    }

    /// Changes the tensors of a safetensors file.
    pub fn tensors(&self, file: &str, change: impl FnOnce(&mut Tensors)) {
        let path = self.path(file);
        let read = TensorFile::open(&path).unwrap();
        let mut tensors: Tensors = read
            .names()
            .map(|name| {
                let view = read.get(name).unwrap();
                (
                    name.to_owned(),
                    view.dtype,
                    view.shape.to_vec(),
                    view.bytes.to_vec(),
                )
            })
            .collect();
        change(&mut tensors);
        let listed = tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| (name.clone(), *dtype, shape.clone(), &bytes[..]));
        let name = path.file_name().unwrap().to_str().unwrap();
        write(path.parent().unwrap(), name, listed, &[]).unwrap();
    }

    pub fn run(&self, command: &str, options: &[&str]) -> Output {
        let mut program = Command::new(env!("CARGO_BIN_EXE_coordinator"));
        program
            .current_dir(self.folder.path())
            // An id is asked for nowhere but in the cache of this folder.
            .env("HF_HUB_OFFLINE", "1")
            .env("HF_HOME", self.path("huggingface"))
            .args([
                command,
                "--dataset",
                "data.jsonl",
                "--sequence-len",
                "64",
                "--max-steps",
                "1",
            ]);
        if !options.contains(&"--adapter") {
            program.args(["--adapter", "lora", "--lora-r", "2"]);
        }
        if !options.contains(&"--output-dir") {
            program.args(["--output-dir", "out"]);
        }
        if !options.contains(&"--base-model") {
            program.args(["--base-model", "model"]);
        }
        if command == "start" {
            program.arg("--single-node");
        }
        program.args(options).output().unwrap()
    }

    /// Both commands end with exit code 3 and one line that has all of `words`.
    pub fn refused(&self, options: &[&str], words: &[&str]) {
        for command in ["check", "start"] {
            let output = self.run(command, options);
            let errors = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(3), "{command}: {errors}");
            let says = |line: &str| words.iter().all(|word| line.contains(word));
            assert!(
                errors.lines().any(says),
                "{command}: {words:?} not in {errors}"
            );
            assert!(!errors.contains("panicked"), "{errors}");
        }
        assert!(!self.path("out").join("run.json").exists());
    }

    /// Both commands succeed; what `check` writes.
    pub fn taken(&self, options: &[&str]) -> String {
        let [check, start] = ["check", "start"].map(|command| {
            let output = self.run(command, options);
            assert!(output.status.success(), "{command}: {output:?}");
            output
        });
        assert!(start.status.success());
        String::from_utf8(check.stdout).unwrap()
    }
}
