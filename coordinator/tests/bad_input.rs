//! Bad input: a clear line on stderr, the right exit code, and nothing lost.
#![cfg(feature = "single-node")]
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;

use support::{Finished, Run, Site};

fn start(site: &Site, options: &[&str]) -> Finished {
    let options = [&["--single-node"], options].concat();
    Run::of(&mut site.start("out", &options)).end()
}

/// Every line of the error names one problem; one of them holds all of `words`.
fn check(run: &Finished, code: i32, words: &[&str]) {
    assert_eq!(run.status.code(), Some(code), "{run:?}");
    let says = |line: &str| words.iter().all(|word| line.contains(word));
    assert!(run.stderr.lines().any(says), "{words:?} in {run:?}");
    assert!(!run.stderr.contains("panicked"), "{run:?}");
}

#[test]
fn a_job_that_is_not_well_written_is_exit_code_2() {
    let site = Site::new();
    let run = start(&site, &["--set", "lerning_rate=1"]);
    check(&run, 2, &["lerning_rate", "learning_rate"]);
    let run = start(&site, &["--set", "num_epochs=often"]);
    check(&run, 2, &["num_epochs"]);
    assert!(!site.path("out").exists());
}

#[test]
fn a_failpoint_that_does_not_exist_is_exit_code_2() {
    let site = Site::new();
    let mut command = site.start("out", &["--single-node"]);
    let run = Run::of(command.env("MUSTER_FAILPOINT", "comit:3")).end();
    check(&run, 2, &["MUSTER_FAILPOINT", "comit", "commit"]);
    assert!(!site.path("out").exists());
}

#[test]
fn a_device_that_is_not_there_is_said_before_anything_is_done() {
    let site = Site::new();
    check(
        &start(&site, &["--device", "gpu"]),
        2,
        &["\"gpu\"", "cuda:N"],
    );
    // Without GPUs in the program, or without this one in the machine.
    check(&start(&site, &["--device", "cuda:99"]), 3, &["cuda"]);
    let run = start(&site, &["--device", "cpu,cpu", "--local-workers", "1"]);
    check(&run, 2, &["2 devices", "1 workers", "--local-workers"]);
    assert!(!site.path("out").exists());
}

#[test]
fn bad_data_is_exit_code_3_and_names_file_and_line() {
    let site = Site::new();
    let good = fs::read_to_string(site.path("data.jsonl")).unwrap();
    let with = |row: &str| format!("{}\n{row}\n", good.lines().next().unwrap());
    let role = r#"{"messages":[{"role":"usr","content":"x"},{"role":"assistant","content":"y"}]}"#;
    for (content, words) in [
        (String::new(), vec!["data.jsonl", "empty"]),
        (with("{\"messages\": ["), vec!["data.jsonl", "2"]),
        (with(r#"{"txet": "x"}"#), vec!["data.jsonl", "2", "txet"]),
        (with(role), vec!["data.jsonl", "2", "usr", "user"]),
    ] {
        fs::write(site.path("data.jsonl"), content).unwrap();
        check(&start(&site, &[]), 3, &words);
    }
    fs::remove_file(site.path("data.jsonl")).unwrap();
    check(&start(&site, &[]), 3, &["data.jsonl"]);
}

#[test]
fn a_bad_model_folder_is_exit_code_3() {
    let site = Site::new();
    let change = |name: &str, change: &dyn Fn(Vec<u8>) -> Option<Vec<u8>>, words: &[&str]| {
        let path = site.path("model").join(name);
        let original = fs::read(&path).unwrap();
        match change(original.clone()) {
            Some(bytes) => fs::write(&path, bytes).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        check(&start(&site, &[]), 3, words);
        fs::write(&path, original).unwrap();
    };
    change("tokenizer.json", &|_| None, &["tokenizer"]);
    change("config.json", &|_| None, &["config.json"]);
    let cut = |bytes: Vec<u8>| Some(bytes[..bytes.len() - 100].to_vec());
    change(
        "model.safetensors",
        &cut,
        &["model.safetensors", "truncated"],
    );
    let other = |bytes: Vec<u8>| {
        let text = String::from_utf8(bytes).unwrap();
        Some(text.replace("Qwen3ForCausalLM", "BartModel").into_bytes())
    };
    change("config.json", &other, &["BartModel", "LlamaForCausalLM"]);
    let raises = |_| {
        let template = "{{ raise_exception('no such role') }}";
        Some(
            serde_json::json!({"chat_template": template})
                .to_string()
                .into_bytes(),
        )
    };
    change("tokenizer_config.json", &raises, &["no such role"]);
}

#[test]
fn the_output_folder_of_another_job_is_refused_and_kept() {
    let site = Site::new();
    let digest = site.train("out", &["--max-steps", "1"]);
    let run = start(&site, &["--max-steps", "1", "--seed", "7"]);
    check(&run, 3, &["out", "another job"]);
    assert_eq!(site.digest("out"), digest);
}

#[test]
fn a_port_in_use_is_said_before_anything_else() {
    let site = Site::new();
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = holder.local_addr().unwrap().to_string();
    let run = start(&site, &["--listen", &address]);
    check(&run, 1, &[&address, "in use"]);
    assert!(!site.path("out").exists());
}

#[test]
fn a_damaged_checkpoint_is_named_and_passed_over() {
    let site = Site::new();
    let options = [
        "--single-node",
        "--max-steps",
        "100",
        "--set",
        "save_steps=2",
    ];
    let mut run = Run::of(&mut site.start("out", &options));
    run.steps(6).process.signal("-INT");
    assert_eq!(run.end().status.code(), Some(130));
    let mut steps: Vec<u64> = fs::read_dir(site.path("out"))
        .unwrap()
        .filter_map(|entry| {
            let name = entry.unwrap().file_name().into_string().unwrap();
            name.strip_prefix("checkpoint-")?.parse().ok()
        })
        .collect();
    steps.sort();
    let newest = steps[steps.len() - 1];
    let damaged = site.path(&format!("out/checkpoint-{newest}/optimizer.safetensors"));
    let mut bytes = fs::read(&damaged).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&damaged, bytes).unwrap();
    let run = Run::of(&mut site.start("out", &options)).end();
    assert!(run.status.success(), "{run:?}");
    assert!(
        run.stdout
            .contains(&format!("checkpoint-{newest} is passed over")),
        "{run:?}"
    );
    let quiet = site.train("quiet", &options[1..]);
    assert_eq!(site.digest("out"), quiet);
}
