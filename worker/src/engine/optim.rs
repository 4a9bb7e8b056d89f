//! The optimizer. In: the mean gradient, the same on every worker. Out: updated weights and moments, the same to the bit for any
//! number of threads.

mod adamw;
mod norm;

pub use adamw::AdamW;
#[cfg(feature = "cuda")]
pub(in crate::engine) use adamw::Factors;
pub use norm::{NORM_CHUNK, clip_coefficient, gradient_norm};

/// Scalars a thread updates at a time.
const UPDATE_CHUNK: usize = 16_384;

/// The numbers that one update takes beside the gradient.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update {
    /// Number of this update, 1 for the first.
    pub number: u64,
    pub learning_rate: f64,
    /// Factor for the gradient: the clip coefficient.
    pub gradient_scale: f32,
}
