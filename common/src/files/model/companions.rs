//! The files that go with a model's weights: tokenizer, chat templates, generation defaults. Training never changes them,
//! and the result has them as they came, and a `tokenizer.json` beside a `tokenizer.model` that came without.

use std::path::Path;

use super::links::check_link;
use super::tokenizer_model;
use crate::files::error::read_bounded;
use crate::files::names::{
    LEGACY_TOKENS, MAX_COMPANION_BYTES, SPECIAL_TOKENS_MAP, TOKENIZER, TOKENIZER_CONFIG,
    TOKENIZER_MODEL,
};
use crate::files::stray::recognised_file;
use crate::files::{FileError, atomic};

/// Companion files that belong to the identity of a model: what its digest is made of.
pub(super) const COMPANIONS: [&str; 10] = [
    TOKENIZER,
    TOKENIZER_CONFIG,
    TEMPLATE,
    SPECIAL_TOKENS_MAP,
    LEGACY_TOKENS,
    "vocab.json",
    "merges.txt",
    TOKENIZER_MODEL,
    GENERATION_CONFIG,
    TEMPLATE_JSON,
];

const GENERATION_CONFIG: &str = "generation_config.json";
/// The chat template where newer programs look for it, and where older ones did.
const TEMPLATE: &str = "chat_template.jinja";
const TEMPLATE_JSON: &str = "chat_template.json";

/// Further companion files, other names of what makes up a tokenizer. Muster reads none of them; other programs may.
const FURTHER: [&str; 6] = [
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model.v3",
    "tekken.json",
    "qwen.tiktoken",
];

/// Folder of the chat templates beside the default one, a file each.
const TEMPLATES: &str = "additional_chat_templates";
const TEMPLATE_ENDING: &str = ".jinja";
const MAX_TEMPLATES: usize = 1000;

/// The companion files that a model folder has, relative to it.
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

/// Refuses companion files that are links out of the folder, or files of another format.
pub(super) fn check(dir: &Path) -> Result<(), FileError> {
    for name in of_folder(dir)? {
        check_link(dir, &name)?;
        if let Some(reason) = recognised_file(&dir.join(&name)) {
            return Err(FileError::malformed(&dir.join(&name), reason));
        }
    }
    Ok(())
}

/// Copies the companion files, byte for byte. A tokenizer that has no `tokenizer.json` gets one.
pub(super) fn copy(dir: &Path, to: &Path) -> Result<(), FileError> {
    for name in of_folder(dir)? {
        check_link(dir, &name)?;
        let target = to.join(&name);
        if let Some(folder) = target.parent() {
            std::fs::create_dir_all(folder).map_err(FileError::io("create", folder))?;
        }
        atomic::write(
            &target,
            &read_bounded(&dir.join(&name), MAX_COMPANION_BYTES)?,
        )?;
    }
    tokenizer_model::complete(dir, to)
}

/// Copies the companion files with this chat template in place of all that the folder has.
pub(super) fn copy_with_template(dir: &Path, to: &Path, template: &str) -> Result<(), FileError> {
    copy(dir, to)?;
    for name in [TEMPLATE_JSON.to_owned()].into_iter().chain(templates(to)?) {
        match std::fs::remove_file(to.join(&name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(FileError::io("remove", &to.join(&name))(error));
            }
            _ => {}
        }
    }
    atomic::write(&to.join(TEMPLATE), template.as_bytes())?;
    // Programs that do not know the file look here, and would find the model's own.
    let config = to.join(TOKENIZER_CONFIG);
    if !config.is_file() {
        return Ok(());
    }
    let bytes = read_bounded(&config, MAX_COMPANION_BYTES)?;
    let mut json: serde_json::Value = serde_json::from_slice(&bytes)
        .map_err(|error| FileError::malformed(&config, error.to_string()))?;
    match json.get_mut("chat_template") {
        None => Ok(()),
        Some(own) => {
            *own = template.into();
            let bytes = serde_json::to_vec_pretty(&json)
                .map_err(|error| FileError::malformed(&config, error.to_string()))?;
            atomic::write(&config, &bytes)
        }
    }
}

/// Puts another text in place of `eos_token` in `tokenizer_config.json`, and in `special_tokens_map.json` where that is.
pub(super) fn name_eos_token(to: &Path, text: &str) -> Result<(), FileError> {
    for (name, is_needed) in [(TOKENIZER_CONFIG, true), (SPECIAL_TOKENS_MAP, false)] {
        let path = to.join(name);
        let mut json: serde_json::Value = match path.is_file() {
            true => serde_json::from_slice(&read_bounded(&path, MAX_COMPANION_BYTES)?)
                .map_err(|error| FileError::malformed(&path, error.to_string()))?,
            false if is_needed => serde_json::json!({}),
            false => continue,
        };
        let Some(fields) = json.as_object_mut() else {
            return Err(FileError::malformed(&path, "is not a JSON object"));
        };
        match fields.get_mut("eos_token") {
            // Beside what else it says of the token.
            Some(serde_json::Value::Object(token)) => {
                token.insert("content".to_owned(), text.into());
            }
            _ => drop(fields.insert("eos_token".to_owned(), text.into())),
        }
        let bytes = serde_json::to_vec_pretty(&json)
            .map_err(|error| FileError::malformed(&path, error.to_string()))?;
        atomic::write(&path, &bytes)?;
    }
    Ok(())
}

/// Adds ids to `eos_token_id` of the generation defaults, which are made where there are none.
pub(super) fn add_end_tokens(to: &Path, ids: &[u32]) -> Result<(), FileError> {
    let path = to.join(GENERATION_CONFIG);
    let mut json = match path.is_file() {
        true => serde_json::from_slice(&read_bounded(&path, MAX_COMPANION_BYTES)?)
            .map_err(|error| FileError::malformed(&path, error.to_string()))?,
        false => serde_json::json!({}),
    };
    let mut all: Vec<serde_json::Value> = match &json["eos_token_id"] {
        serde_json::Value::Array(known) => known.clone(),
        serde_json::Value::Null => Vec::new(),
        one => vec![one.clone()],
    };
    for id in ids {
        let id = serde_json::Value::from(*id);
        if !all.contains(&id) {
            all.push(id);
        }
    }
    let Some(fields) = json.as_object_mut() else {
        return Err(FileError::malformed(&path, "is not a JSON object"));
    };
    fields.insert("eos_token_id".to_owned(), all.into());
    let bytes = serde_json::to_vec_pretty(&json)
        .map_err(|error| FileError::malformed(&path, error.to_string()))?;
    atomic::write(&path, &bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::{ModelFolder, ModelTensor, Scalars, write_model};
    use super::*;
    use crate::files::FileEntry;
    use crate::files::names::{CONFIG, INDEX};
    use crate::files::tensors::Dtype;
    use crate::job::InitWeights;

    #[test]
    fn a_result_has_the_template_and_the_end_tokens_that_it_was_trained_with() {
        let (dir, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write(
            TOKENIZER_CONFIG,
            r#"{"eos_token": "</s>", "chat_template": "own"}"#,
        );
        write(TEMPLATE_JSON, r#"{"chat_template": "own"}"#);
        write(&format!("{TEMPLATES}/tool_use.jinja"), "own");
        write(GENERATION_CONFIG, r#"{"eos_token_id": 2, "top_k": 5}"#);
        copy_with_template(dir.path(), to.path(), "other").unwrap();
        add_end_tokens(to.path(), &[2, 7]).unwrap();
        let text = |name: &str| std::fs::read_to_string(to.path().join(name)).ok();
        let json = |name: &str| -> serde_json::Value {
            serde_json::from_str(&text(name).unwrap()).unwrap()
        };
        assert_eq!(text(TEMPLATE).unwrap(), "other");
        let config = serde_json::json!({"eos_token": "</s>", "chat_template": "other"});
        assert_eq!(json(TOKENIZER_CONFIG), config);
        assert_eq!(text(TEMPLATE_JSON), None);
        assert_eq!(text(&format!("{TEMPLATES}/tool_use.jinja")), None);
        let defaults = serde_json::json!({"eos_token_id": [2, 7], "top_k": 5});
        assert_eq!(json(GENERATION_CONFIG), defaults);
    }

    #[test]
    fn workers_get_what_computing_takes_and_the_result_gets_the_rest() {
        let (dir, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let tensors = ["a", "b"].map(|name| ModelTensor {
            name,
            shape: &[4],
            scalars: Scalars::Here(&[0.5; 4]),
        });
        let config = serde_json::json!({"architectures": ["LlamaForCausalLM"]});
        write_model(dir.path(), &config, &tensors, Dtype::F32, 16).unwrap();
        std::fs::create_dir(dir.path().join(TEMPLATES)).unwrap();
        let template = format!("{TEMPLATES}/tools.jinja");
        let rest = ["tokenizer.json", "vocab.txt", &template];
        for name in rest {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        let model = ModelFolder::open(dir.path(), InitWeights::Pretrained).unwrap();
        let entries = model.entries().unwrap();
        assert!(entries.iter().any(|entry| entry.path == "tokenizer.json"));
        let needed: Vec<FileEntry> = model.computed_with(&entries);
        let needed: Vec<&str> = needed.iter().map(|entry| entry.path.as_str()).collect();
        let shards = [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ];
        assert_eq!(needed, [CONFIG, INDEX, shards[0], shards[1]]);
        model.copy_tokenizer_files(to.path(), None).unwrap();
        for name in rest {
            assert_eq!(
                std::fs::read(to.path().join(name)).unwrap(),
                name.as_bytes()
            );
        }
    }
}
