//! The files that Muster reads and writes: checked before they are trusted, written atomically.

pub mod adapter;
pub mod atomic;
pub mod checkpoint;
pub mod layout;
pub mod manifest;
pub mod model;
pub mod snapshot;
pub mod tensors;
