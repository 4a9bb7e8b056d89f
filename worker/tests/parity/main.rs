//! The engine against Transformers and PEFT.
#![allow(clippy::unwrap_used)]

mod golden;
mod live;
mod support;
