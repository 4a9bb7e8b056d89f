//! What the files of models and adapters are called, as Transformers and PEFT have it.

pub const CONFIG: &str = "config.json";
pub const SINGLE: &str = "model.safetensors";
pub const INDEX: &str = "model.safetensors.index.json";
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

/// Largest `config.json` or `adapter_config.json`: no real one comes near.
pub(crate) const MAX_CONFIG_BYTES: u64 = 16 << 20;
