//! A small model folder to test with: a byte-level BPE tokenizer with ten merges (`<s>` is put before plain text), and the
//! templates of `templates/`.
#![allow(clippy::unwrap_used, dead_code)]

use std::path::{Path, PathBuf};

use common::data::template::ChatTemplate;
use common::data::tokenize::{SpecialTokens, Tokenizer};
use serde_json::{Value as Json, json};

/// Writes tokenizer.json, tokenizer_config.json and config.json.
pub fn write_model(dir: &Path, template: Option<&str>, eos: &str) {
    let tokenizer: Json = serde_json::from_str(&read("tokenizer.json")).unwrap();
    let vocab_size = tokenizer["model"]["vocab"].as_object().unwrap().len();
    let mut config = json!({"bos_token": "<s>", "eos_token": {"content": eos, "special": true}, "pad_token": "<pad>"});
    if let Some(template) = template {
        config["chat_template"] = json!(template);
    }
    let write = |name: &str, value: Json| {
        std::fs::write(dir.join(name), value.to_string()).unwrap();
    };
    write("tokenizer.json", tokenizer);
    write("tokenizer_config.json", config);
    write(
        "config.json",
        json!({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": vocab_size,
               "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
               "num_key_value_heads": 1, "head_dim": 4, "tie_word_embeddings": true,
               "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}),
    );
}

fn read(name: &str) -> String {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/templates");
    std::fs::read_to_string(folder.join(name)).unwrap()
}

pub fn template_text(name: &str) -> String {
    read(&format!("{name}.jinja"))
}

pub fn golden() -> Json {
    serde_json::from_str(&read("golden.json")).unwrap()
}

pub fn tokenizer(eos: &str) -> Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), None, eos);
    Tokenizer::load(dir.path()).unwrap()
}

/// The tokenizer, and one of the templates in `templates/`.
pub fn model(template: &str, eos: &str) -> (Tokenizer, ChatTemplate) {
    let special = SpecialTokens::from_pairs([("bos_token", "<s>"), ("eos_token", eos)]);
    let template = ChatTemplate::from_source(&template_text(template), &special, 0).unwrap();
    (tokenizer(eos), template)
}
