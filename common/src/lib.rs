//! What coordinator and worker must agree on: the job, the data format, the plan of the run, the exact sum and the
//! files. Pure code and file access only, but for the client of the hub: no other sockets, no candle.

pub mod chat_templates;
pub mod data;
pub mod dynamic_map;
pub mod exact;
pub mod failpoint;
pub mod files;
pub mod flops;
#[cfg(unix)]
pub mod hangup;
pub mod host;
pub mod hub;
pub mod instruction_set;
pub mod job;
pub mod logging;
pub mod manual;
pub mod memory;
pub mod model;
pub mod nf4;
pub mod plan;
pub mod progress;
pub mod rng;
pub mod sentencepiece;
pub mod streams;
pub mod text;
pub mod timestamp;
pub mod wire;

/// Muster's version. Coordinator and workers must run the same one.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
