//! Merges a PEFT adapter into its model: `W + scale · B A`, computed in float32 and stored as the base model is (float16 as
//! float32, since sums may leave its range; MXFP4 as bfloat16).

use std::path::{Path, PathBuf};

use common::data::template::{ChatTemplate, TemplateError};
use common::data::tokenize::{SpecialTokens, Tokenizer, TokenizerError, end_tokens_of};
use common::files::FileError;
use common::files::atomic::AtomicDir;
use common::files::model::{
    MAX_SHARD_BYTES, ModelFolder, ModelTensor, Scalars, is_mxfp4, write_model,
};
use common::files::tensors::Dtype;
use common::job::InitWeights;
use common::model::ModelConfig;
use serde_json::Value;
use thiserror::Error;

use crate::engine::inference::error::{InferenceError, check_folder};
use crate::engine::inference::merged_weights::{Adapter, FourBits, merged_weights};

/// Why a model and an adapter were not merged.
#[derive(Debug, Error)]
pub enum MergeError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error(transparent)]
    Model(#[from] InferenceError),
    #[error("{path} exists already: name a folder that does not")]
    Exists { path: PathBuf },
}

/// Writes the merged model with the base model's tokenizer files, and the chat template that the adapter has. `output` appears whole or not at all.
///
/// With `four_bits` the adapter is added to what 4 bits leave of the base model, which is what it was trained on.
pub fn merge(
    model_dir: &Path,
    adapter_dir: &Path,
    output: &Path,
    four_bits: Option<FourBits>,
) -> Result<(), MergeError> {
    if output.exists() {
        return Err(MergeError::Exists {
            path: output.to_owned(),
        });
    }
    check_folder(model_dir)?;
    check_folder(adapter_dir)?;
    let folder = ModelFolder::open(model_dir, InitWeights::Pretrained)?;
    let config = ModelConfig::of(&folder).map_err(InferenceError::from)?;
    let mut adapter = Adapter::open(adapter_dir)?;
    let was_tied = config.tied;
    let config = adapter.on(config)?;
    let mut tensors = Vec::new();
    for (name, tensor) in merged_weights(&folder, &config, Some(&adapter), four_bits)? {
        let shape = tensor.dims().to_vec();
        let scalars = tensor
            .flatten_all()
            .and_then(|flat| flat.to_vec1::<f32>())
            .map_err(InferenceError::from)?;
        tensors.push((name, shape, scalars));
    }
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let listed: Vec<ModelTensor> = tensors
        .iter()
        .map(|(name, shape, scalars)| ModelTensor {
            name,
            shape,
            scalars: Scalars::Here(scalars),
        })
        .collect();
    let dir = AtomicDir::create(output)?;
    write_tokenizer(
        &folder,
        (model_dir, adapter_dir),
        adapter.has_tokens(),
        dir.path(),
    )?;
    let is_untied = was_tied && !config.tied;
    let merged = merged_config(&folder, config.vocab_size, is_untied);
    let dtype = merged_dtype(&folder);
    write_model(dir.path(), &merged, &listed, dtype, MAX_SHARD_BYTES)?;
    dir.commit()?;
    Ok(())
}

/// The type that a merged model is stored in.
fn merged_dtype(folder: &ModelFolder) -> Dtype {
    let config = folder.config_json();
    let mut named = ["dtype", "torch_dtype"].into_iter();
    match named.find_map(|key| config[key].as_str()) {
        Some("bfloat16") => Dtype::BF16,
        None if is_mxfp4(config) => Dtype::BF16,
        _ => Dtype::F32,
    }
}

/// The `config.json` of a merged model with so many tokens. What was quantised is not any more.
fn merged_config(folder: &ModelFolder, vocabulary: usize, is_untied: bool) -> Value {
    let mut config = folder.config_json().clone();
    if let Some(fields) = config.as_object_mut() {
        fields.remove("quantization_config");
        if let Some(size) = fields.get_mut("vocab_size") {
            *size = vocabulary.into();
        }
        if is_untied {
            fields.insert("tie_word_embeddings".to_owned(), false.into());
        }
    }
    config
}

/// Writes the base model's tokenizer and chat template, with what the adapter has otherwise. `has_tokens` says that it trained rows of
/// tokens.
fn write_tokenizer(
    folder: &ModelFolder,
    (model_dir, adapter_dir): (&Path, &Path),
    has_tokens: bool,
    to: &Path,
) -> Result<(), MergeError> {
    // What the adapter was trained with, where it is not what the model came with.
    let template = ChatTemplate::load_optional(adapter_dir)?;
    let own = ChatTemplate::load_optional(model_dir)?;
    let other = template.filter(|template| own.is_none_or(|own| own.source() != template.source()));
    folder.copy_tokenizer_files(to, other.as_ref().map(ChatTemplate::source))?;
    if has_tokens || has_renamed_tokens(model_dir, adapter_dir) {
        // The tokens that it added or renamed are in its own tokenizer.
        copy_tokenizer(adapter_dir, to)?;
    }
    // So do the tokens that end its texts and answers.
    let eos = |dir: &Path| {
        let tokens = SpecialTokens::load(dir).ok()?;
        tokens.get("eos_token").map(str::to_owned)
    };
    if let Some(eos) = eos(adapter_dir).filter(|text| eos(model_dir).as_ref() != Some(text)) {
        ModelFolder::name_eos_token(to, &eos)?;
    }
    let ends = end_tokens_of(adapter_dir)?;
    if !ends.is_empty() {
        ModelFolder::add_end_tokens(to, &ends)?;
    }
    Ok(())
}

/// Whether the adapter's tokenizer has other texts for some of the model's added tokens.
fn has_renamed_tokens(model_dir: &Path, adapter_dir: &Path) -> bool {
    // Where there are not two that can be read, there is nothing to copy.
    let [model, adapter] = [model_dir, adapter_dir].map(Tokenizer::load);
    matches!((model, adapter), (Ok(model), Ok(adapter)) if model.is_renamed_in(&adapter))
}

/// Copies the files that name a tokenizer's tokens, where the adapter has them.
fn copy_tokenizer(adapter_dir: &Path, to: &Path) -> Result<(), FileError> {
    for name in [
        "tokenizer.json",
        "tokenizer_config.json",
        "added_tokens.json",
        "special_tokens_map.json",
    ] {
        let from = adapter_dir.join(name);
        if from.is_file() {
            let to = to.join(name);
            std::fs::copy(&from, &to).map_err(FileError::io("write", &to))?;
        }
    }
    Ok(())
}
