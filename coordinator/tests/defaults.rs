//! Jobs that say nothing of batch, length and epochs learn from little data, and runs are made longer where they can be.
#![cfg(feature = "single-node")]
#![allow(clippy::unwrap_used)]

mod support;

use std::process::Command;

use serde_json::Value;
use support::{Finished, Run, Site};

/// `coordinator start` of nothing but a model, data and a method.
fn start_plain(site: &Site, rows: usize, options: &[&str]) -> Finished {
    let text = std::fs::read_to_string(site.path("data.jsonl")).unwrap();
    let rows: String = text
        .lines()
        .take(rows)
        .map(|row| format!("{row}\n"))
        .collect();
    std::fs::write(site.path("few.jsonl"), rows).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_coordinator"));
    command
        .current_dir(site.folder.path())
        .args(["start", "--base_model", "model", "--dataset", "few.jsonl"])
        .args(["--adapter", "lora", "--single-node"])
        .args(options);
    Run::of(&mut command).end()
}

fn rates(site: &Site, output: &str) -> Vec<f64> {
    let steps = site.steps(output);
    steps
        .iter()
        .map(|step| step["learning_rate"].as_f64().unwrap())
        .collect()
}

#[test]
fn a_job_of_defaults_learns_from_a_few_rows() {
    let site = Site::new();
    for rows in [1, 20] {
        let output = format!("out-{rows}");
        let run = start_plain(&site, rows, &["--output-dir", &output]);
        assert!(run.status.success(), "{run:?}");
        assert!(run.stdout.contains("num_epochs 3"), "{run:?}");
        let rates = rates(&site, &output);
        assert!(rates.contains(&2e-4), "{rates:?}");
        let begins_at_once = rates[0] == 2e-4;
        assert_eq!(
            begins_at_once,
            rows == 1,
            "no warm-up in few steps: {rates:?}"
        );
        // A step at a learning rate of 0 leaves the weights as they are.
        let steps = site.steps(&output);
        for (pair, rate) in steps.windows(2).zip(&rates[1..]) {
            assert_ne!(
                pair[0]["weights_digest"], pair[1]["weights_digest"],
                "{rate}"
            );
        }
        // What was decided is what workers, record and the next start are told.
        let job = &site.json(&format!("{output}/run.json"))["job"];
        assert_eq!(job["num_epochs"], 3.0);
        assert!(job["sequence_len"].as_u64().unwrap() < 2048);
        let again = start_plain(&site, rows, &["--output-dir", &output]);
        assert!(again.stdout.contains("done already"), "{again:?}");
    }
}

#[test]
fn a_run_that_cannot_learn_does_not_begin() {
    let site = Site::new();
    let run = start_plain(
        &site,
        5,
        &[
            "--max_steps",
            "1",
            "--warmup_ratio",
            "0.03",
            "--output-dir",
            "out",
        ],
    );
    assert_eq!(run.status.code(), Some(3), "{run:?}");
    assert!(run.stderr.contains("nothing would be learned"), "{run:?}");
    assert!(run.stderr.contains("warmup_steps: 0"), "{run:?}");
    for rate in ["1e-300", "1e-40"] {
        let run = start_plain(&site, 5, &["--lr", rate, "--output-dir", "out"]);
        assert_eq!(run.status.code(), Some(3), "{run:?}");
        let said = format!("the learning rate is {rate} at most");
        assert!(run.stderr.contains(&said), "{run:?}");
    }
    assert!(!site.path("out/run.json").exists());
}

#[test]
fn a_run_with_a_constant_rate_is_made_longer_to_the_same_bits() {
    let site = Site::new();
    let constant = ["--lr_scheduler_type", "constant", "--save-steps", "2"];
    let whole = site.train("whole", &[&constant[..], &["--max-steps", "6"]].concat());
    site.train("out", &[&constant[..], &["--max-steps", "3"]].concat());
    let longer = [&constant[..], &["--single-node", "--max-steps", "6"]].concat();
    let run = Run::of(&mut site.start("out", &longer)).end();
    assert!(run.status.success(), "{run:?}");
    let said = "the run here has 6 steps now: it goes on after step 2";
    assert!(run.stdout.contains(said), "{run:?}");
    assert_eq!(site.digest("out"), whole);
    let steps = site.steps("out");
    let numbers: Vec<&Value> = steps.iter().map(|step| &step["step"]).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5, 6]);
    let again = Run::of(&mut site.start("out", &longer)).end();
    assert!(again.stdout.contains("done already"), "{again:?}");

    let shorter = [&constant[..], &["--single-node", "--max-steps", "4"]].concat();
    let run = Run::of(&mut site.start("out", &shorter)).end();
    assert_eq!(run.status.code(), Some(3), "{run:?}");
    assert!(
        run.stderr
            .contains("6 steps are done already, and it has 4"),
        "{run:?}"
    );
}

#[test]
fn a_falling_curve_says_why_it_cannot_be_made_longer() {
    let site = Site::new();
    site.train("out", &["--max-steps", "2"]);
    let run = Run::of(&mut site.start("out", &["--single-node", "--max-steps", "4"])).end();
    assert_eq!(run.status.code(), Some(3), "{run:?}");
    for words in [
        "(max_steps 2 there, 4 here), and it cannot go on as this one: ",
        "cosine the learning rate falls to 0",
        "another output_dir",
    ] {
        assert!(run.stderr.contains(words), "{run:?}");
    }
}
