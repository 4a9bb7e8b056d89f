//! What the engine's thread does with a worker's state: the [`step`], readable top to bottom, on a thread that outlives sessions
//! ([`engine_thread`]).

pub mod engine_thread;
pub mod leases;
pub mod orders;
pub mod step;
