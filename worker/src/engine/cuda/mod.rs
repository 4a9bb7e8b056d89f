//! The engine on an NVIDIA GPU. In: what the engine on processors gets, slots and updates. Out: the same, computed on the
//! device.
//!
//! Weights, activations, sums and moments stay on the GPU; what leaves it are losses, sums for the exchange, and states.
//! Everything of one engine runs in the order in which it is asked for, on one stream, so nothing here waits but for results.

mod batch;
pub mod blas;
mod build;
pub mod causal_lm;
pub mod chunks;
pub mod engine;
mod error;
pub mod gpu;
pub mod layers;
pub mod moments;
pub mod ops;
pub mod params;
pub mod peak;
pub mod sums;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod testing;

pub use engine::GpuEngine;
pub use error::GpuError;
pub use gpu::Gpu;
