//! What stays on disk, in `output_dir`: the files for people and tools ([`output`]), [`checkpoints`], the [`journal`] that the next
//! coordinator reads, and whose the folder is ([`claim`]).

pub mod checkpoints;
pub mod claim;
pub mod journal;
pub mod output;
