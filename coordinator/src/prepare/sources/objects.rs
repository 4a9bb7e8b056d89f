//! Datasets in object stores: S3 and what speaks its protocol, Google Cloud Storage, Azure's blobs.
//!
//! Enters: a dataset whose path or files are addresses there. Leaves: files in the hub's cache, each of one version, or a line on
//! why not. The library `object_store` knows addresses, credentials and signatures; its requests go by the hub's client
//! (`connection`). Without the feature `object-store` the line says how to build with it.

mod address;
#[cfg(feature = "object-store")]
mod connection;
#[cfg(feature = "object-store")]
mod download;
#[cfg(feature = "object-store")]
mod error;
mod fetched;
#[cfg(feature = "object-store")]
mod locate;
#[cfg(feature = "object-store")]
mod obtain;
#[cfg(any(test, not(feature = "object-store")))]
mod off;
#[cfg(feature = "object-store")]
mod profile;
#[cfg(feature = "object-store")]
mod settings;
#[cfg(feature = "object-store")]
mod store;

pub use address::service_of;
#[cfg(feature = "object-store")]
pub use obtain::{fetch_named, obtain};
#[cfg(not(feature = "object-store"))]
pub use off::{fetch_named, obtain};
