//! Model folders with a `tokenizer.model` and no `tokenizer.json`: their tokens are those that Transformers gives
//! (sentencepiece/golden.json, made by make_golden.py beside it), and so are those of a copy.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use common::data::tokenize::{SpecialTokens, Tokenizer};
use common::files::model::{ModelFolder, ModelTensor, Scalars, write_model};
use common::files::tensors::Dtype;
use common::job::InitWeights;
use serde_json::{Value, json};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sentencepiece")
}

fn golden() -> Value {
    let text = std::fs::read(folder().join("golden.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

/// A folder with one of the models here, and JSON files beside it.
fn with_files(model: &str, files: &Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let from = folder().join(format!("{model}.model"));
    std::fs::copy(from, dir.path().join("tokenizer.model")).unwrap();
    for (name, content) in files.as_object().unwrap() {
        std::fs::write(dir.path().join(name), content.to_string()).unwrap();
    }
    dir
}

fn ids(json: &Value) -> Vec<u32> {
    let ids = json.as_array().unwrap().iter();
    ids.map(|id| id.as_u64().unwrap().try_into().unwrap())
        .collect()
}

fn check(tokenizer: &Tokenizer, texts: &[Value], case: &Value) {
    for (text, expected) in texts.iter().zip(case["texts"].as_array().unwrap()) {
        let (name, text) = (&case["name"], text.as_str().unwrap());
        let plain = tokenizer.encode(text, false).unwrap();
        assert_eq!(plain.ids, ids(&expected[0]), "{name}: {text:?}");
        let around = tokenizer.encode(text, true).unwrap();
        assert_eq!(around.ids, ids(&expected[1]), "{name}: {text:?}");
        assert_eq!(
            tokenizer.decode(&plain.ids).unwrap(),
            expected[2].as_str().unwrap(),
            "{name}: {text:?}"
        );
        // Tokens are found in the text by these.
        let ends = plain.offsets.iter().map(|range| range.end);
        assert!(
            ends.clone().all(|end| text.is_char_boundary(end)),
            "{name}: {text:?}"
        );
        assert!(ends.is_sorted(), "{name}: {text:?} {:?}", plain.offsets);
    }
}

#[test]
fn tokens_and_texts_are_those_of_transformers() {
    let golden = golden();
    let texts = golden["texts"].as_array().unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() >= 20 && texts.len() >= 30);
    for case in cases {
        let dir = with_files(case["model"].as_str().unwrap(), &case["files"]);
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        check(&tokenizer, texts, case);
        let special = SpecialTokens::load(dir.path()).unwrap();
        for (name, text) in case["special"].as_object().unwrap() {
            // Names of one model alone are not among ours.
            if name != "image_token" {
                assert_eq!(special.get(name), text.as_str(), "{}", case["name"]);
            }
        }
    }
}

#[test]
fn a_copy_has_a_tokenizer_json_with_the_same_tokens() {
    let golden = golden();
    let texts = golden["texts"].as_array().unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let dir = with_files(case["model"].as_str().unwrap(), &case["files"]);
        let own = Tokenizer::load(dir.path()).unwrap();
        assert!(own.made_from().unwrap().contains("tokenizer.model"));
        let model = as_model(dir.path());
        let to = tempfile::tempdir().unwrap();
        model.copy_tokenizer_files(to.path(), None).unwrap();
        let copy = Tokenizer::load(to.path()).unwrap();
        assert_eq!(copy.made_from(), None);
        check(&copy, texts, case);
        assert_eq!(copy.special_ids(), own.special_ids(), "{}", case["name"]);
        let read = |name: &str| std::fs::read(to.path().join(name)).unwrap();
        let config: Value = serde_json::from_slice(&read("tokenizer_config.json")).unwrap();
        let listed = config["added_tokens_decoder"].as_object().unwrap();
        let expected = case["added"].as_array().unwrap();
        assert_eq!(listed.len(), expected.len(), "{}: {config}", case["name"]);
        for token in expected {
            let found = &listed[&token[0].to_string()];
            assert_eq!(found["content"], token[1], "{}", case["name"]);
            assert_eq!(found["special"], token[2], "{}", case["name"]);
        }
        assert_eq!(
            read("tokenizer.model").len(),
            std::fs::metadata(dir.path().join("tokenizer.model"))
                .unwrap()
                .len() as usize
        );
    }
}

/// The folder with weights, as one that is trained.
fn as_model(dir: &Path) -> ModelFolder {
    let tensors = [ModelTensor {
        name: "a",
        shape: &[1],
        scalars: Scalars::Here(&[0.5]),
    }];
    let config = json!({"architectures": ["LlamaForCausalLM"]});
    let kept = std::fs::read(dir.join("config.json")).unwrap();
    write_model(dir, &config, &tensors, Dtype::F32, 1 << 20).unwrap();
    let model = ModelFolder::open(dir, InitWeights::Pretrained).unwrap();
    std::fs::write(dir.join("config.json"), kept).unwrap();
    model
}

#[test]
fn a_class_that_is_made_otherwise_is_refused() {
    for (class, words) in [
        ("T5Tokenizer", ["T5Tokenizer", "save_pretrained"]),
        (
            "CodeLlamaTokenizerFast",
            ["CodeLlamaTokenizer", "save_pretrained"],
        ),
    ] {
        let files = json!({
            "config.json": {"model_type": "llama"}, "tokenizer_config.json": {"tokenizer_class": class}
        });
        let error = Tokenizer::load(with_files("bpe", &files).path()).unwrap_err();
        let error = error.to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
}

#[test]
fn files_beside_it_that_are_of_another_tokenizer_are_named() {
    let config = |config: Value| json!({"tokenizer_config.json": config});
    let token =
        |id: &str, text: &str| config(json!({"added_tokens_decoder": {id: {"content": text}}}));
    for (files, words) in [
        (token("9", "<n>"), ["\"<n>\"", "it has 9"]),
        (token("x", "<n>"), ["added_tokens_decoder", "\"x\""]),
        (
            config(json!({"added_tokens_decoder": 3})),
            ["added_tokens_decoder", "no"],
        ),
        (
            config(json!({"extra_special_tokens": 3})),
            ["extra_special_tokens", "is 3"],
        ),
        (
            config(json!({"extra_special_tokens": [3]})),
            ["extra_special_tokens", "has 3"],
        ),
        (
            json!({"added_tokens.json": {"<n>": -1}}),
            ["added_tokens.json", "\"<n>\""],
        ),
        (
            json!({"added_tokens.json": []}),
            ["added_tokens.json", "object"],
        ),
    ] {
        let files = match files {
            Value::Object(mut files) => {
                // The make that renames nothing.
                let class = json!({"tokenizer_class": "LlamaTokenizer", "model_type": "llama"});
                files.insert("config.json".to_owned(), class);
                Value::Object(files)
            }
            other => other,
        };
        let error = Tokenizer::load(with_files("bpe", &files).path()).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("tokenizer.model: "), "{error}");
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
}

#[test]
fn a_damaged_file_is_refused_wherever_it_ends() {
    let whole = std::fs::read(folder().join("unigram.model")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.model");
    let last = whole.len() - 200;
    for end in (0..last).step_by(37) {
        std::fs::write(&path, &whole[..end]).unwrap();
        let error = Tokenizer::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer.model: "), "{end}: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
    // What was changed inside may still be a model, and is read without a panic then.
    for at in (0..whole.len()).step_by(11) {
        let mut changed = whole.clone();
        changed[at] ^= 0x55;
        std::fs::write(&path, &changed).unwrap();
        if let Ok(tokenizer) = Tokenizer::load(dir.path()) {
            tokenizer
                .encode("the river e\u{301} \u{fb01}n\u{2026}", true)
                .ok();
        }
    }
}

#[test]
fn files_of_other_programs_are_told_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let error = || Tokenizer::load(dir.path()).unwrap_err().to_string();
    write("tekken.json", "{}");
    let message = error();
    assert!(
        message.contains("has no tokenizer.json, and its tekken.json is not read"),
        "{message}"
    );
    assert!(message.contains("save_pretrained"), "{message}");
    for (text, words) in [
        ("IQ== 0\nIg== 1\n", ["tiktoken", "save_pretrained"]),
        (
            "{\"config\": {}}",
            ["no SentencePiece model", "save_pretrained"],
        ),
        (
            "version https://git-lfs.github.com/spec/v1\n",
            ["Git LFS", "git lfs pull"],
        ),
        ("", ["has no pieces", "tokenizer.model"]),
    ] {
        write("tokenizer.model", text);
        let message = error();
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    }
}
