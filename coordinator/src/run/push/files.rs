//! Which files of a result or a checkpoint go to the hub, and as what. What a run knows of its machines (`run.json`,
//! `metrics.jsonl`, paths of base models) stays here.

use std::fs;
use std::path::{Path, PathBuf};

use common::files::adapter::ADAPTER_CONFIG;
use common::files::checkpoint::{MANIFEST, Manifest, manifest_of_copy};
use common::hub::{Source, Upload};

use super::card::card;
use super::{PushError, TEMPLATES};
use crate::store::output::RunRecord;

const CARD: &str = "README.md";
/// Most templates beside the default one.
const MAX_TEMPLATES: usize = 1000;

/// Files of a result that others can use, by name; a `*` stands for anything.
const PUSHED: [&str; 16] = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "trainer_state.json",
];

/// The files of a result, and its card: the one in `own`, or one that is made.
pub(super) fn of_result(
    folder: &Path,
    own: &Path,
    record: Option<&RunRecord>,
) -> Result<Vec<Upload>, PushError> {
    let mut names = files_of(folder, is_pushed)?;
    if !["adapter_config.json", "config.json"]
        .iter()
        .any(|name| names.iter().any(|known| known == name))
    {
        let folder = folder.to_owned();
        return Err(PushError::NoResult { folder });
    }
    names.extend(templates_of(folder)?);
    let mut uploads: Vec<Upload> = names
        .into_iter()
        .map(|name| upload(folder, &name, name.clone()))
        .collect();
    let own = own.join(CARD);
    let source = match own.is_file() {
        true => Source::File(own),
        false => Source::Bytes(card(folder, record).into_bytes()),
    };
    uploads.push(Upload {
        path_in_repo: CARD.to_owned(),
        source,
    });
    Ok(uploads)
}

/// The files of a checkpoint: its weights as those of a result, and where a folder of the repository is named, all of it there.
pub(super) fn of_checkpoint(
    folder: &Path,
    manifest: &Manifest,
    output_dir: &Path,
    record: Option<&RunRecord>,
    whole: Option<&str>,
) -> Result<Vec<Upload>, PushError> {
    let mut uploads = of_result(folder, output_dir, record)?;
    let Some(whole) = whole else {
        return Ok(uploads);
    };
    let names = manifest.files.iter().map(|file| file.path.clone());
    for name in names.chain(templates_of(folder)?) {
        uploads.push(upload(folder, &name, format!("{whole}/{name}")));
    }
    // A run goes on from it only where each file is what the manifest says.
    let private = adapter_config(&folder.join(ADAPTER_CONFIG));
    let source = match &private {
        Source::Bytes(config) => Source::Bytes(manifest_of_copy(manifest, ADAPTER_CONFIG, config)?),
        Source::File(_) => Source::File(folder.join(MANIFEST)),
    };
    uploads.push(Upload {
        path_in_repo: format!("{whole}/{MANIFEST}"),
        source,
    });
    Ok(uploads)
}

fn upload(folder: &Path, name: &str, path_in_repo: String) -> Upload {
    let path = folder.join(name);
    Upload {
        source: match name == ADAPTER_CONFIG {
            true => adapter_config(&path),
            false => Source::File(path),
        },
        path_in_repo,
    }
}

/// The adapter's configuration; a base model that is a folder of this machine is named by the folder's name alone.
fn adapter_config(path: &Path) -> Source {
    let file = || Source::File(path.to_owned());
    let json = fs::read(path).ok();
    let json = json.and_then(|bytes| serde_json::from_slice::<serde_json::Value>(&bytes).ok());
    let Some(mut json) = json else {
        return file();
    };
    let base = json["base_model_name_or_path"].as_str().unwrap_or_default();
    let base = PathBuf::from(base);
    let is_here = base.is_absolute() || base.exists();
    match base.file_name().filter(|_| is_here) {
        None => file(),
        Some(name) => {
            json["base_model_name_or_path"] = name.to_string_lossy().into();
            Source::Bytes(format!("{json:#}\n").into_bytes())
        }
    }
}

/// Paths of the chat templates beside the default one.
fn templates_of(folder: &Path) -> Result<Vec<String>, PushError> {
    let templates = folder.join(TEMPLATES);
    if !templates.is_dir() {
        return Ok(Vec::new());
    }
    let inside = files_of(&templates, |name| name.ends_with(".jinja"))?.into_iter();
    let inside = inside.take(MAX_TEMPLATES);
    Ok(inside.map(|name| format!("{TEMPLATES}/{name}")).collect())
}

/// Names of the files of a folder that are wanted, sorted.
fn files_of(folder: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<String>, PushError> {
    let failed = |error: std::io::Error| PushError::File {
        path: folder.to_owned(),
        reason: error.to_string(),
    };
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().into_string().unwrap_or_default();
        if wanted(&name) && entry.path().is_file() {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn is_pushed(name: &str) -> bool {
    PUSHED.iter().any(|pattern| match pattern.split_once('*') {
        Some((start, end)) => {
            name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end)
        }
        None => name == *pattern,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_run_knows_of_its_machines_stays_here() {
        for name in [
            "adapter_model.safetensors",
            "model-00001-of-00002.safetensors",
            "tokenizer.json",
        ] {
            assert!(is_pushed(name), "{name}");
        }
        for name in [
            "run.json",
            "metrics.jsonl",
            "manifest.json",
            "optimizer.safetensors",
            "notes.json",
            ".env",
        ] {
            assert!(!is_pushed(name), "{name}");
        }
    }
}
