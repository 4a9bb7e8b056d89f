//! The files that Muster reads and writes: checked before they are trusted, written atomically.

pub mod adapter;
pub mod atomic;
pub mod checkpoint;
pub mod durable;
mod error;
pub mod flat;
mod flat_weights;
mod json;
pub mod layout;
pub mod lock;
pub mod manifest;
pub mod model;
pub mod moments;
pub mod names;
pub mod private;
pub mod sink;
pub mod snapshot;
pub mod stray;
pub mod tensors;
pub mod token;

pub use error::FileError;
pub use flat::Flat;
pub use flat_weights::{FlatWeights, WeightsPartMut};
pub use layout::{Layout, TensorLayout, weights_digest};
pub use manifest::{FileEntry, file_digest, file_digest_watched};
pub use moments::Moment;
pub use snapshot::{Frozen, Snapshot, WeightsFormat};
