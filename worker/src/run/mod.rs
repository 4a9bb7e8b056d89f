//! What is done with a worker's state: the [`step`], readable top to bottom, over the traits of [`backend`]. In a real worker it
//! runs [`on_engine`] and [`on_mesh`], on a thread that outlives sessions ([`engine_thread`]).

pub mod backend;
pub mod engine_thread;
pub mod error;
pub mod leases;
pub mod on_engine;
mod on_mesh;
pub mod orders;
pub mod step;
