//! The engine: models, layers, fused ops, optimizer. Knows nothing of networks.
//!
//! From the top: a [`trainer`] runs the [`model`] of one job, on the processor or a GPU (`cuda`); [`ops`] are what both are made
//! of; [`inference`] answers prompts and merges adapters.

pub mod abandon;
pub mod accumulator;
pub mod adapter;
pub mod batch;
pub mod buffer;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
mod error;
pub mod estimate;
pub mod inference;
pub mod mean_gradient;
pub(crate) mod memory;
pub mod model;
pub mod numerics;
pub mod ops;
pub mod optim;
pub mod packed;
pub mod params;
pub mod slot;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod testing;
pub mod trainer;

pub use abandon::Abandon;
pub use error::EngineError;
pub use mean_gradient::MeanGradient;
pub use trainer::{Trainer, TrainerOptions, UpdateOutcome};
