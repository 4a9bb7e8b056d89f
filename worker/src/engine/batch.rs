//! Blocks as tensors.
