//! AdamW and the gradient norm.
