//! The files that a run leaves for people and tools.
