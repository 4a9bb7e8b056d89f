//! Paths that are addresses: files on the web are fetched; of the others one line says what to do.

use std::path::PathBuf;

use super::access::Sources;

/// Whether a path is an address, `SCHEME://`, rather than a file.
pub fn is_address(path: &str) -> bool {
    let scheme = path.split_once("://").map(|(scheme, _)| scheme);
    let is_scheme = |scheme: &str| {
        let mut characters = scheme.chars();
        characters.next().is_some_and(|c| c.is_ascii_alphabetic())
            && characters.all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
    };
    scheme.is_some_and(is_scheme)
}

/// A file at an address, on this disk now.
pub struct Fetched {
    pub path: PathBuf,
    /// Which version of the file it is.
    pub version: String,
    /// What the user should know of it.
    pub notice: Option<String>,
}

/// Fetches the file at an address. `pinned`: the version that the run began with.
pub fn fetch(sources: &Sources<'_>, url: &str, pinned: Option<&str>) -> Result<Fetched, String> {
    let scheme = url.split("://").next().unwrap_or_default();
    let scheme = scheme.to_ascii_lowercase();
    let how = match scheme.as_str() {
        "http" | "https" => {
            let hub = sources.hub()?;
            let file = hub.fetch_url(url, pinned, sources.progress);
            let file = file.map_err(|error| error.to_string())?;
            return Ok(Fetched {
                path: file.path,
                version: file.version,
                notice: file.is_stale.then(|| {
                    "its server could not be asked, and the copy in the hub's cache is used"
                        .to_owned()
                }),
            });
        }
        "oci" => "oci os object bulk-download",
        "hf" => {
            return Err(
                "hf:// is not read: write the id of the dataset, owner/name, and data_files for some of its files"
                    .to_owned(),
            );
        }
        "file" => return Err("file:// is not read: write the path without it".to_owned()),
        _ => {
            return Err(format!(
                "{scheme}:// is not read: download the data, and name the file or folder"
            ));
        }
    };
    Err(format!(
        "{scheme}:// is not read: download the data first ({how}), and name the file or folder"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_begins_with_a_scheme() {
        for address in ["https://host/a", "s3://bucket/a", "git+ssh://x"] {
            assert!(is_address(address), "{address}");
        }
        for path in [
            "a/b.jsonl",
            "://x",
            "a b://c",
            "data:x",
            "C:\\data",
            "./x://y",
        ] {
            assert!(!is_address(path), "{path}");
        }
    }
}
