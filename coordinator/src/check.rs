//! `coordinator check`: everything that can be known before training.
