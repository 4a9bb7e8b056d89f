//! From the user's rows to blocks: record -> example -> block.

mod added_tokens;
pub mod block;
pub mod blockfile;
pub mod card;
mod collect;
mod counts;
mod cut;
pub mod example;
mod filter;
mod held_out;
pub mod json;
mod mixture;
mod notes;
mod origins;
pub mod pack;
mod packer;
pub mod paths;
mod prepare;
pub mod record;
pub mod rows;
mod sample;
mod selection;
mod split_reader;
pub mod splits;
pub mod template;
pub mod tokenize;
mod tokens;
mod unlearned;

pub use counts::{DataCounts, SetCounts};
pub use origins::{Origin, origins};
pub use prepare::{PreparedData, prepare_blocks, prepare_blocks_or_find, prune_blocks, samples};
pub use record::{DataErrors, Problem};
pub use sample::{Sample, TextSpan};
