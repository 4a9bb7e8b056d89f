//! The engine against Transformers and PEFT.
#![allow(clippy::unwrap_used)]

mod adapters;
mod dataset;
mod eight_bits;
mod four_bits;
mod golden;
mod live;
mod mxfp4;
mod support;
mod text_part;
