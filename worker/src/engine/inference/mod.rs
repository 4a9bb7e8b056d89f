//! What is done with a trained model: text from it ([`generate`]), and one model of it and its adapter ([`merge`]).

mod adapter_tensor;
pub mod decoder;
pub mod error;
pub mod generate;
pub mod merge;
mod merged_experts;
pub mod merged_weights;
