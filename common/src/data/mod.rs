//! From the user's rows to blocks: record -> example -> block.

pub mod block;
pub mod blockfile;
pub mod pack;
pub mod record;
pub mod template;
pub mod tokenize;
