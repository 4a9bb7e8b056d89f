//! Weights from safetensors.
