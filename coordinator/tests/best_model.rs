//! Runs that keep their best weights: which those are, when the run ends, and that no crash changes either.
#![cfg(feature = "single-node")]
#![allow(clippy::unwrap_used)]

mod support;

use std::path::PathBuf;

use serde_json::{Value, json};
use support::{Process, Run, Site, free_port};

/// Not a test: what [`Site::join`] starts this binary for.
#[test]
#[ignore = "a worker, started by the tests"]
fn worker_process() {
    support::work();
}

/// A run whose loss falls, where the greatest is asked for: the first evaluation is the best, after two more the run ends.
const OPTIONS: &[&str] = &[
    "--max-steps",
    "40",
    "--eval-steps",
    "2",
    "--save-steps",
    "4",
    "--save-total-limit",
    "1",
    "--early-stopping-patience",
    "2",
    "--greater-is-better",
];

fn bytes(site: &Site, name: &str) -> Vec<u8> {
    std::fs::read(site.path(name)).unwrap()
}

fn checkpoints(site: &Site, output: &str) -> Vec<String> {
    let entries = std::fs::read_dir(site.path(output)).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names
        .filter(|name| name.starts_with("checkpoint-"))
        .collect();
    names.sort();
    names
}

/// Steps and losses of the evaluations on record.
fn evaluations(site: &Site, output: &str) -> Vec<(Value, Value)> {
    let text = std::fs::read_to_string(site.path(&format!("{output}/metrics.jsonl"))).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
    lines
        .filter(|line: &Value| line.get("eval_loss").is_some())
        .map(|line| (line["step"].clone(), line["eval_loss"].clone()))
        .collect()
}

/// Checks that the run ended as `quiet` did, with the same record, best checkpoint and result.
fn check_same(site: &Site, output: &str, quiet: &str) {
    assert_eq!(site.digest(output), site.digest(quiet), "{output}");
    assert_eq!(
        evaluations(site, output),
        evaluations(site, quiet),
        "{output}"
    );
    let steps = |output: &str| -> Vec<Value> {
        let steps = site.steps(output);
        steps
            .iter()
            .map(|step| step["weights_digest"].clone())
            .collect()
    };
    assert_eq!(steps(output), steps(quiet), "{output}");
    assert_eq!(
        checkpoints(site, output),
        checkpoints(site, quiet),
        "{output}"
    );
    for name in [
        "adapter_model.safetensors",
        "checkpoint-2/adapter_model.safetensors",
    ] {
        let (found, expected) = (format!("{output}/{name}"), format!("{quiet}/{name}"));
        assert_eq!(bytes(site, &found), bytes(site, &expected), "{found}");
    }
    let best = |output: &str| {
        let record = site.json(&format!("{output}/run.json"));
        ["step", "best_global_step", "best_metric", "stopped_early"]
            .map(|name| record[name].clone())
    };
    assert_eq!(best(output), best(quiet), "{output}");
}

#[test]
fn a_run_that_stops_early_leaves_its_best_checkpoint_as_the_result() {
    let site = Site::new();
    let digest = site.train("out", OPTIONS);
    let record = site.json("out/run.json");
    assert_eq!(
        (&record["step"], &record["total_steps"]),
        (&json!(6), &json!(40))
    );
    assert_eq!(record["stopped_early"], true);
    assert_eq!(record["best_global_step"], 2);
    let checkpoint: PathBuf = record["best_model_checkpoint"].as_str().unwrap().into();
    assert!(checkpoint.ends_with("checkpoint-2"));
    assert_eq!(
        site.json("out/checkpoint-2/manifest.json")["weights_digest"],
        digest.as_str()
    );
    for name in ["adapter_model.safetensors", "adapter_config.json"] {
        let best = bytes(&site, &format!("out/checkpoint-2/{name}"));
        assert_eq!(bytes(&site, &format!("out/{name}")), best, "{name}");
    }
    assert!(!site.path("out/optimizer.safetensors").exists());
    assert_eq!(
        checkpoints(&site, "out"),
        ["checkpoint-2", "checkpoint-6"],
        "the best beside the newest"
    );
    let state = site.json("out/trainer_state.json");
    assert_eq!(
        (&state["best_global_step"], &state["global_step"]),
        (&json!(2), &json!(6))
    );
    assert_eq!(state["best_metric"], record["best_metric"]);
    let counter = &state["stateful_callbacks"]["EarlyStoppingCallback"]["attributes"]["early_stopping_patience_counter"];
    assert_eq!(counter, 2);
    let losses = evaluations(&site, "out");
    assert_eq!(losses.len(), 3);
    assert_eq!(losses[0].1, record["best_metric"]);
    // It is done, and stays so.
    let again = Run::of(&mut site.start("out", &[&["--single-node"], OPTIONS].concat())).end();
    assert!(
        again.status.success() && again.stdout.contains("done already: step 6 of 40"),
        "{again:?}"
    );
    let more = [&["--local-workers", "3"], OPTIONS].concat();
    site.train("three", &more);
    check_same(&site, "three", "out");
}

#[test]
fn a_full_run_is_its_best_weights_too_and_another_set_judges_it() {
    let site = Site::new();
    std::fs::copy(site.path("data.jsonl"), site.path("eval.jsonl")).unwrap();
    let test_sets = ["--val-set-size", "0", "--eval-dataset", "eval.jsonl"];
    let best = [
        "--load-best-model-at-end",
        "--greater-is-better",
        "--eval-steps",
        "2",
    ];
    let options = [
        &["full", "--max-steps", "5", "--eval-on-start"],
        &test_sets[..],
        &best,
    ]
    .concat();
    site.train("out", &options);
    let record = site.json("out/run.json");
    assert_eq!(
        (&record["step"], &record["best_global_step"]),
        (&json!(5), &json!(2))
    );
    assert!(record.get("stopped_early").is_none(), "{record}");
    let steps: Vec<Value> = evaluations(&site, "out")
        .into_iter()
        .map(|(step, _)| step)
        .collect();
    assert_eq!(steps, [0, 2, 4, 5]);
    for name in ["model.safetensors", "config.json"] {
        let best = bytes(&site, &format!("out/checkpoint-2/{name}"));
        assert_eq!(bytes(&site, &format!("out/{name}")), best, "{name}");
    }
}

#[test]
fn the_split_test_is_what_is_evaluated_and_other_rows_in_it_make_another_run() {
    let site = Site::new();
    let rows = std::fs::read_to_string(site.path("data.jsonl")).unwrap();
    std::fs::create_dir(site.path("set")).unwrap();
    std::fs::write(site.path("set/train.jsonl"), &rows).unwrap();
    let three: String = rows.split_inclusive('\n').take(3).collect();
    std::fs::write(site.path("set/test.jsonl"), &three).unwrap();
    let short = [
        "--val-set-size",
        "0",
        "--max-steps",
        "1",
        "--set",
        "eval_steps=1",
    ];
    let named = [&short[..], &["--eval-dataset", "set"]].concat();
    site.train("named", &named);
    let test_set =
        |output: &str| site.json(&format!("{output}/run.json"))["job"]["test_datasets"][0].clone();
    assert_eq!(test_set("named")["split"], "test");
    let losses = evaluations(&site, "named");
    assert_eq!(losses.len(), 1);
    let again = Run::of(&mut site.start("named", &[&["--single-node"], &named[..]].concat())).end();
    assert!(again.stdout.contains("done already"), "{again:?}");
    let two: String = rows.split_inclusive('\n').take(2).collect();
    std::fs::write(site.path("set/test.jsonl"), &two).unwrap();
    let other = Run::of(&mut site.start("named", &[&["--single-node"], &named[..]].concat())).end();
    assert!(
        !other.status.success() && other.stderr.contains("data digest"),
        "{other:?}"
    );
}

#[test]
fn a_run_that_goes_on_elsewhere_from_a_checkpoint_knows_the_evaluations_before_it() {
    let site = Site::new();
    let quiet = site.train("quiet", OPTIONS);
    // It would have stopped at 6, and stops there; the checkpoint of the best weights comes along into the new folder.
    let options = [
        &["--single-node", "--resume", "quiet/checkpoint-6"],
        OPTIONS,
    ]
    .concat();
    let run = Run::of(&mut site.start("out", &options)).end();
    assert!(run.status.success(), "{run:?}");
    assert!(
        run.stdout.contains(
            "the weights after step 2, the best so far, are copied from quiet/checkpoint-2"
        ),
        "{run:?}"
    );
    let record = site.json("out/run.json");
    assert_eq!(
        (&record["step"], &record["stopped_early"]),
        (&json!(6), &json!(true))
    );
    assert_eq!(
        record["best_metric"],
        site.json("quiet/run.json")["best_metric"]
    );
    assert_eq!(site.digest("out"), quiet);
    let named = |file: &str| site.json(file)["best_model_checkpoint"].clone();
    assert_eq!(named("out/run.json"), "out/checkpoint-2");
    assert_eq!(named("out/trainer_state.json"), "out/checkpoint-2");
    assert_eq!(site.json("out/trainer_state.json")["global_step"], 6);
    assert!(site.path("out/checkpoint-2/manifest.json").exists());
    // From the best weights themselves it comes to the same end.
    let options = ["--resume", "quiet/checkpoint-2"];
    site.train("again", &[&options[..], OPTIONS].concat());
    let record = site.json("again/run.json");
    assert_eq!(
        (&record["step"], &record["best_global_step"]),
        (&json!(6), &json!(2))
    );
    let last = &evaluations(&site, "again")[..];
    assert_eq!(last, evaluations(&site, "quiet"));
    // Where they are gone, no record names their checkpoint.
    std::fs::remove_dir_all(site.path("quiet/checkpoint-2")).unwrap();
    let run = Run::of(
        &mut site.start(
            "without",
            &[
                &["--single-node", "--resume", "quiet/checkpoint-6"],
                OPTIONS,
            ]
            .concat(),
        ),
    )
    .end();
    assert!(
        run.status.success() && run.stdout.contains("has no sound checkpoint of them"),
        "{run:?}"
    );
    assert_ne!(site.digest("without"), quiet);
    assert_eq!(named("without/run.json"), Value::Null);
    assert_eq!(named("without/trainer_state.json"), Value::Null);
}

#[test]
fn a_result_that_was_removed_is_made_again() {
    let site = Site::new();
    let digest = site.train("out", OPTIONS);
    let result = bytes(&site, "out/adapter_model.safetensors");
    let options = [&["--single-node"], OPTIONS].concat();
    for checkpoints_too in [false, true] {
        std::fs::remove_file(site.path("out/adapter_model.safetensors")).unwrap();
        if checkpoints_too {
            for name in checkpoints(&site, "out") {
                std::fs::remove_dir_all(site.path(&format!("out/{name}"))).unwrap();
            }
        }
        let run = Run::of(&mut site.start("out", &options)).end();
        assert!(
            run.status.success()
                && run.stdout.contains(
                    "this job was done, but out/adapter_model.safetensors is not there any more"
                ),
            "{run:?}"
        );
        assert_eq!(site.digest("out"), digest);
        assert_eq!(bytes(&site, "out/adapter_model.safetensors"), result);
    }
    let again = Run::of(&mut site.start("out", &options)).end();
    assert!(
        again.stdout.contains("done already: step 6 of 40"),
        "{again:?}"
    );
}

#[cfg(unix)]
#[test]
fn a_process_that_dies_anywhere_comes_to_the_same_end_and_the_same_best_weights() {
    let site = Site::new();
    site.train("quiet", OPTIONS);
    let options = [&["--single-node"], OPTIONS].concat();
    for (number, failpoint) in [
        "evaluate:1",
        "evaluation-recorded:1",
        "checkpoint-write:2",
        "evaluation-recorded:3",
        "result-from-best",
        "result-write:2",
        "result-recorded",
    ]
    .into_iter()
    .enumerate()
    {
        let output = format!("out-{number}");
        let mut start = site.start(&output, &options);
        let died = Run::of(start.env("MUSTER_FAILPOINT", failpoint)).end();
        assert!(!died.status.success(), "{failpoint}: {died:?}");
        site.train(&output, OPTIONS);
        check_same(&site, &output, "quiet");
    }
}

#[cfg(unix)]
#[test]
fn workers_that_outlive_the_coordinator_go_on_to_the_same_end() {
    let site = Site::new();
    site.train("quiet", OPTIONS);
    for failpoint in [
        "evaluate:2",
        "evaluation-recorded:1",
        "evaluation-recorded:3",
    ] {
        let output = failpoint.replace(':', "-");
        let port = free_port();
        let listen = format!("127.0.0.1:{port}");
        let options = [&["--listen", &listen, "--min-workers", "2"], OPTIONS].concat();
        let mut start = site.start(&output, &options);
        let run = Run::of(start.env("MUSTER_FAILPOINT", failpoint));
        let names = ["one", "two"].map(|name| format!("{output}-{name}"));
        let mut workers: Vec<Process> = names.iter().map(|name| site.join(name, port)).collect();
        let died = run.end();
        assert!(!died.status.success(), "{failpoint}: {died:?}");
        let run = Run::of(&mut site.start(&output, &options)).end();
        assert!(run.status.success(), "{failpoint}: {run:?}");
        for worker in &mut workers {
            assert!(worker.wait().success(), "{failpoint}");
        }
        check_same(&site, &output, "quiet");
    }
}
