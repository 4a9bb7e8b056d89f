//! Hugging Face model folders.
