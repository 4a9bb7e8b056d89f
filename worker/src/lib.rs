//! The worker: joins a coordinator, computes slots with candle, and sums gradients with its peers.

pub mod blocks;
pub mod collective;
pub mod engine;
pub mod fetch;
pub mod run;
pub mod session;
pub mod upload;
