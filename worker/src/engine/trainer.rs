//! Slots in, updates out.
