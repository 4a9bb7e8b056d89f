//! Operations on the GPU, each beside the one on processors that it must agree with (`engine/ops`).
//!
//! Activations that feed a product lie in rows that have room for the adapters' part behind them, so most operations
//! take a stride: the scalars from one row to the next.

pub mod attention;
pub mod causal_conv;
pub mod cross_entropy;
pub mod delta_gates;
pub mod delta_rule;
mod dropout;
pub mod elementwise;
pub mod embedding;
pub mod expert_gates;
pub mod expert_linear;
pub mod expert_rows;
pub mod four_bits;
pub mod frozen;
pub mod gated_norm;
pub mod key_groups;
pub mod lora_linear;
pub mod output_gate;
pub mod projection;
pub mod projection_matrix;
pub mod rms_norm;
pub mod rope;
pub mod routing;
pub mod swiglu;
pub mod token_matrix;
pub mod update;
