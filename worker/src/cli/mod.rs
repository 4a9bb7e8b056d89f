//! A file for each command.

pub mod bench;
pub mod generate;
pub mod merge;
pub mod show;
pub mod version;
