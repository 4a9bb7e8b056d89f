//! The engine against Transformers and PEFT.
#![allow(clippy::unwrap_used)]

mod dataset;
mod golden;
mod live;
mod support;
