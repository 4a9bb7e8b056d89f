//! The result of a run that is done, in `output_dir`: whether all of its files are still there.
//!
//! Enters: the job. Leaves: a file that is gone. Looks at names alone: what is in them is nobody's business any more.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use common::files::names::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, INDEX, SINGLE};
use common::job::{JobSpec, Method};
use serde_json::Value;

const MAX_INDEX_BYTES: u64 = 64 << 20;

/// A file of the result that is not there.
pub fn missing_file(job: &JobSpec) -> Option<PathBuf> {
    let dir = &job.output_dir;
    let mut names = match job.method {
        Method::Lora(_) => vec![ADAPTER_CONFIG.to_owned(), ADAPTER_WEIGHTS.to_owned()],
        Method::Full => vec![CONFIG.to_owned()],
    };
    if job.method == Method::Full {
        let shards = shards(&dir.join(INDEX));
        names.extend(shards.unwrap_or_else(|| vec![SINGLE.to_owned()]));
    }
    let paths = names.into_iter().map(|name| dir.join(name));
    { paths }.find(|path| !path.is_file())
}

/// The files that the index of a model in several parts names; None where there is none.
fn shards(index: &Path) -> Option<Vec<String>> {
    let mut bytes = Vec::new();
    let file = File::open(index).ok()?;
    file.take(MAX_INDEX_BYTES).read_to_end(&mut bytes).ok()?;
    let index: Value = serde_json::from_slice(&bytes).ok()?;
    let mut names: Vec<String> = index["weight_map"]
        .as_object()?
        .values()
        .filter_map(|name| Some(name.as_str()?.to_owned()))
        .collect();
    names.sort_unstable();
    names.dedup();
    Some(names)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use common::job::{JobSources, load};

    use super::*;

    fn job(dir: &Path, adapter: &str) -> JobSpec {
        let flags = [
            ("--base-model", "m"),
            ("--dataset", "d"),
            ("--adapter", adapter),
            ("--output-dir", dir.to_str().unwrap()),
        ];
        let flags = flags.map(|(name, value)| (name.to_owned(), value.to_owned()));
        load(JobSources {
            flags: flags.into(),
            ..JobSources::default()
        })
        .unwrap()
    }

    #[test]
    fn the_first_file_that_is_gone_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        let (adapter, full) = (job(dir, "lora"), job(dir, "full"));
        let write = |name: &str, text: &str| fs::write(dir.join(name), text).unwrap();
        let missing = |job: &JobSpec| {
            let path = missing_file(job)?;
            Some(path.file_name().unwrap().to_str().unwrap().to_owned())
        };
        assert_eq!(missing(&adapter).as_deref(), Some(ADAPTER_CONFIG));
        write(ADAPTER_CONFIG, "{}");
        assert_eq!(missing(&adapter).as_deref(), Some(ADAPTER_WEIGHTS));
        write(ADAPTER_WEIGHTS, "");
        assert_eq!(missing(&adapter), None);
        write(CONFIG, "{}");
        assert_eq!(missing(&full).as_deref(), Some(SINGLE));
        let map = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
        write(INDEX, map);
        write("model-1.safetensors", "");
        assert_eq!(missing(&full).as_deref(), Some("model-2.safetensors"));
        write("model-2.safetensors", "");
        assert_eq!(missing(&full), None);
    }
}
