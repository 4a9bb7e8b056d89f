//! A model whose tokenizer is a `tokenizer.model` of SentencePiece alone.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::site::Site;

/// The shipped model with a small tokenizer of SentencePiece in place of its own.
fn site() -> Site {
    let site = Site::new();
    fs::remove_file(site.model("tokenizer.json")).unwrap();
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../common/tests/sentencepiece");
    fs::copy(models.join("bpe.model"), site.model("tokenizer.model")).unwrap();
    let config = json!({
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": true, "legacy": false,
        "chat_template": "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}",
    });
    fs::write(site.model("tokenizer_config.json"), config.to_string()).unwrap();
    site
}

#[test]
fn it_trains_and_the_result_answers_with_a_tokenizer_json() {
    let site = site();
    let output = site.run("start", &["--test-prompt=Who are you?"]);
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stdout);
    let made = "the tokenizer is made from tokenizer.model (SentencePiece, BPE of 420 pieces, as Transformers' LlamaTokenizer)";
    assert!(said.contains(made), "{said}");
    assert!(!said.contains("were not answered"), "{said}");
    let read = |name: &str| fs::read(site.path("out").join(name)).unwrap();
    let tokenizer: serde_json::Value = serde_json::from_slice(&read("tokenizer.json")).unwrap();
    assert_eq!(tokenizer["model"]["type"], "BPE");
    assert_eq!(
        read("tokenizer.model"),
        fs::read(site.model("tokenizer.model")).unwrap()
    );
    let config: serde_json::Value = serde_json::from_slice(&read("tokenizer_config.json")).unwrap();
    assert_eq!(config["eos_token"], "</s>");
    assert_eq!(config["tokenizer_class"], "LlamaTokenizer");
    assert!(!site.model("tokenizer.json").exists());
}

#[test]
fn one_that_is_damaged_or_of_another_model_is_refused() {
    let damaged = site();
    let whole = fs::read(damaged.model("tokenizer.model")).unwrap();
    fs::write(damaged.model("tokenizer.model"), &whole[..3000]).unwrap();
    damaged.refused(&[], &["tokenizer.model: ", "download it again"]);
    let ranks = site();
    fs::write(ranks.model("tokenizer.model"), "IQ== 0\nIg== 1\n").unwrap();
    ranks.refused(
        &[],
        &[
            "tokenizer.model: is a vocabulary of tiktoken",
            "save_pretrained",
        ],
    );
    let small = site();
    small.config(|config| config["vocab_size"] = json!(100));
    let random = ["--set", "init_weights=random", "--adapter", "full"];
    small.refused(&random, &["is outside the model's vocabulary of 100"]);
}
