//! The worker's commands, a file for each.

pub mod bench;
pub mod generate;
pub mod merge;
pub mod show;
pub mod version;
