//! What stays on disk, in `output_dir`: the files for people and tools ([`output`]), [`checkpoints`], the [`journal`] that the next
//! coordinator reads, whose the folder is ([`claim`]), its [`lock`], whether the [`result`] is whole, and what things in it are called
//! ([`layout`]).

pub mod checkpoints;
pub mod claim;
pub mod journal;
pub mod layout;
pub mod lock;
pub mod output;
pub mod result;
