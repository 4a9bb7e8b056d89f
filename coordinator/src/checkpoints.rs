//! Checkpoints: received, verified, committed, pruned.
