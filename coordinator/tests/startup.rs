//! A coordinator that prepares its run: it is there for whoever asks, stops when it is told to, and packs nothing twice.
#![cfg(feature = "single-node")]
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use proto::health::HealthCheckRequest;
use proto::health::health_check_response::ServingStatus;
use proto::health::health_client::HealthClient;
use support::{Process, Run, Site, free_port};

/// Longer than anything here takes on the busiest machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// Not a test: what [`Site::join`] starts this binary for.
#[test]
#[ignore = "a worker, started by the tests"]
fn worker_process() {
    support::work();
}

/// A coordinator that hangs while it packs, as over a file system that does.
fn held(site: &Site, port: u16) -> Process {
    let listen = format!("127.0.0.1:{port}");
    let child = site
        .start("out", &["--listen", &listen])
        .env("MUSTER_FAILPOINT", "pack=hold")
        .stdout(fs::File::create(site.path("coordinator.log")).unwrap())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    Process(child)
}

/// What gRPC's health check says, once somebody answers there.
fn health(port: u16, service: &str) -> ServingStatus {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let began = Instant::now();
    runtime.block_on(async {
        loop {
            let client = HealthClient::connect(format!("http://127.0.0.1:{port}")).await;
            if let Ok(mut client) = client {
                let request = HealthCheckRequest {
                    service: service.to_owned(),
                };
                return client.check(request).await.unwrap().into_inner().status();
            }
            assert!(began.elapsed() < DEADLINE, "nobody answers");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
}

/// Waits until the file says so.
fn until_said(path: PathBuf, words: &str) {
    let began = Instant::now();
    loop {
        let text = fs::read_to_string(&path).unwrap_or_default();
        if text.contains(words) {
            return;
        }
        assert!(began.elapsed() < DEADLINE, "no {words:?} in {text:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn blocks(site: &Site) -> Vec<PathBuf> {
    let entries = fs::read_dir(site.path("out/.muster")).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut blocks: Vec<PathBuf> = paths
        .filter(|path| path.to_string_lossy().contains("blocks-"))
        .collect();
    blocks.sort();
    blocks
}

#[test]
fn while_data_is_packed_health_is_served_and_workers_are_told_to_wait() {
    let site = Site::new();
    let port = free_port();
    let mut coordinator = held(&site, port);
    assert_eq!(health(port, ""), ServingStatus::Serving);
    let run = "muster.v1.Coordinator";
    assert_eq!(health(port, run), ServingStatus::NotServing);

    let _worker = site.join("waits", port);
    let said = "the coordinator is preparing: tokenising the data, 0%";
    until_said(site.log_of("waits"), said);

    coordinator.signal("-TERM");
    assert_eq!(coordinator.wait().code(), Some(75));
    until_said(
        site.path("coordinator.log"),
        "stopped while tokenising the data, 0%: terminated by a signal",
    );
}

#[test]
fn a_worker_that_waits_is_told_why_there_will_be_no_run() {
    let site = Site::new();
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    // As another coordinator holds it.
    fs::create_dir_all(site.path("out/.muster")).unwrap();
    let lock = common::files::lock::open(&site.path("out/.muster/lock")).unwrap();
    common::files::lock::attempt(&lock).unwrap();
    let mut coordinator = Run::of(&mut site.start("out", &["--listen", &listen]));
    coordinator.until("another coordinator is at work");
    let _worker = site.join("waits", port);
    until_said(site.log_of("waits"), "the coordinator is preparing");
    fs::write(site.path("out/run.json"), "what the other one left").unwrap();
    drop(lock);
    let coordinator = coordinator.end();
    assert_eq!(coordinator.status.code(), Some(3), "{coordinator:?}");
    let error = coordinator.stderr.trim().trim_start_matches("error: ");
    assert!(error.contains("is not a run record"), "{error}");
    let said = format!("it cannot begin the run: {error}");
    until_said(site.log_of("waits"), &said);
}

#[test]
fn a_signal_stops_the_preparation_even_where_that_hangs() {
    for (signal, code) in [("-TERM", 75), ("-INT", 130)] {
        let site = Site::new();
        let port = free_port();
        let mut coordinator = held(&site, port);
        // It listens to signals before it listens to anybody else.
        health(port, "");
        coordinator.signal(signal);
        assert_eq!(coordinator.wait().code(), Some(code), "{signal}");
        assert!(!site.path("out/run.json").exists());
    }
}

#[test]
fn a_signal_stops_the_packing_of_large_data_and_leaves_nothing_behind() {
    let site = Site::new();
    let rows = fs::read_to_string(site.path("data.jsonl")).unwrap();
    // More than can be tokenised before the signal comes.
    fs::write(site.path("data.jsonl"), (rows + "\n").repeat(4000)).unwrap();
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let run = Run::of(&mut site.start("out", &["--listen", &listen]));
    health(port, "");
    run.process.signal("-INT");
    let run = run.end();
    assert_eq!(run.status.code(), Some(130), "{run:?}");
    assert!(run.stdout.contains("stopped while "), "{run:?}");
    assert!(run.stderr.is_empty(), "{run:?}");
    let left = fs::read_dir(site.path("out/.muster")).map_or(0, |entries| entries.count());
    assert_eq!(left, 0);
}

#[test]
fn what_was_packed_is_kept_for_the_next_start_until_the_data_changes() {
    let site = Site::new();
    let listen = format!("127.0.0.1:{}", free_port());
    let options = ["--listen", &listen];
    let modified = |path: &PathBuf| fs::metadata(path).unwrap().modified().unwrap();

    let mut first = Run::of(&mut site.start("out", &options));
    first.until("workers join with").process.kill();
    let packed = blocks(&site);
    assert_eq!(packed.len(), 1);
    let written = modified(&packed[0]);

    let mut second = Run::of(&mut site.start("out", &options));
    second.until("workers join with").process.kill();
    assert_eq!(blocks(&site), packed);
    assert_eq!(modified(&packed[0]), written, "it was written again");

    // Same size, and the time of the last change as before: only the content tells.
    let data = site.path("data.jsonl");
    let before = modified(&data);
    let rows = fs::read_to_string(&data).unwrap();
    fs::write(&data, rows.replace("Number 0 comes", "Number 0 goes!")).unwrap();
    let file = fs::File::options().append(true).open(&data).unwrap();
    file.set_modified(before).unwrap();
    let mut third = Run::of(&mut site.start("out", &options));
    third.until("workers join with").process.kill();
    assert_eq!(blocks(&site).len(), 1);
    assert_ne!(blocks(&site), packed, "the change was not noticed");
}

#[test]
fn a_signal_is_answered_with_what_it_does() {
    let site = Site::new();
    let listen = format!("127.0.0.1:{}", free_port());
    let mut run = Run::of(&mut site.start("waits", &["--listen", &listen]));
    run.until("waiting for workers").process.signal("-INT");
    let run = run.end();
    assert_eq!(run.status.code(), Some(130), "{run:?}");
    let said = "stopping; press Ctrl-C again to stop at once";
    assert!(run.stdout.contains(said), "{run:?}");

    let mut run = Run::of(&mut site.start("trains", &["--single-node", "--max-steps", "3000"]));
    run.steps(3).process.signal("-TERM");
    let run = run.end();
    assert_eq!(run.status.code(), Some(75), "{run:?}");
    let said = "stopping after a checkpoint of step ";
    let (_, rest) = run.stdout.split_once(said).unwrap();
    let (step, rest) = rest.split_once("; ").unwrap();
    assert!(
        rest.starts_with("a second signal stops it at once"),
        "{rest}"
    );
    assert!(
        site.path(&format!("trains/checkpoint-{step}")).exists(),
        "{run:?}"
    );
}

#[test]
fn a_user_who_waits_for_workers_in_vain_is_told_how_they_join() {
    let site = Site::new();
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let mut run = Run::of(&mut site.start("out", &["--listen", &listen]));
    run.until("no worker has joined yet: train in this process with --single-node");
    run.process.kill();
}

#[test]
fn an_output_dir_in_which_no_step_was_done_is_free() {
    let site = Site::new();
    let listen = format!("127.0.0.1:{}", free_port());
    let mut first = Run::of(&mut site.start("out", &["--listen", &listen]));
    first.until("waiting for workers").process.signal("-TERM");
    assert_eq!(first.end().status.code(), Some(75));
    let other = ["--single-node", "--set", "seed=7"];
    let other = Run::of(&mut site.start("out", &other)).end();
    assert!(other.status.success(), "{other:?}");
    assert!(
        other
            .stdout
            .contains("of which no step was done: it is begun anew"),
        "{other:?}"
    );
    let quiet = site.train("quiet", &["--set", "seed=7"]);
    assert_eq!(site.digest("out"), quiet);
}

#[test]
fn resume_never_replaces_what_another_job_left() {
    let site = Site::new();
    site.train("out", &[]);
    let other = ["--single-node", "--set", "seed=7"];
    let refused = Run::of(&mut site.start("out", &other)).end();
    assert_eq!(refused.status.code(), Some(3), "{refused:?}");
    let again = [&other[..], &["--resume", "never"]].concat();
    let again = Run::of(&mut site.start("out", &again)).end();
    assert!(again.status.success(), "{again:?}");
    assert!(
        again
            .stdout
            .contains("it is replaced, as `resume: never` asks"),
        "{again:?}"
    );
    let quiet = site.train("quiet", &["--set", "seed=7"]);
    assert_eq!(site.digest("out"), quiet);
    assert_eq!(site.steps("out").len(), 6);
    assert!(site.path("out/run.json.old").exists());
}
