//! Causal language models: the frozen weights, and the decoder that is trained.

mod build;
pub mod causal_lm;
pub mod layers;
mod mean_row;
pub mod own_inputs;
pub mod weight_parts;
pub mod weights;

pub use build::Parts;
pub use causal_lm::{CausalLm, PassTimes};
