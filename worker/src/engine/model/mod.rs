//! Causal language models: what a `config.json` means, the frozen weights, and the decoder that is trained.

pub mod causal_lm;
pub mod config;
pub mod layers;
pub mod weights;

pub use causal_lm::{Model, PassTimes, Tensors};
pub use config::ModelConfig;
