//! Trainable parameters.
