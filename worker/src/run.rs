//! The step, readable top to bottom.
