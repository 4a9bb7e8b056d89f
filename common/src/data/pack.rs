//! Examples into blocks.
