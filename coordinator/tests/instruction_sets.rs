//! Processors of any kind come to the same weights: a job with each set of instructions that this one has, alone and together.
#![cfg(feature = "single-node")]
#![allow(clippy::unwrap_used)]

mod support;

use common::instruction_set::InstructionSet;
use support::{Run, Site, free_port};

/// Not a test: what [`Site::join_in`] starts this binary for.
#[test]
#[ignore = "a worker, started by the tests"]
fn worker_process() {
    support::work();
}

const VARIABLE: &str = "MUSTER_ISA";

/// The names of those that this processor has.
fn sets() -> Vec<&'static str> {
    let all = InstructionSet::ALL.into_iter();
    all.filter(|set| set.is_there())
        .map(InstructionSet::name)
        .collect()
}

/// Computes a job with each set, on another number of threads each.
fn check(site: &Site, name: &str, job: &[&str]) {
    let mut found = Vec::new();
    for (set, threads) in sets().into_iter().zip(["1", "2", "3", "4"]) {
        let output = format!("{name}-{set}");
        let options = ["--single-node", "--threads", threads, "--max-steps", "3"];
        let options = [&options[..], job].concat();
        let run = Run::of(site.start(&output, &options).env(VARIABLE, set)).end();
        assert!(run.status.success(), "{set}: {run:?}");
        found.push((set, site.digest(&output)));
    }
    let (_, first) = &found[0];
    assert!(
        found.iter().all(|(_, digest)| digest == first),
        "{name}: {found:?}"
    );
}

#[test]
fn every_method_gives_the_same_weights_with_all_sets_of_instructions() {
    let site = Site::new();
    let bfloat16 = ["--set", "base_dtype=bfloat16"];
    let adapter = [
        "--set",
        "lora_dropout=0.1",
        "--set",
        "gradient_checkpointing=true",
    ];
    check(&site, "lora", &[]);
    check(&site, "lora-dropout", &adapter);
    check(&site, "lora-bfloat16", &bfloat16);
    check(
        &site,
        "lora-bfloat16-dropout",
        &[&bfloat16[..], &adapter].concat(),
    );
    check(&site, "lora-4bit", &["--set", "load_in_4bit=true"]);
    check(&site, "full", &["full"]);
    check(
        &site,
        "full-checkpointing",
        &["full", "--set", "gradient_checkpointing=true"],
    );
    check(&site, "full-bfloat16", &["full", "--set", "pure_bf16=true"]);
    check(&site, "full-muon", &["full", "--set", "optimizer=muon"]);
}

#[test]
fn workers_with_unlike_instructions_work_on_one_run() {
    let site = Site::new();
    for (name, dtype) in [("wide", "float32"), ("narrow", "bfloat16")] {
        let field = format!("base_dtype={dtype}");
        let quiet = site.train(&format!("{name}-quiet"), &["--set", &field]);
        let port = free_port();
        let listen = format!("127.0.0.1:{port}");
        let sets = sets();
        let count = sets.len().to_string();
        let options = [
            "--set",
            &field,
            "--listen",
            &listen,
            "--min-workers",
            &count,
        ];
        let run = Run::of(&mut site.start(name, &options));
        let workers: Vec<_> = sets
            .iter()
            .map(|set| site.join_in(&format!("{name}-{set}"), port, (VARIABLE, set)))
            .collect();
        let run = run.end();
        assert!(run.status.success(), "{run:?}");
        for mut worker in workers {
            assert!(worker.wait().success());
        }
        assert_eq!(site.digest(name), quiet, "{dtype}");
        assert_eq!(
            site.steps(name)[0]["workers"].as_u64(),
            Some(sets.len() as u64)
        );
    }
}

#[test]
fn instructions_that_are_not_there_are_refused_by_name() {
    let site = Site::new();
    let run = Run::of(site.start("out", &["--single-node"]).env(VARIABLE, "sse9")).end();
    assert!(!run.status.success(), "{run:?}");
    assert!(format!("{run:?}").contains("MUSTER_ISA is sse9"), "{run:?}");
}
