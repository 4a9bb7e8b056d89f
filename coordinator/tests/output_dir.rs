//! Output folders that somebody damages or removes: what is beside the damage counts, and nothing is lost without a word.
#![cfg(feature = "single-node")]
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;

use support::{Run, Site};

const STEPS: [&str; 2] = ["--max-steps", "300"];

/// Not a test: what [`Site::join`] starts this binary for.
#[test]
#[ignore = "a worker, started by the tests"]
fn worker_process() {
    support::work();
}

#[test]
fn a_damaged_run_json_keeps_no_run_from_going_on() {
    let site = Site::new();
    let quiet = site.train("quiet", &STEPS);
    let options = [&["--single-node"][..], &STEPS].concat();
    let mut run = Run::of(&mut site.start("out", &options));
    run.steps(5).process.signal("-TERM");
    assert_eq!(run.end().status.code(), Some(75));

    let record = site.path("out/run.json");
    let whole = fs::read(&record).unwrap();
    fs::write(&record, &whole[..whole.len() / 2]).unwrap();
    let again = Run::of(&mut site.start("out", &options)).end();
    assert!(again.status.success(), "{again:?}");
    assert!(
        again.stdout.contains("run.json is damaged"),
        "{}",
        again.stdout
    );
    assert_eq!(site.digest("out"), quiet);
    assert_eq!(site.steps("out").len(), 300);
}

#[test]
fn a_damaged_run_json_of_another_job_is_not_written_over() {
    let site = Site::new();
    let options = [&["--single-node"][..], &STEPS].concat();
    let mut run = Run::of(&mut site.start("out", &options));
    run.steps(5).process.signal("-TERM");
    assert_eq!(run.end().status.code(), Some(75));

    fs::write(site.path("out/run.json"), "{").unwrap();
    let other = [&options[..], &["--set", "seed=7"]].concat();
    let other = Run::of(&mut site.start("out", &other)).end();
    assert_eq!(other.status.code(), Some(3), "{other:?}");
    assert!(
        other.stderr.contains("run.json is not a run record"),
        "{other:?}"
    );
    assert_eq!(fs::read(site.path("out/run.json")).unwrap(), b"{");
}

#[test]
fn an_output_dir_that_is_removed_stops_the_run_which_goes_on_with_the_next_start() {
    let site = Site::new();
    let quiet = site.train("quiet", &STEPS);
    let options = [&["--single-node"][..], &STEPS].concat();
    let mut run = Run::of(&mut site.start("out", &options));
    run.steps(5);
    fs::remove_dir_all(site.path("out")).unwrap();
    let run = run.end();
    assert_eq!(run.status.code(), Some(75), "{run:?}");
    let said = "output_dir out was removed or renamed while the run goes on";
    assert_eq!(run.stdout.matches(said).count(), 1, "{run:?}");
    assert!(run.stdout.contains("to go on:"), "{run:?}");
    assert_eq!(site.json("out/run.json")["state"], "stopped");

    let again = Run::of(&mut site.start("out", &options)).end();
    assert!(again.status.success(), "{again:?}");
    assert!(again.stdout.contains("going on after step"), "{again:?}");
    assert_eq!(site.digest("out"), quiet);
    // Even of the steps before it was removed, as the journal has them all.
    assert_eq!(site.steps("out").len(), 300);
}
