//! From the user's rows to blocks: record -> example -> block.

mod added_tokens;
pub mod block;
pub mod blockfile;
mod collect;
mod counts;
pub mod example;
mod json;
mod notes;
mod origins;
pub mod pack;
mod packer;
mod prepare;
pub mod record;
mod sample;
mod split_reader;
pub mod template;
pub mod tokenize;
mod tokens;

pub use counts::DataCounts;
pub use origins::{Origin, origins};
pub use prepare::{PreparedData, prepare_blocks, prune_blocks, samples};
pub use record::{DataErrors, Problem};
pub use sample::{Sample, TextSpan};
