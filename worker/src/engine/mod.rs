//! The engine: models, layers, fused ops, optimizer. Knows nothing of networks.

pub mod accumulator;
pub mod batch;
pub mod config;
pub mod generate;
pub mod layers;
pub mod model;
pub mod ops;
pub mod optim;
pub mod params;
pub mod trainer;
pub mod weights;
