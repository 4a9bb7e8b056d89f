//! Tokens that a job adds: the result knows them, whoever trained, and answers with them.
#![cfg(feature = "single-node")]
#![allow(clippy::unwrap_used)]

mod support;

use std::process::Command;

use serde_json::{Value, json};
use support::{Run, Site, free_port};

/// Not a test: what [`Site::join`] starts this binary for.
#[test]
#[ignore = "a worker, started by the tests"]
fn worker_process() {
    support::work();
}

/// Answers that end with a token which the tokenizer does not have.
fn site() -> Site {
    let site = Site::new();
    let row = |n: usize| {
        let text = format!("<|count|> {n} and {}", n + 1);
        json!({"prompt": format!("Say {n}."), "completion": text}).to_string() + "\n"
    };
    let rows: String = (0..40).map(row).collect();
    std::fs::write(site.path("data.jsonl"), rows).unwrap();
    site
}

const OPTIONS: [&str; 4] = [
    "--tokens",
    "<|count|>,<|unused|>",
    "--set",
    "special_tokens={eos_token: <|done|>}",
];

fn last_id(tokenizer: &Value) -> u64 {
    let added = tokenizer["added_tokens"].as_array().unwrap();
    added.last().unwrap()["id"].as_u64().unwrap()
}

fn rows_of_embedding(site: &Site, file: &str, name: &str) -> Vec<usize> {
    let file = common::files::tensors::TensorFile::open(&site.path(file)).unwrap();
    file.get(name).unwrap().shape.to_vec()
}

#[test]
fn an_adapter_has_the_rows_of_the_tokens_that_the_job_adds() {
    let site = site();
    let rows = site.json("model/config.json")["vocab_size"]
        .as_u64()
        .unwrap();
    let digest = site.train("out", &OPTIONS);
    let tokenizer = site.json("out/tokenizer.json");
    let texts: Vec<&Value> = tokenizer["added_tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|token| &token["content"])
        .collect();
    assert!(texts.ends_with(&[
        &json!("<|done|>"),
        &json!("<|count|>"),
        &json!("<|unused|>")
    ]));
    let last = last_id(&tokenizer);
    let config = site.json("out/adapter_config.json");
    let indices = &config["trainable_token_indices"];
    assert_eq!(*indices, json!([last - 2, last - 1, last]));
    assert_eq!(
        site.json("out/tokenizer_config.json")["eos_token"],
        "<|done|>"
    );
    let name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta";
    let shape = rows_of_embedding(&site, "out/adapter_model.safetensors", name);
    assert_eq!(shape[0], 3);
    assert!(last + 1 > rows, "the model has rows for them already");

    // Two workers in processes of their own: the same weights.
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let mut options = vec!["--min-workers", "2", "--listen", &listen];
    options.extend(OPTIONS);
    let run = Run::of(&mut site.start("two", &options));
    let workers = [site.join("a", port), site.join("b", port)];
    let run = run.end();
    assert!(run.status.success(), "{run:?}");
    drop(workers);
    assert_eq!(site.digest("two"), digest);
}

#[test]
fn a_run_with_new_tokens_goes_on_where_it_was_stopped() {
    let site = site();
    let digest = site.train("whole", &OPTIONS);
    let mut options = vec!["--single-node", "--set", "save_steps=1"];
    options.extend(OPTIONS);
    let mut run = Run::of(&mut site.start("out", &options));
    run.steps(2).process.kill();
    run.end();
    let run = Run::of(&mut site.start("out", &options)).end();
    assert!(run.status.success(), "{run:?}");
    assert_eq!(site.digest("out"), digest);
}

#[test]
fn a_model_that_is_trained_as_a_whole_has_a_row_for_each_new_token() {
    let site = site();
    let mut options = vec!["full", "--test-prompt", "Say 7 <|count|>."];
    options.extend(OPTIONS);
    options.insert(0, "--single-node");
    let run = Run::of(&mut site.start("out", &options)).end();
    assert!(run.status.success(), "{run:?}");
    assert!(
        !run.stdout.contains("were not answered") && run.stdout.contains("3 tokens added: "),
        "{run:?}"
    );
    let last = last_id(&site.json("out/tokenizer.json"));
    assert_eq!(site.json("out/config.json")["vocab_size"], last + 1);
    let shape = rows_of_embedding(&site, "out/model.safetensors", "model.embed_tokens.weight");
    assert_eq!(shape[0] as u64, last + 1);
    // It is a model like any other.
    site.train(
        "again",
        &["full", "--set", "base_model=out", "--max-steps", "1"],
    );
}

#[test]
fn an_adapter_with_new_tokens_is_gone_on_from() {
    let site = site();
    site.train("first", &OPTIONS);
    let start = ["--set", "lora_model_dir=first"];
    let digest = site.train("second", &[&start[..], &OPTIONS].concat());
    let loss = |output: &str| site.steps(output)[0]["loss"].as_f64().unwrap();
    assert!(loss("second") < loss("first"));
    // What its tokenizer calls its rows, they stay, whatever the job names.
    let eos = ["--set", "special_tokens={eos_token: <|done|>}"];
    assert_eq!(site.train("bare", &[&start[..], &eos].concat()), digest);
    let other_order = [&start[..], &["--tokens", "<|unused|>,<|count|>"], &eos].concat();
    assert_eq!(site.train("order", &other_order), digest);
    let more = [&["--single-node"], &start[..], &["--tokens", "<|more|>"]].concat();
    let run = Run::of(&mut site.start("more", &more)).end();
    let expected = "the adapter of lora_model_dir has no row for \"<|more|>\"";
    assert!(
        run.status.code() == Some(3) && run.stderr.contains(expected),
        "{run:?}"
    );
}

#[test]
fn tokens_in_reserve_get_the_names_that_the_job_has_for_them() {
    let site = site();
    let row = json!({"text": "<|begin|> 1 and 2"}).to_string() + "\n";
    std::fs::write(site.path("data.jsonl"), row.repeat(20)).unwrap();
    let renamed = ["--set", "added_tokens_overrides={1: <|begin|>}"];
    let prompt = ["--test-prompt", "<|begin|>"];
    let options = [&["--single-node"], &renamed[..], &prompt].concat();
    let run = Run::of(&mut site.start("out", &options)).end();
    assert!(run.status.success(), "{run:?}");
    let told = "1 token renamed: <|begin|> (id 1); the rows are as they are in the model";
    assert!(
        run.stdout.contains(told) && !run.stdout.contains("were not answered"),
        "{run:?}"
    );
    let spelt_out = "the chat template writes <|im_start|>, which is no token any more";
    assert!(run.stdout.contains(spelt_out), "{run:?}");
    let tokenizer = site.json("out/tokenizer.json");
    assert_eq!(tokenizer["added_tokens"][1]["content"], "<|begin|>");
    assert_eq!(tokenizer["added_tokens"][2]["content"], "<|im_end|>");
    // Without them the text is several tokens, and the weights are others.
    let digest = site.digest("out");
    assert_ne!(site.train("plain", &[]), digest);
    // What was trained before goes on under the names that it has.
    assert_eq!(site.train("again", &renamed), digest);
}

#[test]
fn what_cannot_be_trained_of_tokens_is_told_before_anything_starts() {
    let site = site();
    let check = |options: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_coordinator"));
        command.current_dir(site.folder.path());
        command.args(["check", "--base-model", "model", "--dataset", "data.jsonl"]);
        let output = command
            .args(["--adapter", "lora"])
            .args(options)
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let rows = site.json("model/config.json")["vocab_size"].clone();
    for (options, expected) in [
        (
            ["--set", "trainable_token_indices=[100000]"],
            format!(
                "trainable_token_indices has the id 100000, and the model has rows for ids below {rows}"
            ),
        ),
        (
            [
                "--set",
                "trainable_token_indices={embed_tokens: [1], lm_head: [2]}",
            ],
            "trainable_token_indices has to name the same tokens for embed_tokens and lm_head"
                .to_owned(),
        ),
        (
            ["--tokens=<|a|>", "--lora-modules-to-save=lm_head"],
            "lora_modules_to_save makes two of it, of which both or neither have to be named"
                .to_owned(),
        ),
        (
            ["--set", "added_tokens_overrides={100000: <|a|>}"],
            "added_tokens_overrides: 100000 is the id of no added token".to_owned(),
        ),
        (
            ["--set", "added_tokens_overrides={2: <|a|>}"],
            "added_tokens_overrides: 2 is the eos_token of this tokenizer".to_owned(),
        ),
        (
            ["--eos-token", "<|nowhere|>"],
            "eos_token: <|nowhere|> is no token of this tokenizer".to_owned(),
        ),
    ] {
        let (code, said) = check(&options);
        assert!(
            code == Some(3) && said.contains(&expected),
            "{code:?} {said}"
        );
    }
}
