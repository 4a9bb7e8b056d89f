//! Why something is not a model folder. In: a path that has no folder, no `config.json` or no weights. Out: an error that
//! says what is there instead and what to do.

use std::path::Path;

use serde_json::Value;

use crate::files::json::read_json;
use crate::files::names::{
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, INDEX, MAX_CONFIG_BYTES, SINGLE,
};
use crate::files::stray::recognised_file;
use crate::files::{FileError, manifest};
use crate::hub;

/// Most names of a folder that are looked at.
const MAX_NAMES: usize = 10_000;

/// The error of a path that is no folder.
pub fn no_folder(path: &Path) -> FileError {
    if path.is_file() {
        let reason = recognised_file(path).unwrap_or("is a file; name the folder that it is in");
        return FileError::malformed(path, reason);
    }
    if path.is_symlink() {
        return FileError::malformed(path, "is a link to nothing");
    }
    FileError::malformed(path, hub::no_such_folder(path))
}

/// The error of a folder without `config.json`; `missing` is the error of reading that.
pub(super) fn no_config(dir: &Path, missing: FileError) -> FileError {
    let names = names(dir);
    let has = |name: &str| names.iter().any(|known| known == name);
    let reason = if has(ADAPTER_CONFIG) || has(ADAPTER_WEIGHTS) {
        let base = base_of(dir);
        format!(
            "is the folder of an adapter, not of a model: name the model that it belongs to{base} as base_model, and this folder as lora_model_dir to train the adapter further"
        )
    } else if let Some(inner) = names
        .iter()
        .find(|name| dir.join(name).join(CONFIG).is_file())
    {
        format!(
            "has no {CONFIG}, but {inner} in it has: name {}",
            dir.join(inner).display()
        )
    } else if has("snapshots") && has("blobs") {
        "is a folder of the Hugging Face cache: name the folder of a revision in its snapshots"
            .to_owned()
    } else if let Some(other) = other_format(&names) {
        format!("has no {CONFIG}, {other}")
    } else {
        return missing;
    };
    FileError::malformed(dir, reason)
}

/// The base model that an adapter in this folder names, as ` (name)`, or nothing.
fn base_of(dir: &Path) -> String {
    let config: Option<Value> = read_json(&dir.join(ADAPTER_CONFIG), MAX_CONFIG_BYTES).ok();
    let base = config
        .as_ref()
        .and_then(|config| config["base_model_name_or_path"].as_str());
    base.filter(|base| !base.is_empty())
        .map_or_else(String::new, |base| format!(" ({base})"))
}

/// The error of a folder with `config.json` and without weights that are read.
pub(super) fn no_weights(dir: &Path) -> FileError {
    let names = names(dir);
    let tensors: Vec<&String> = names
        .iter()
        .filter(|name| name.ends_with(".safetensors") && *name != ADAPTER_WEIGHTS)
        .collect();
    let reason = if let Some(shard) = tensors.iter().find(|name| name.contains("-of-")) {
        format!("has {shard} but not {INDEX}, which says what is in which file: download that, too")
    } else if let Some(other) = tensors.first() {
        format!(
            "has its weights in {other}, where {SINGLE} is looked for: rename it if it is the whole model"
        )
    } else if let Some(other) = other_format(&names) {
        format!("has no safetensors, {other}")
    } else {
        format!("has no weights: neither {SINGLE} nor {INDEX}")
    };
    FileError::malformed(dir, reason)
}

/// What a folder has instead of safetensors, for the rest of a sentence.
fn other_format(names: &[String]) -> Option<String> {
    const PYTORCH: &str = "save the model as safetensors (`AutoModelForCausalLM.from_pretrained(..).save_pretrained(..)`)";
    const HUB: &str = "use the Hugging Face model that it was made from";
    const FORMATS: [(&str, &str, &str); 9] = [
        (".gguf", "GGUF is not read", HUB),
        (".bin", "PyTorch's own format is not read", PYTORCH),
        (".pt", "PyTorch's own format is not read", PYTORCH),
        (".pth", "PyTorch's own format is not read", PYTORCH),
        (".h5", "TensorFlow's format is not read", PYTORCH),
        (".msgpack", "Flax's format is not read", PYTORCH),
        (".onnx", "ONNX is not read", HUB),
        (".npz", "NumPy's format is not read", HUB),
        (
            "model_index.json",
            "that is an image model's",
            "name a language model",
        ),
    ];
    FORMATS.iter().find_map(|(ending, what, remedy)| {
        let name = names.iter().find(|name| name.ends_with(ending))?;
        Some(format!("only {name}; {what}: {remedy}"))
    })
}

/// Names in a folder, in order; empty where it cannot be read.
fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().take(MAX_NAMES);
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| manifest::inside(dir, name).is_ok())
        .collect();
    names.sort();
    names
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::super::ModelFolder;
    use super::*;
    use crate::job::InitWeights;

    /// What is said of a folder with these files.
    fn said(files: &[(&str, &str)]) -> String {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        let opened = ModelFolder::open(folder.path(), InitWeights::Pretrained);
        opened.unwrap_err().to_string()
    }

    fn check(files: &[(&str, &str)], words: &[&str]) {
        let message = said(files);
        for word in words {
            assert!(message.contains(word), "{word:?} not in {message:?}");
        }
    }

    const LLAMA: (&str, &str) = (CONFIG, r#"{"architectures": ["LlamaForCausalLM"]}"#);

    #[test]
    fn a_hub_id_is_told_with_the_command_that_downloads_it() {
        let said = |path: &str| no_folder(Path::new(path)).to_string();
        for path in [
            "Qwen/Qwen3-0.6B",
            "hf://Qwen/Qwen3-0.6B",
            "https://huggingface.co/Qwen/Qwen3-0.6B",
        ] {
            let message = said(path);
            let command = "`hf download Qwen/Qwen3-0.6B --local-dir models/Qwen3-0.6B`";
            assert!(message.contains(command), "{message}");
        }
        for path in ["/no/such", "./no/such", "../no", "no", "src/no", "a/b/c"] {
            let message = said(path);
            assert!(!message.contains("hf download"), "{message}");
            assert!(message.contains("no such folder"), "{message}");
        }
    }

    #[test]
    fn an_adapter_s_folder_is_told_from_a_model_s() {
        let config = r#"{"base_model_name_or_path": "Qwen/Qwen3-0.6B"}"#;
        check(
            &[(ADAPTER_CONFIG, config), (ADAPTER_WEIGHTS, "")],
            &["adapter", "(Qwen/Qwen3-0.6B)", "lora_model_dir"],
        );
    }

    #[test]
    fn other_formats_are_named_with_the_way_out() {
        check(
            &[("m-Q4_K_M.gguf", "GGUF")],
            &["m-Q4_K_M.gguf", "GGUF is not read"],
        );
        check(
            &[LLAMA, ("m.gguf", "GGUF")],
            &["m.gguf", "GGUF is not read"],
        );
        check(
            &[LLAMA, ("pytorch_model.bin", "")],
            &["pytorch_model.bin", "save_pretrained"],
        );
        let shard = "pytorch_model-00001-of-00002.bin";
        check(&[LLAMA, (shard, "")], &[shard, "save_pretrained"]);
        check(
            &[("params.json", "{}"), ("consolidated.00.pth", "")],
            &["consolidated.00.pth"],
        );
        let shard = "model-00001-of-00002.safetensors";
        check(&[LLAMA, (shard, "")], &[shard, INDEX, "download"]);
        check(
            &[LLAMA, ("weights.safetensors", "")],
            &["weights.safetensors", SINGLE],
        );
        check(&[LLAMA], &["neither model.safetensors"]);
    }

    #[test]
    fn folders_around_a_model_are_named() {
        check(&[("inner/config.json", LLAMA.1)], &["inner in it has"]);
        check(
            &[("snapshots/0/config.json", "{}"), ("blobs/0", "")],
            &["snapshots"],
        );
        check(&[("notes.txt", "")], &[CONFIG]);
    }

    #[test]
    fn a_file_is_told_from_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        fs::write(&path, "GGUF").unwrap();
        let message = no_folder(&path).to_string();
        assert!(message.contains("is a GGUF file"), "{message}");
        fs::write(&path, "else").unwrap();
        let message = no_folder(&path).to_string();
        assert!(
            message.contains("name the folder that it is in"),
            "{message}"
        );
    }
}
