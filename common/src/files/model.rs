//! Hugging Face model folders: what is in them, checked; the files that go with a fine-tuned model, copied; whole
//! models, written by [`writer`]. Never interprets the architecture beyond its name.

mod writer;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::error::{read_bounded, read_json};
use super::manifest::{entries_digest, inside};
use super::tensors::TensorFile;
use super::{FileEntry, FileError, atomic};
use crate::job::InitWeights;
use crate::progress::Progress;

pub use writer::{MAX_SHARD_BYTES, ModelTensor, write_model};
pub(in crate::files) use writer::{json_text, write_json};

pub const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const MAX_CONFIG_BYTES: u64 = 16 << 20;
const MAX_INDEX_BYTES: u64 = 256 << 20;
const MAX_TOKENIZER_BYTES: u64 = 1 << 30;

/// What goes with the weights: read by tokenizers and generation, never changed by training.
const COMPANIONS: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
    "chat_template.json",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    Llama,
    Qwen2,
    Qwen3,
}

impl Architecture {
    /// `architectures` and `model_type` of each, in `config.json`.
    const NAMES: [(Self, &str, &str); 3] = [
        (Self::Llama, "LlamaForCausalLM", "llama"),
        (Self::Qwen2, "Qwen2ForCausalLM", "qwen2"),
        (Self::Qwen3, "Qwen3ForCausalLM", "qwen3"),
    ];

    fn from_config(path: &Path, config: &Value) -> Result<Self, FileError> {
        let class = config["architectures"].get(0).and_then(Value::as_str);
        let model_type = config["model_type"].as_str();
        let found = Self::NAMES.iter().find(|(_, name, kind)| match class {
            Some(class) => class == *name,
            None => model_type == Some(kind),
        });
        if let Some((architecture, ..)) = found {
            return Ok(*architecture);
        }
        Err(FileError::UnsupportedArchitecture {
            path: path.to_owned(),
            found: class.or(model_type).unwrap_or("(none named)").to_owned(),
            supported: Self::NAMES.map(|(_, name, _)| name).join(", "),
        })
    }
}

/// A model folder whose configuration and weight files were found and checked (the weights' sizes, not their values).
#[derive(Clone, Debug)]
pub struct ModelFolder {
    dir: PathBuf,
    config: Value,
    architecture: Architecture,
    /// Relative to `dir`. Empty for a model with random weights.
    weights: Vec<String>,
    sharded: bool,
}

impl ModelFolder {
    /// Weights are neither needed nor looked at where they will be drawn at random.
    pub fn open(dir: &Path, init: InitWeights) -> Result<Self, FileError> {
        if !dir.is_dir() {
            return Err(FileError::malformed(dir, "there is no such model folder"));
        }
        let config_path = dir.join(CONFIG);
        let config: Value = read_json(&config_path, MAX_CONFIG_BYTES)?;
        let architecture = Architecture::from_config(&config_path, &config)?;
        if let Some(quantization) = config.get("quantization_config").filter(|v| !v.is_null()) {
            return Err(FileError::UnsupportedField {
                path: config_path,
                field: "quantization_config".into(),
                found: quantization["quant_method"]
                    .as_str()
                    .unwrap_or("set")
                    .into(),
                remedy: "use the unquantised model",
            });
        }
        let mut folder = Self {
            dir: dir.to_owned(),
            config,
            architecture,
            weights: Vec::new(),
            sharded: false,
        };
        if init == InitWeights::Pretrained {
            folder.find_weights()?;
        }
        Ok(folder)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn config_json(&self) -> &Value {
        &self.config
    }

    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    pub fn weight_files(&self) -> Vec<PathBuf> {
        self.weights
            .iter()
            .map(|name| self.dir.join(name))
            .collect()
    }

    /// Configuration, weights and tokenizer files, with digests. Reads everything.
    pub fn entries(&self) -> Result<Vec<FileEntry>, FileError> {
        self.entries_watched(&Progress::default())
    }

    /// [`entries`](Self::entries), for those who wait: it is one task of `progress`, and stops once that is cancelled.
    pub fn entries_watched(&self, progress: &Progress) -> Result<Vec<FileEntry>, FileError> {
        let sizes = self.names().map(|name| {
            let metadata = std::fs::metadata(self.dir.join(name));
            metadata.map_or(0, |metadata| metadata.len())
        });
        progress.begin("reading the model", sizes.sum());
        self.names()
            .map(|name| FileEntry::of_watched(&self.dir, name, progress))
            .collect()
    }

    /// BLAKE3 of all of it. Reads everything; where the entries are at hand, take [`entries_digest`] of them.
    pub fn digest(&self) -> Result<String, FileError> {
        Ok(entries_digest(&self.entries()?))
    }

    /// Copies tokenizer, chat template and generation defaults, byte for byte.
    pub fn copy_tokenizer_files(&self, to: &Path) -> Result<(), FileError> {
        for name in self.companions() {
            let bytes = read_bounded(&self.dir.join(name), MAX_TOKENIZER_BYTES)?;
            atomic::write(&to.join(name), &bytes)?;
        }
        Ok(())
    }

    fn companions(&self) -> impl Iterator<Item = &'static str> {
        COMPANIONS
            .into_iter()
            .filter(|name| self.dir.join(name).is_file())
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::once::<&str>(CONFIG)
            .chain(self.companions().map(|name| -> &str { name }))
            .chain(self.sharded.then_some(INDEX))
            .chain(self.weights.iter().map(String::as_str))
    }

    fn find_weights(&mut self) -> Result<(), FileError> {
        if self.dir.join(SINGLE).is_file() {
            TensorFile::open(&self.dir.join(SINGLE))?;
            self.weights = vec![SINGLE.to_owned()];
        } else if self.dir.join(INDEX).is_file() {
            self.weights = check_shards(&self.dir)?;
            self.sharded = true;
        } else if self.dir.join("pytorch_model.bin").is_file() {
            let reason = "has only pytorch_model.bin; save the model as safetensors";
            return Err(FileError::malformed(&self.dir, reason));
        } else {
            let reason = format!("has no weights: neither {SINGLE} nor {INDEX}");
            return Err(FileError::malformed(&self.dir, reason));
        }
        Ok(())
    }
}

/// The shards of an index: each is there and holds the tensors that the index says.
fn check_shards(dir: &Path) -> Result<Vec<String>, FileError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index_path = dir.join(INDEX);
    let index: Index = read_json(&index_path, MAX_INDEX_BYTES)?;
    let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, shard) in &index.weight_map {
        shards.entry(shard).or_default().push(tensor);
    }
    if shards.is_empty() {
        return Err(FileError::malformed(&index_path, "lists no tensors"));
    }
    for (shard, tensors) in &shards {
        let path = inside(dir, shard)?;
        if !path.is_file() {
            return Err(FileError::malformed(
                &path,
                format!("is missing; {INDEX} lists it"),
            ));
        }
        let file = TensorFile::open(&path)?;
        let held: BTreeSet<&str> = file.names().collect();
        if let Some(tensor) = tensors.iter().find(|tensor| !held.contains(**tensor)) {
            return Err(FileError::MissingTensor {
                path,
                tensor: (*tensor).to_owned(),
            });
        }
    }
    Ok(shards.keys().map(|shard| (*shard).to_owned()).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::super::tensors::Dtype;
    use super::*;

    fn config() -> Value {
        serde_json::json!({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "float16"})
    }

    fn written(dir: &Path, max_shard_bytes: u64) {
        let scalars: Vec<f32> = (0..8).map(|i| i as f32).collect();
        let tensors = ["a", "b", "c"].map(|name| ModelTensor {
            name,
            shape: &[2, 4],
            scalars: &scalars,
        });
        write_model(dir, &config(), &tensors, Dtype::BF16, max_shard_bytes).unwrap();
    }

    fn open(dir: &Path) -> Result<ModelFolder, FileError> {
        ModelFolder::open(dir, InitWeights::Pretrained)
    }

    #[test]
    fn a_written_model_opens() {
        let folder = tempfile::tempdir().unwrap();
        written(folder.path(), 1000);
        let model = open(folder.path()).unwrap();
        assert_eq!(model.architecture(), Architecture::Qwen3);
        assert_eq!(model.config_json()["dtype"], "bfloat16");
        assert_eq!(model.config_json()["torch_dtype"], "bfloat16");
        let file = TensorFile::open(&model.weight_files()[0]).unwrap();
        let mut scalars = [0.0; 8];
        file.read_f32("b", &[2, 4], &mut scalars).unwrap();
        assert_eq!(scalars[7], 7.0);
    }

    #[test]
    fn a_large_model_is_written_in_shards() {
        let folder = tempfile::tempdir().unwrap();
        written(folder.path(), 33);
        let model = open(folder.path()).unwrap();
        assert_eq!(model.weight_files().len(), 2);
        let names: Vec<String> = model
            .entries()
            .unwrap()
            .into_iter()
            .map(|e| e.path)
            .collect();
        assert!(names.contains(&INDEX.to_owned()), "{names:?}");
        fs::remove_file(&model.weight_files()[1]).unwrap();
        let message = open(folder.path()).unwrap_err().to_string();
        assert!(message.contains("model-00002-of-00002"), "{message}");
    }

    #[test]
    fn an_index_that_lies_or_escapes_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        written(folder.path(), 33);
        for (tensor, shard) in [
            ("a", "../model-00001-of-00002.safetensors"),
            ("a", "/etc/passwd"),
            ("unknown", "model-00001-of-00002.safetensors"),
        ] {
            let index = serde_json::json!({"weight_map": {tensor: shard}});
            write_json(&folder.path().join(INDEX), &index).unwrap();
            assert!(open(folder.path()).is_err(), "{tensor} in {shard}");
        }
    }

    #[test]
    fn an_unsupported_architecture_is_named_with_the_supported_ones() {
        let folder = tempfile::tempdir().unwrap();
        written(folder.path(), 1000);
        let config =
            serde_json::json!({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"});
        write_json(&folder.path().join(CONFIG), &config).unwrap();
        let message = open(folder.path()).unwrap_err().to_string();
        for part in ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"] {
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn weights_may_be_absent_only_where_they_are_drawn() {
        let folder = tempfile::tempdir().unwrap();
        write_json(&folder.path().join(CONFIG), &config()).unwrap();
        assert!(open(folder.path()).is_err());
        let model = ModelFolder::open(folder.path(), InitWeights::Random).unwrap();
        assert!(model.weight_files().is_empty());
    }

    #[test]
    fn tokenizer_files_are_copied_byte_for_byte() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        written(from.path(), 1000);
        let odd = b"{ \"odd\" :\r\n 1}";
        fs::write(from.path().join("tokenizer.json"), odd).unwrap();
        open(from.path())
            .unwrap()
            .copy_tokenizer_files(to.path())
            .unwrap();
        assert_eq!(fs::read(to.path().join("tokenizer.json")).unwrap(), odd);
        assert_eq!(fs::read_dir(to.path()).unwrap().count(), 1);
    }
}
