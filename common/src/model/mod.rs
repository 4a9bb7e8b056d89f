//! What a `config.json` means: the one place that decides it. Preflight, memory, the engine and inference all follow from
//! [`ModelConfig`].

mod config;
mod geometry;

pub use config::{ModelConfig, ModelError, Rope, RopeScaling};
pub use geometry::{
    AdaptedModule, EMBEDDING, FINAL_NORM, HEAD, LinearShape, UnmatchedTarget, adapted_by_layer,
    adapted_modules, base_tensors, linears, trained_matrices,
};
