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
#[cfg(feature = "object-store")]
mod locate;
#[cfg(feature = "object-store")]
mod obtain;
#[cfg(feature = "object-store")]
mod profile;
#[cfg(feature = "object-store")]
mod settings;
#[cfg(feature = "object-store")]
mod store;

use std::path::PathBuf;

pub use address::service_of;
#[cfg(feature = "object-store")]
pub use obtain::{fetch_named, obtain};

/// An object, on this disk now.
pub struct Fetched {
    pub path: PathBuf,
    /// Its address.
    pub name: String,
    pub version: String,
    /// What the user should know of it.
    pub notice: Option<String>,
}

#[cfg(not(feature = "object-store"))]
mod off {
    use common::job::DatasetSpec;

    use super::super::access::Sources;
    use super::super::list::List;
    use super::{Fetched, not_built};

    /// Says how to read the dataset.
    pub fn obtain(
        _: &Sources<'_>,
        _: (List, usize),
        dataset: &mut DatasetSpec,
    ) -> Result<Option<String>, String> {
        Err(not_built(&dataset.path.to_string_lossy()))
    }

    /// Says how to read the objects.
    pub fn fetch_named(
        _: &Sources<'_>,
        _: (List, usize),
        text: &str,
    ) -> Result<Vec<Fetched>, String> {
        Err(format!("{text}: {}", not_built(text)))
    }
}

#[cfg(not(feature = "object-store"))]
pub use off::{fetch_named, obtain};

/// Why a program without the feature does not read an address, and what to do.
#[cfg(any(test, not(feature = "object-store")))]
fn not_built(text: &str) -> String {
    let scheme = text.split("://").next().unwrap_or_default();
    let copy = service_of(text).map_or("", |service| service.copy_command());
    format!(
        "{scheme}:// is not read by this program, which is built without the feature object-store: build it with `cargo build --release -p coordinator --features object-store`, or download the data first ({copy}), and name the file or folder"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_the_feature_a_line_says_how_to_build_it_and_how_to_copy() {
        for (text, copy) in [
            ("s3://bucket/rows.jsonl", "(aws s3 cp"),
            ("gs://bucket/rows", "(gcloud"),
            ("az://box/rows.jsonl", "(azcopy"),
        ] {
            let line = not_built(text);
            let (scheme, _) = text.split_once("://").unwrap_or_default();
            assert!(
                line.starts_with(&format!("{scheme}:// is not read")),
                "{line}"
            );
            assert!(
                line.contains("--features object-store") && line.contains(copy),
                "{line}"
            );
        }
    }
}
