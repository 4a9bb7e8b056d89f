//! Addresses as users write them, and names as the network resolves them.

pub mod address;
pub(crate) mod resolve;
