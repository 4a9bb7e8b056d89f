//! From the user's rows to blocks: record -> example -> block.

pub mod block;
pub mod blockfile;
mod collect;
pub mod example;
pub mod pack;
mod prepare;
pub mod record;
pub mod template;
pub mod tokenize;

pub use prepare::{DataCounts, PreparedData, Sample, TextSpan, prepare_blocks, samples};
pub use record::{DataErrors, Problem};
