//! The files that Muster reads and writes: checked before they are trusted, written atomically.

pub mod adapter;
pub mod atomic;
pub mod checkpoint;
pub mod durable;
mod error;
pub mod layout;
pub mod manifest;
pub mod model;
pub mod snapshot;
pub mod tensors;

pub use error::FileError;
pub use layout::{Layout, TensorLayout, weights_digest};
pub use manifest::{FileEntry, file_digest};
pub use snapshot::{Snapshot, WeightsFormat};
