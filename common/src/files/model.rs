//! Hugging Face model folders: what is in them, checked; the files that go with a fine-tuned model, copied; whole
//! models, written by [`writer`]. Never interprets the architecture beyond its name.

mod absent;
mod companions;
mod extra;
mod four_bits;
mod links;
mod missing_parts;
mod mxfp4;
mod new_tokens;
mod numbers;
mod renamed_tokens;
mod stacked_experts;
mod text_part;
mod tokenizer_model;
mod weights;
mod writer;

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::json::read_json;
use super::manifest::{entries_digest, inside};
pub use super::names::CONFIG;
use super::names::{INDEX, MAX_CONFIG_BYTES, SINGLE};
use super::tensors::TensorFile;
use super::{FileEntry, FileError};
use crate::job::{InitWeights, NewToken};
use crate::progress::Progress;

pub use absent::no_folder;
pub use links::check_link;
pub use mxfp4::is_mxfp4;
pub use numbers::check_numbers;
pub use renamed_tokens::rename_tokens;
pub use tokenizer_model::{has_tokenizer, made_files, tokenizer_model};
pub use weights::WeightFiles;
pub(in crate::files) use weights::listed;
pub use writer::{MAX_SHARD_BYTES, ModelTensor, Scalars, write_model};

const MAX_INDEX_BYTES: u64 = 256 << 20;

/// A family of models, by the class of its `config.json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    Llama,
    Qwen2,
    Qwen3,
    Mistral,
    Gemma2,
    Gemma3,
    Gemma4,
    Granite,
    SmolLm3,
    Olmo2,
    Olmo3,
    Phi3,
    Glm,
    Glm4,
    Qwen2Moe,
    Qwen3Moe,
    Mixtral,
    Olmoe,
    GptOss,
    Qwen35,
    Qwen35Moe,
    Qwen3Next,
}

impl Architecture {
    const ALL: [Self; 22] = [
        Self::Llama,
        Self::Qwen2,
        Self::Qwen3,
        Self::Mistral,
        Self::Gemma2,
        Self::Gemma3,
        Self::Gemma4,
        Self::Granite,
        Self::SmolLm3,
        Self::Olmo2,
        Self::Olmo3,
        Self::Phi3,
        Self::Glm,
        Self::Glm4,
        Self::Qwen2Moe,
        Self::Qwen3Moe,
        Self::Mixtral,
        Self::Olmoe,
        Self::GptOss,
        Self::Qwen35,
        Self::Qwen35Moe,
        Self::Qwen3Next,
    ];

    /// The architecture that a `config.json` (`path` is named in errors) says: by its class, else by its `model_type`.
    pub fn of_config(path: &Path, config: &Value) -> Result<Self, FileError> {
        let class = config["architectures"].get(0).and_then(Value::as_str);
        let model_type = config["model_type"].as_str();
        let is_named = |architecture: &Self| match (architecture.names(), class) {
            ((name, _), Some(class)) => class == name,
            ((_, kind), None) => model_type == Some(kind),
        };
        if let Some(architecture) = Self::ALL.into_iter().find(is_named) {
            return Ok(architecture);
        }
        Err(FileError::UnsupportedArchitecture {
            path: path.to_owned(),
            found: missing_parts::explained(class.or(model_type).unwrap_or("(none named)")),
            supported: Self::ALL.map(Self::class).join(", "),
        })
    }

    /// Class name of the architecture, as in `architectures` of `config.json`.
    pub fn class(self) -> &'static str {
        self.names().0
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "Llama",
            Self::Qwen2 => "Qwen2",
            Self::Qwen3 => "Qwen3",
            Self::Mistral => "Mistral",
            Self::Gemma2 => "Gemma 2",
            Self::Gemma3 => "Gemma 3",
            Self::Gemma4 => "Gemma 4",
            Self::Granite => "Granite",
            Self::SmolLm3 => "SmolLM3",
            Self::Olmo2 => "OLMo 2",
            Self::Olmo3 => "OLMo 3",
            Self::Phi3 => "Phi-3",
            Self::Glm => "GLM-4",
            Self::Glm4 => "GLM-4-0414",
            Self::Qwen2Moe => "Qwen2-MoE",
            Self::Qwen3Moe => "Qwen3-MoE",
            Self::Mixtral => "Mixtral",
            Self::Olmoe => "OLMoE",
            Self::GptOss => "GPT-OSS",
            Self::Qwen35 => "Qwen3.5",
            Self::Qwen35Moe => "Qwen3.5-MoE",
            Self::Qwen3Next => "Qwen3-Next",
        }
    }

    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Llama => ("LlamaForCausalLM", "llama"),
            Self::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
            Self::Qwen3 => ("Qwen3ForCausalLM", "qwen3"),
            Self::Mistral => ("MistralForCausalLM", "mistral"),
            Self::Gemma2 => ("Gemma2ForCausalLM", "gemma2"),
            Self::Gemma3 => ("Gemma3ForCausalLM", "gemma3_text"),
            Self::Gemma4 => ("Gemma4ForCausalLM", "gemma4_text"),
            Self::Granite => ("GraniteForCausalLM", "granite"),
            Self::SmolLm3 => ("SmolLM3ForCausalLM", "smollm3"),
            Self::Olmo2 => ("Olmo2ForCausalLM", "olmo2"),
            Self::Olmo3 => ("Olmo3ForCausalLM", "olmo3"),
            Self::Phi3 => ("Phi3ForCausalLM", "phi3"),
            Self::Glm => ("GlmForCausalLM", "glm"),
            Self::Glm4 => ("Glm4ForCausalLM", "glm4"),
            Self::Qwen2Moe => ("Qwen2MoeForCausalLM", "qwen2_moe"),
            Self::Qwen3Moe => ("Qwen3MoeForCausalLM", "qwen3_moe"),
            Self::Mixtral => ("MixtralForCausalLM", "mixtral"),
            Self::Olmoe => ("OlmoeForCausalLM", "olmoe"),
            Self::GptOss => ("GptOssForCausalLM", "gpt_oss"),
            Self::Qwen35 => ("Qwen3_5ForCausalLM", "qwen3_5_text"),
            Self::Qwen35Moe => ("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text"),
            Self::Qwen3Next => ("Qwen3NextForCausalLM", "qwen3_next"),
        }
    }
}

/// A model folder whose configuration and weight files were found and checked (the weights' sizes, not their values).
#[derive(Clone, Debug)]
pub struct ModelFolder {
    dir: PathBuf,
    config: Value,
    /// Whether the model is the language model within one of texts and images.
    is_text_part: bool,
    architecture: Architecture,
    /// Weight files, relative to `dir`. Empty for a model with random weights.
    weights: Vec<String>,
    sharded: bool,
}

impl ModelFolder {
    /// Opens a model folder and checks its configuration and weight files. Weights are neither needed nor looked at where they
    /// will be drawn at random.
    pub fn open(dir: &Path, init: InitWeights) -> Result<Self, FileError> {
        if !dir.is_dir() {
            return Err(no_folder(dir));
        }
        let config_path = dir.join(CONFIG);
        if !config_path.is_file() {
            let missing = FileError::io("read", &config_path)(ErrorKind::NotFound.into());
            return Err(absent::no_config(dir, missing));
        }
        check_link(dir, CONFIG)?;
        let config: Value = read_json(&config_path, MAX_CONFIG_BYTES)?;
        let text_config = text_part::text_config(&config);
        let is_text_part = text_config.is_some();
        let config = text_config.unwrap_or(config);
        let architecture = Architecture::of_config(&config_path, &config)?;
        refuse_quantised(&config_path, &config, architecture)?;
        check_numbers(&config_path, &config)?;
        if init == InitWeights::Random && config["initializer_range"].as_f64() == Some(0.0) {
            let reason = "initializer_range is 0: weights that are all zero learn nothing";
            return Err(FileError::malformed(&config_path, reason));
        }
        companions::check(dir)?;
        let mut folder = Self {
            dir: dir.to_owned(),
            config,
            is_text_part,
            architecture,
            weights: Vec::new(),
            sharded: false,
        };
        if init == InitWeights::Pretrained {
            folder.find_weights()?;
        }
        Ok(folder)
    }

    /// Refuses a `config.json` whose `architectures` and `model_type` name different architectures.
    pub fn check_model_type(&self) -> Result<(), FileError> {
        let (class, kind) = self.architecture.names();
        match self.config["model_type"].as_str() {
            Some(found) if found != kind => {
                let reason = format!(
                    "architectures says {class}, whose model_type is {kind}, but model_type is {found}; one of them is wrong"
                );
                Err(FileError::malformed(&self.dir.join(CONFIG), reason))
            }
            _ => Ok(()),
        }
    }

    /// Lines for the user on what of the configuration is not done in training.
    pub fn notices(&self) -> Vec<String> {
        let path = self.dir.join(CONFIG);
        let path = path.display();
        let mut notices = Vec::new();
        let dropout = self.config["attention_dropout"].as_f64().unwrap_or(0.0);
        if dropout > 0.0 {
            notices.push(format!(
                "{path}: attention_dropout {dropout} is not applied"
            ));
        }
        if self.is_text_part {
            notices.push(format!(
                "{path}: of this model of texts and images the language model is trained, and it alone is in what is written, as {}",
                self.architecture.class()
            ));
        }
        if self.is_text_part && self.architecture == Architecture::Gemma4 {
            notices.push(format!(
                "{path}: what AutoModelForCausalLM makes of it has other names for the language model: to load an adapter in Python, make the \
                 model by Gemma4ForCausalLM.from_pretrained(.., key_mapping={{r\"^model\\.language_model\\.\": \"model.\"}})"
            ));
        }
        if is_mxfp4(&self.config) {
            notices.push(format!(
                "{path}: the experts are stored in MXFP4: they are read as the bfloat16 numbers that it stands for, and what is written \
                 has those"
            ));
        }
        notices
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The configuration; of a language model within another its own.
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

    /// Size and digest of the configuration, the weights and the tokenizer files. Reads everything.
    pub fn entries(&self) -> Result<Vec<FileEntry>, FileError> {
        self.entries_watched(&Progress::default())
    }

    /// [`entries`](Self::entries) with progress: it is one task of `progress`, and stops with an error once that is cancelled.
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

    /// The entries of the files that computing with the model takes: workers read no tokenizer.
    pub fn computed_with(&self, entries: &[FileEntry]) -> Vec<FileEntry> {
        let is_needed = |entry: &&FileEntry| {
            entry.path == CONFIG || self.weight_names().any(|name| name == entry.path)
        };
        entries.iter().filter(is_needed).cloned().collect()
    }

    /// BLAKE3 over all files of the model, hex. Reads everything; where the entries are at hand, take [`entries_digest`] of them.
    pub fn digest(&self) -> Result<String, FileError> {
        Ok(entries_digest(&self.entries()?))
    }

    /// Copies tokenizer, chat templates and generation defaults, byte for byte; a tokenizer without a `tokenizer.json` gets one.
    /// With a `template` that is the only one that the copy has.
    pub fn copy_tokenizer_files(&self, to: &Path, template: Option<&str>) -> Result<(), FileError> {
        match template {
            None => companions::copy(&self.dir, to),
            Some(template) => companions::copy_with_template(&self.dir, to, template),
        }
    }

    /// Names another token as the end of texts in the tokenizer's files of the copy that is in `to`.
    pub fn name_eos_token(to: &Path, text: &str) -> Result<(), FileError> {
        companions::name_eos_token(to, text)
    }

    /// Gives tokens other texts, by their ids, in the tokenizer's files of the copy that is in `to`.
    pub fn rename_tokens(to: &Path, texts: &BTreeMap<u32, String>) -> Result<(), FileError> {
        match texts.is_empty() {
            true => Ok(()),
            false => renamed_tokens::rename(to, texts),
        }
    }

    /// Adds tokens, which have ids, to the tokenizer's files of the copy that is in `to`.
    pub fn add_tokens(to: &Path, tokens: &[NewToken]) -> Result<(), FileError> {
        match tokens.is_empty() {
            true => Ok(()),
            false => new_tokens::add(to, tokens),
        }
    }

    /// Lets these tokens end a text in the copy that is in `to`, beside those that its generation defaults name.
    pub fn add_end_tokens(to: &Path, ids: &[u32]) -> Result<(), FileError> {
        companions::add_end_tokens(to, ids)
    }

    /// Names of the files that the identity of a model is made of.
    fn names(&self) -> impl Iterator<Item = &str> {
        let companions = companions::COMPANIONS.into_iter();
        std::iter::once(CONFIG)
            .chain(companions.filter(|name| self.dir.join(name).is_file()))
            .chain(self.weight_names())
    }

    fn weight_names(&self) -> impl Iterator<Item = &str> {
        let index = self.sharded.then_some(INDEX).into_iter();
        index.chain(self.weights.iter().map(String::as_str))
    }

    fn find_weights(&mut self) -> Result<(), FileError> {
        if self.dir.join(SINGLE).is_file() {
            check_link(&self.dir, SINGLE)?;
            TensorFile::open(&self.dir.join(SINGLE))?;
            self.weights = vec![SINGLE.to_owned()];
        } else if self.dir.join(INDEX).is_file() {
            check_link(&self.dir, INDEX)?;
            self.weights = check_shards(&self.dir)?;
            self.sharded = true;
        } else {
            return Err(absent::no_weights(&self.dir));
        }
        Ok(())
    }
}

/// Whether a `config.json` says that bitsandbytes quantised the linears to 4 bits.
pub fn is_four_bits(config: &Value) -> bool {
    let quantised = &config["quantization_config"];
    let says = |key: &str| quantised[key].as_bool() == Some(true);
    quantised["quant_method"].as_str() == Some("bitsandbytes")
        && (says("load_in_4bit") || says("_load_in_4bit"))
}

fn refuse_quantised(
    path: &Path,
    config: &Value,
    architecture: Architecture,
) -> Result<(), FileError> {
    if is_four_bits(config) || (is_mxfp4(config) && architecture == Architecture::GptOss) {
        return Ok(());
    }
    for field in ["quantization_config", "quantization", "compression_config"] {
        if let Some(found) = config.get(field).filter(|value| !value.is_null()) {
            return Err(FileError::UnsupportedField {
                path: path.to_owned(),
                field: field.into(),
                found: match (found["quant_method"].as_str(), &found["load_in_8bit"]) {
                    (Some(method), Value::Bool(true)) => format!("{method} in 8 bits"),
                    (method, _) => method.unwrap_or("set").to_owned(),
                },
                remedy: "use the unquantised model, or one that bitsandbytes quantised to 4 bits",
            });
        }
    }
    Ok(())
}

/// Checks and lists the shards of an index: each is there and holds the tensors that the index says.
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
                format!("is missing; {INDEX} lists it: download it, too"),
            ));
        }
        check_link(dir, shard)?;
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

    use super::super::json::write_json;
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
            scalars: Scalars::Here(&scalars),
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
        let mut zero = config();
        zero["initializer_range"] = 0.into();
        write_json(&folder.path().join(CONFIG), &zero).unwrap();
        let message = ModelFolder::open(folder.path(), InitWeights::Random).unwrap_err();
        assert!(
            message.to_string().contains("initializer_range"),
            "{message}"
        );
    }

    #[test]
    fn tokenizer_files_are_copied_byte_for_byte() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        written(from.path(), 1000);
        let odd = b"{ \"odd\" :\r\n 1}";
        fs::write(from.path().join("tokenizer.json"), odd).unwrap();
        open(from.path())
            .unwrap()
            .copy_tokenizer_files(to.path(), None)
            .unwrap();
        assert_eq!(fs::read(to.path().join("tokenizer.json")).unwrap(), odd);
        assert_eq!(fs::read_dir(to.path()).unwrap().count(), 1);
    }
}
