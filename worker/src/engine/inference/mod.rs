//! What is done with a trained model: text from it ([`generate`]), and one model of it and its adapter ([`merge`]).

pub mod decoder;
pub mod error;
pub mod generate;
pub mod merge;
pub mod merged_weights;
