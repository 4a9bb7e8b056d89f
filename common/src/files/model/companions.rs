//! The files that go with a model's weights: tokenizer, chat templates, generation defaults. Training never changes them,
//! and the result has them as they came.

use std::path::Path;

use super::links::check_link;
use crate::files::error::read_bounded;
use crate::files::stray::recognised_file;
use crate::files::{FileError, atomic};

const MAX_BYTES: u64 = 1 << 30;

/// Those that belong to the identity of a model.
pub(super) const COMPANIONS: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
    "chat_template.json",
];

/// Other names of what makes up a tokenizer. Muster reads none of them; other programs may.
const FURTHER: [&str; 6] = [
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model.v3",
    "tekken.json",
    "qwen.tiktoken",
];

/// Chat templates beside the default one, a file each.
const TEMPLATES: &str = "additional_chat_templates";
const TEMPLATE_ENDING: &str = ".jinja";
const MAX_TEMPLATES: usize = 1000;

/// Those of a folder, relative to it.
pub(super) fn of_folder(dir: &Path) -> Result<Vec<String>, FileError> {
    let single = COMPANIONS.iter().chain(&FURTHER).copied();
    let mut names: Vec<String> = single
        .filter(|name| dir.join(name).is_file())
        .map(str::to_owned)
        .collect();
    names.extend(templates(dir)?);
    Ok(names)
}

fn templates(dir: &Path) -> Result<Vec<String>, FileError> {
    let folder = dir.join(TEMPLATES);
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&folder).map_err(FileError::io("read", &folder))? {
        let entry = entry.map_err(FileError::io("read", &folder))?;
        let name = entry.file_name().into_string().unwrap_or_default();
        if name.ends_with(TEMPLATE_ENDING) && entry.path().is_file() {
            names.push(format!("{TEMPLATES}/{name}"));
        }
        if names.len() > MAX_TEMPLATES {
            let reason = format!("has more than {MAX_TEMPLATES} templates");
            return Err(FileError::malformed(&folder, reason));
        }
    }
    names.sort();
    Ok(names)
}

/// Each is the file itself and lies in the folder.
pub(super) fn check(dir: &Path) -> Result<(), FileError> {
    for name in of_folder(dir)? {
        check_link(dir, &name)?;
        if let Some(reason) = recognised_file(&dir.join(&name)) {
            return Err(FileError::malformed(&dir.join(&name), reason));
        }
    }
    Ok(())
}

/// Byte for byte.
pub(super) fn copy(dir: &Path, to: &Path) -> Result<(), FileError> {
    for name in of_folder(dir)? {
        check_link(dir, &name)?;
        let target = to.join(&name);
        if let Some(folder) = target.parent() {
            std::fs::create_dir_all(folder).map_err(FileError::io("create", folder))?;
        }
        atomic::write(&target, &read_bounded(&dir.join(&name), MAX_BYTES)?)?;
    }
    Ok(())
}
