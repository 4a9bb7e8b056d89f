//! The command line: what can be typed ([`arguments`], with the fields of a job in [`job`]), a file for each command, and what of a
//! command line can be said again ([`replay`]).

pub mod arguments;
pub mod check;
pub mod config;
pub mod job;
pub mod preprocess;
pub mod push;
pub mod replay;
pub mod start;

pub use arguments::{Arguments, CheckArguments, Command, StartArguments};
