//! Fused differentiable operations.
