//! What a job says of adapters that its model has no place for, in a line for people.

use thiserror::Error;

/// A job names a linear that the model does not have.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum UnmatchedTarget {
    #[error("lora_target_modules: no linear of the model is called {target} (it has {known})")]
    Target { target: String, known: String },
    #[error(
        "lora_target_modules: {target} means the router or experts of this model, which are no linears here; name linears instead ({known}), and experts in lora_target_parameters (experts.gate_up_proj, experts.down_proj)"
    )]
    Experts { target: String, known: String },
    #[error(
        "lora_target_parameters: the model has no experts, of which {target} could be a parameter; remove it"
    )]
    NoExperts { target: String },
    #[error(
        "lora_target_parameters: {target} is no parameter that gets an adapter here; name experts.gate_up_proj, experts.down_proj or the weight of the router (perhaps with more of the path), and linears in lora_target_modules"
    )]
    Parameter { target: String },
    #[error(
        "lora_target_parameters: experts beside a dense half (Gemma 4) get no adapters here, and so not {target}; remove it, and name linears in lora_target_modules"
    )]
    Beside { target: String },
    #[error(
        "layers_to_transform: the model has no layer {absent} (it has {layers}, counted from 0)"
    )]
    Layer { absent: usize, layers: usize },
    #[error(
        "exclude_modules and layers_to_transform leave none of lora_target_modules: nothing would be trained"
    )]
    NothingLeft,
    #[error(
        "lora_bias: {path} has no bias in this model, so that an adapter with one could never be merged into it; name linears with a bias in lora_target_modules, or remove it"
    )]
    NoBias { path: String },
    #[error(
        "unfrozen_parameters: no weight of the model has a name in which one of them fits, so that nothing would be trained (a name is model.layers.0.self_attn.q_proj.weight)"
    )]
    AllFrozen,
    #[error("unfrozen_parameters {0}")]
    Unfrozen(String),
    #[error(
        "bias: `all` would train the bias of each router too ({router}), as PEFT does, and routers stay as they are here; use bias: lora_only"
    )]
    RouterBias { router: String },
    #[error(
        "{field}: goes with no adapter on the embedding here; leave embed_tokens out of lora_target_modules, or remove {field}"
    )]
    EmbeddingKind { field: &'static str },
    #[error(
        "lora_target_modules: {path} has rows that are trained as they are (trainable_token_indices, tokens that are added, lora_modules_to_save), and an adapter would change them once more; name it in one place"
    )]
    TrainedTwice { path: &'static str },
    #[error(
        "init_lora_weights: an adapter of rank {rank} begins with as many directions of {path}, which has {side}; lower lora_r, or give it another rank or none"
    )]
    Directions {
        rank: usize,
        side: usize,
        path: String,
    },
}
