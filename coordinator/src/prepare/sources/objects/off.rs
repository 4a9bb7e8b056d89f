//! What a program says that is built without the feature `object-store`.
// Beside the real ones only its tests read it.
#![cfg_attr(feature = "object-store", allow(dead_code))]

use common::job::DatasetSpec;

use super::super::access::Sources;
use super::super::list::List;
use super::address::service_of;
use super::fetched::Fetched;

/// Says how to read the dataset.
pub fn obtain(
    _: &Sources<'_>,
    _: (List, usize),
    dataset: &mut DatasetSpec,
) -> Result<Option<String>, String> {
    Err(not_built(&dataset.path.to_string_lossy()))
}

/// Says how to read the objects.
pub fn fetch_named(_: &Sources<'_>, _: (List, usize), text: &str) -> Result<Vec<Fetched>, String> {
    Err(format!("{text}: {}", not_built(text)))
}

/// Why a program without the feature does not read an address, and what to do.
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
