//! The job: what the user wrote (a YAML file, environment variables, flags), checked once into a [`JobSpec`] that
//! cannot be wrong.

mod spec;

pub use spec::*;
