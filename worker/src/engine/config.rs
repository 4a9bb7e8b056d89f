//! The decoder that config.json describes.
