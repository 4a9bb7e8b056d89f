//! What a run tells: one thread ([`recorder`]) takes its events to the files and to the [`terminal`].

pub mod recorder;
pub mod terminal;
