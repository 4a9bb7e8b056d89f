//! Rows of a dataset.
