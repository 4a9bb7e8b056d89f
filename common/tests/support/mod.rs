//! A small model folder to test with: a byte-level tokenizer with a few merges, made on the spot.
#![allow(clippy::unwrap_used, dead_code)]

use std::path::{Path, PathBuf};

use common::data::template::ChatTemplate;
use common::data::tokenize::{SpecialTokens, Tokenizer};
use serde_json::json;

pub const SPECIAL: [&str; 12] = [
    "<pad>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|User|>",
    "<|Assistant|>",
];

/// The characters that stand for bytes in byte-level vocabularies (GPT-2).
fn byte_letters() -> Vec<char> {
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut next = 256;
    (0..256)
        .map(|byte| {
            let code = if printable(byte) {
                byte
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).unwrap()
        })
        .collect()
}

/// Writes tokenizer.json, tokenizer_config.json and config.json.
pub fn write_model(dir: &Path, template: Option<&str>, eos: &str) {
    let mut vocabulary = serde_json::Map::new();
    for (id, text) in SPECIAL.iter().enumerate() {
        vocabulary.insert((*text).to_owned(), json!(id));
    }
    for letter in byte_letters() {
        let id = vocabulary.len();
        vocabulary.insert(letter.to_string(), json!(id));
    }
    let merges = [
        "h e", "l l", "he ll", "hell o", "Ġ a", "Ċ Ċ", "Ġ hello", "o k", "Ġ Ġ", "1 2",
    ];
    for merge in merges {
        let id = vocabulary.len();
        vocabulary.insert(merge.replace(' ', ""), json!(id));
    }
    let added: Vec<_> = SPECIAL
        .iter()
        .enumerate()
        .map(|(id, text)| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    let vocab_size = vocabulary.len();
    let tokenizer = json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
        "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": {"type": "Sequence", "processors": [
            {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            {"type": "TemplateProcessing",
             "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
             "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
             "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocabulary, "merges": merges},
    });
    let mut config = json!({"bos_token": "<s>", "eos_token": {"content": eos, "special": true}, "pad_token": "<pad>"});
    if let Some(template) = template {
        config["chat_template"] = json!(template);
    }
    let write = |name: &str, value: serde_json::Value| {
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

pub fn template_text(name: &str) -> String {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/templates");
    std::fs::read_to_string(folder.join(name).with_extension("jinja")).unwrap()
}

/// The tokenizer, and one of the templates in `templates/`.
pub fn model(template: &str, eos: &str) -> (Tokenizer, ChatTemplate) {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), None, eos);
    let special = SpecialTokens::from_pairs([("bos_token", "<s>"), ("eos_token", eos)]);
    let template = ChatTemplate::from_source(&template_text(template), &special, 0).unwrap();
    (Tokenizer::load(dir.path()).unwrap(), template)
}
