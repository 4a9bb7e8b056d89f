//! A worker that comes while others train, as real processes: it copies its state while they go on, and whether it gets
//! there or dies half-way, the weights are those of a quiet run.
#![cfg(all(target_os = "linux", feature = "single-node"))]
#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use serde_json::Value;
use support::{Process, Run, Site, free_port, work};

const STEPS: &str = "1500";
/// Done while the newcomer stands still in the midst of its state.
const MEANWHILE: usize = 12;

/// Not a test: what [`Site::join`] starts this binary for.
#[test]
#[ignore = "a worker, started by the tests"]
fn worker_process() {
    common::failpoint::arm().unwrap();
    work();
}

/// Waits until the process has stopped itself.
fn until_stopped(process: &Process) {
    let began = Instant::now();
    let path = format!("/proc/{}/stat", process.0.id());
    while !std::fs::read_to_string(&path).unwrap().contains(") T ") {
        assert!(began.elapsed() < Duration::from_secs(60), "it goes on");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// One worker trains, another comes and stands still as soon as a piece of its state has arrived; then `then`
/// happens to it. Gives back the steps.
fn train_with_a_newcomer(
    site: &Site,
    output: &str,
    then: impl FnOnce(&mut Process, u16),
) -> Vec<Value> {
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let mut run = Run::of(&mut site.start(output, &["--max-steps", STEPS, "--listen", &listen]));
    let mut steady = site.join(&format!("{output}-steady"), port);
    run.steps(2);
    let name = format!("{output}-late");
    let mut late = site.join_with(&name, port, "state-receive=stop");
    run.until("copies the state of");
    until_stopped(&late);
    run.steps(MEANWHILE);
    then(&mut late, port);
    let run = run.end();
    assert!(run.status.success(), "{run:?}");
    // Shown where the test fails.
    let is_notice = |line: &&str| !line.starts_with("step ");
    for line in run.stdout.lines().filter(is_notice) {
        println!("{line}");
    }
    assert!(steady.wait().success());
    late.wait();
    site.steps(output)
}

#[test]
fn the_others_go_on_while_a_newcomer_copies_its_state() {
    let site = Site::new();
    let quiet = site.train("quiet", &["--max-steps", STEPS]);

    let steps = train_with_a_newcomer(&site, "joined", |late, _| late.signal("-CONT"));
    assert_eq!(site.digest("joined"), quiet);
    let workers: Vec<u64> = steps
        .iter()
        .map(|s| s["workers"].as_u64().unwrap())
        .collect();
    assert!(
        workers.is_sorted() && workers.last() == Some(&2),
        "{workers:?}"
    );
    let generation = |step: Option<&Value>| step.unwrap()["generation"].as_u64().unwrap();
    // One change, when it enters.
    assert_eq!(generation(steps.last()), generation(steps.first()) + 1);

    let steps = train_with_a_newcomer(&site, "died", |late, _| late.kill());
    assert_eq!(site.digest("died"), quiet);
    assert!(steps.iter().all(|step| step["workers"] == 1));
    assert_eq!(generation(steps.first()), generation(steps.last()));

    // What it leaves behind keeps nobody out.
    let mut next = None;
    let steps = train_with_a_newcomer(&site, "followed", |late, port| {
        late.kill();
        next = Some(site.join("next", port));
    });
    assert!(next.unwrap().wait().success());
    assert_eq!(site.digest("followed"), quiet);
    assert_eq!(steps.last().unwrap()["workers"], 2);
}
