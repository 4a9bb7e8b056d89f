//! A worker against a coordinator that the test plays: joining, fetching, training, leaving, and everything that can
//! go wrong on the way.
#![allow(clippy::unwrap_used)]

mod coordinator;
mod leaving;
mod newcomer;
mod passing_on;
mod reach;
mod refusals;
mod state;
mod terms;
mod training;
mod void;
