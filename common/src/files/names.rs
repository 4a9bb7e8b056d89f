//! What the files of models and adapters are called, as Transformers and PEFT have it.

pub const CONFIG: &str = "config.json";
pub const SINGLE: &str = "model.safetensors";
pub const INDEX: &str = "model.safetensors.index.json";
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
pub(in crate::files) const TOKENIZER: &str = "tokenizer.json";
pub(in crate::files) const TOKENIZER_MODEL: &str = "tokenizer.model";
pub(in crate::files) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
pub(in crate::files) const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";
/// Added tokens with their ids, as older programs write them.
pub(in crate::files) const LEGACY_TOKENS: &str = "added_tokens.json";

/// Largest file that goes with a model's weights.
pub(in crate::files) const MAX_COMPANION_BYTES: u64 = 1 << 30;

/// Largest `config.json` or `adapter_config.json`: no real one comes near.
pub(crate) const MAX_CONFIG_BYTES: u64 = 16 << 20;
