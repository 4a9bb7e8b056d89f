//! Causal language models: the frozen weights, and the decoder that is trained.

pub mod causal_lm;
pub mod layers;
pub mod weights;

pub use causal_lm::{CausalLm, PassTimes, Tensors};
