//! What a `config.json` means: the one place that decides it. Preflight, memory, the engine and inference all follow from
//! [`ModelConfig`].

mod adapted;
mod adapted_module;
mod config;
mod error;
mod expert_parameters;
mod experts;
mod factors;
mod family;
mod fields;
mod geometry;
mod layer_kinds;
mod layer_sizes;
mod linear_attention;
mod refusals;
mod rope;
mod trained;
mod unmatched_target;

pub use adapted::{
    absent_targets, adapted_modules, adapter_ranks, linear_names, module_tensors, tensors_beside,
    trained_ranks,
};
pub use adapted_module::{AdaptedModule, Stack};
pub use config::ModelConfig;
pub use error::ModelError;
pub use expert_parameters::absent_parameters;
pub use experts::{
    BESIDE_NORMS, ExpertNames, Experts, FusedExperts, ROUTER_SCALES, STACKED_EXPERTS, is_of_expert,
    is_router,
};
pub use factors::{Caps, Scales};
pub use family::{Activation, HeadNormKind, LayerNorms};
pub use geometry::{
    EMBEDDING, FINAL_NORM, FUSED_BIAS, HEAD, INPUT_EMBEDDING, INPUT_MIX_NORM, INPUT_NORM,
    INPUT_PROJECTION, LAYER_SCALAR, LinearShape, SINKS, base_tensors, input_projection,
    is_never_trained, is_norm_or_bias, linears, projections, token_tensor, token_tensors,
};
pub use layer_kinds::{LayerKind, Rotation};
pub use linear_attention::{CONVOLUTION, DECAY, DECAY_BIAS, HEAD_NORM};
pub use rope::{LongTexts, Rope, RopeScaling, RotaryPairs};
pub use trained::{
    check_unfrozen, frozen_bytes, frozen_tensors, trained_matrices, unfrozen_sizes,
    unfrozen_tensors,
};
pub use unmatched_target::UnmatchedTarget;
