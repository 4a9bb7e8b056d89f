//! Blocks on disk.
