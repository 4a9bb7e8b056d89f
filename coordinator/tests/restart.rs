//! Coordinators that die or are stopped, and workers that outlive them: nobody goes back to a checkpoint.
#![cfg(feature = "single-node")]
#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use serde_json::Value;
use support::{JOIN, Process, Run, Site, free_port};
use tokio_util::sync::CancellationToken;
use worker::JoinOptions;

/// How long a worker may take to say what it is waiting for.
const WAITING_WORKER_TIMEOUT: Duration = Duration::from_secs(60);
const AGAIN: &str = "again, with the state that is held here";

/// Not a test: what [`Site::join`] starts this binary for.
#[test]
#[ignore = "a worker, started by the tests"]
fn worker_process() {
    let Ok(address) = std::env::var(JOIN) else {
        return;
    };
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .init();
    let mut options = JoinOptions::new(address);
    options.threads = Some(1);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let joined = runtime.block_on(worker::join(options, CancellationToken::new()));
    if let Err(error) = joined {
        eprintln!("error: {error}");
        std::process::exit(3);
    }
}

/// A coordinator for two hundred small steps without checkpoints, and three workers.
struct Stage {
    site: Site,
    port: u16,
    workers: Vec<Process>,
}

const OPTIONS: [&str; 2] = ["--max-steps", "200"];

impl Stage {
    fn new() -> Self {
        Self {
            site: Site::new(),
            port: free_port(),
            workers: Vec::new(),
        }
    }

    fn coordinator(&self, output: &str, more: &[&str]) -> Run {
        let listen = format!("127.0.0.1:{}", self.port);
        let options = ["--listen", &listen, "--min-workers", "3"];
        Run::of(
            &mut self
                .site
                .start(output, &[&OPTIONS[..], &options, more].concat()),
        )
    }

    fn with_workers(mut self) -> Self {
        for name in ["one", "two", "three"] {
            let worker = self.site.join(name, self.port);
            self.workers.push(worker);
        }
        self
    }

    fn log(&self, worker: &str) -> String {
        std::fs::read_to_string(self.site.log_of(worker)).unwrap()
    }

    fn check(mut self, quiet: &str) {
        for worker in &mut self.workers {
            assert!(worker.wait().success());
        }
        assert_eq!(self.site.digest("out"), quiet);
        let numbers = |output: &str| -> Vec<(Value, Value, Value)> {
            let steps = self.site.steps(output);
            let fields = |step: &Value| {
                let field = |name: &str| step[name].clone();
                (field("step"), field("loss"), field("weights_digest"))
            };
            steps.iter().map(fields).collect()
        };
        assert_eq!(numbers("out"), numbers("quiet"));
        assert_eq!(numbers("out").len(), 200);
    }
}

#[test]
fn a_killed_coordinator_costs_no_step_and_no_worker() {
    let stage = Stage::new();
    let quiet = stage.site.train("quiet", &OPTIONS);
    let mut run = stage.coordinator("out", &[]);
    let stage = stage.with_workers();
    run.until("3 workers  eta").steps(20).process.kill();
    for _ in 0..2 {
        run = stage.coordinator("out", &[]);
        run.steps(10).process.kill();
    }
    let run = stage.coordinator("out", &[]).end();
    assert!(run.status.success(), "{run:?}");
    assert!(!run.stdout.contains("computed again"), "{run:?}");
    assert!(!run.stdout.contains("is lost"), "{run:?}");
    for worker in ["one", "two", "three"] {
        let log = stage.log(worker);
        let joined = log.matches(" joined ").count();
        let again = log.matches(AGAIN).count();
        // Once as a newcomer.
        assert!(again >= 1 && joined == again + 1, "{log}");
    }
    stage.check(&quiet);
}

#[test]
fn a_run_goes_on_with_a_new_worker_when_everybody_died() {
    let mut stage = Stage::new();
    let quiet = stage.site.train("quiet", &OPTIONS);
    let start = |stage: &Stage| {
        let listen = format!("127.0.0.1:{}", stage.port);
        let options = [&OPTIONS[..], &["--listen", &listen]].concat();
        Run::of(&mut stage.site.start("out", &options))
    };
    let mut run = start(&stage);
    let mut worker = stage.site.join("one", stage.port);
    run.steps(20).process.kill();
    worker.kill();
    let run = start(&stage);
    stage.workers.push(stage.site.join("two", stage.port));
    let run = run.end();
    assert!(run.status.success(), "{run:?}");
    for said in [
        "0 of 1 are back; in 1 s the run goes on",
        "computed again, to the same weights",
    ] {
        assert!(run.stdout.contains(said), "{said}: {run:?}");
    }
    assert!(
        !run.stdout.contains("when it was computed before"),
        "{run:?}"
    );
    stage.check(&quiet);
}

#[test]
#[cfg(unix)]
fn a_worker_that_sleeps_while_others_begin_again_takes_them_along() {
    let mut stage = Stage::new();
    let quiet = stage.site.train("quiet", &OPTIONS);
    let start = |stage: &Stage| {
        let listen = format!("127.0.0.1:{}", stage.port);
        let options = [&OPTIONS[..], &["--listen", &listen]].concat();
        Run::of(&mut stage.site.start("out", &options))
    };
    let mut run = start(&stage);
    let worker = stage.site.join("one", stage.port);
    run.steps(40);
    worker.signal("-STOP");
    run.process.kill();
    let mut run = start(&stage);
    let other = stage.site.join("two", stage.port);
    run.until("computed again, to the same weights");
    worker.signal("-CONT");
    stage.workers.extend([worker, other]);
    let run = run.end();
    assert!(run.status.success(), "{run:?}");
    let log = stage.log("one");
    assert!(log.contains(AGAIN), "{log}");
    stage.check(&quiet);
}

#[test]
fn the_workers_of_a_stopped_coordinator_wait_for_the_next() {
    let stage = Stage::new();
    let quiet = stage.site.train("quiet", &OPTIONS);
    let mut run = stage.coordinator("out", &[]);
    let stage = stage.with_workers();
    run.steps(20).process.signal("-TERM");
    let run = run.end();
    assert_eq!(run.status.code(), Some(75), "{run:?}");
    let run = stage.coordinator("out", &[]).end();
    assert!(run.status.success(), "{run:?}");
    for worker in ["one", "two", "three"] {
        let log = stage.log(worker);
        assert!(log.contains(AGAIN), "{log}");
    }
    stage.check(&quiet);
}

#[test]
#[cfg(unix)]
fn a_run_that_is_ended_at_once_says_so_in_its_record() {
    let site = Site::new();
    let options = [&OPTIONS[..], &["--single-node", "--threads", "1"]].concat();
    // Holds as a disk does that takes no checkpoint.
    let mut run = Run::of(
        site.start("out", &options)
            .env("MUSTER_FAILPOINT", "checkpoint-write=hold"),
    );
    run.steps(5).process.signal("-TERM");
    run.until("stopping after a checkpoint of step ");
    run.process.signal("-INT");
    let run = run.end();
    assert_eq!(run.status.code(), Some(130), "{run:?}");
    assert!(run.stdout.contains("stopped at once at step "), "{run:?}");
    let record = site.json("out/run.json");
    assert_eq!(record["state"], "stopped", "{record}");
    assert!(record["ended"].is_string(), "{record}");
    assert!(record["step"].as_u64().unwrap() >= 5, "{record}");
}

#[test]
#[cfg(unix)]
fn the_end_is_on_record_before_anybody_is_waited_for() {
    let site = Site::new();
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let options = [&OPTIONS[..], &["--listen", &listen]].concat();
    // Holds as a worker does that does not go.
    let mut run = Run::of(
        site.start("out", &options)
            .env("MUSTER_FAILPOINT", "farewell=hold"),
    );
    let _worker = site.join("one", port);
    run.steps(5).process.signal("-TERM");
    run.until("stopping after a checkpoint of step ");
    let began = Instant::now();
    let record = loop {
        let record = site.json("out/run.json");
        if record["state"] != "running" {
            break record;
        }
        assert!(began.elapsed() < WAITING_WORKER_TIMEOUT, "{record}");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(record["state"], "stopped", "{record}");
    assert!(record["ended"].is_string(), "{record}");
    let step = &record["step"];
    assert_eq!(site.json("out/trainer_state.json")["global_step"], *step);
    assert!(run.process.0.try_wait().unwrap().is_none());
    run.process.signal("-TERM");
    assert_eq!(run.end().status.code(), Some(75));
    assert_eq!(site.json("out/run.json"), record);
}

#[test]
fn a_terminal_that_is_closed_stops_a_run_like_sigterm_unless_nohup_was_asked_for() {
    if common::hangup::is_ignored() {
        eprintln!("not tested: the tests were started with nohup, which the programs inherit");
        return;
    }
    let site = Site::new();
    let options = [&OPTIONS[..], &["--single-node", "--threads", "1"]].concat();
    let mut run = Run::of(&mut site.start("out", &options));
    run.steps(5);
    // The shell says again what the system has said.
    run.process.signal("-HUP");
    run.process.signal("-HUP");
    let run = run.end();
    assert_eq!(run.status.code(), Some(75), "{run:?}");
    assert!(run.stdout.contains("its terminal was closed"), "{run:?}");
    assert!(run.stdout.contains("saved out/checkpoint-"), "{run:?}");

    let start = site.start("kept", &options);
    let mut nohup = std::process::Command::new("sh");
    nohup.args(["-c", "trap '' HUP; exec \"$@\"", "sh"]);
    nohup.arg(start.get_program()).args(start.get_args());
    nohup.current_dir(start.get_current_dir().unwrap());
    let mut run = Run::of(&mut nohup);
    run.steps(5).process.signal("-HUP");
    assert!(run.end().status.success());
}

#[test]
fn a_run_that_is_done_is_not_begun_again_though_its_coordinator_dies_at_once() {
    let site = Site::new();
    let quiet = site.train("quiet", &[]);
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let start = || site.start("out", &["--listen", &listen]);
    let run = Run::of(start().env("MUSTER_FAILPOINT", "result-recorded"));
    let mut worker = site.join("one", port);
    let run = run.end();
    assert_eq!(run.status.code(), None, "{run:?}");
    assert_eq!(site.digest("out"), quiet);
    assert_eq!(site.steps("out").len(), site.steps("quiet").len());
    let again = Run::of(&mut start()).end();
    assert!(again.status.success(), "{again:?}");
    assert!(
        again.stdout.contains("this job is done already"),
        "{again:?}"
    );
    // Nobody had told the worker before; now nobody waits any more.
    assert!(worker.wait().success());
    assert!(
        again.stdout.contains("could not tell its workers (1)"),
        "{again:?}"
    );
    let third = Run::of(&mut start()).end();
    assert!(
        third.status.success() && !third.stdout.contains("could not"),
        "{third:?}"
    );
}

#[test]
fn workers_are_let_go_also_where_the_run_was_done_while_its_folder_was_waited_for() {
    let site = Site::new();
    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let start = || site.start("out", &["--listen", &listen]);
    // It dies between the record of the result and the word to its worker.
    let run = Run::of(start().env("MUSTER_FAILPOINT", "result-recorded"));
    let mut worker = site.join("one", port);
    run.end();
    let record = std::fs::read_to_string(site.path("out/run.json")).unwrap();
    assert!(record.contains(r#""state": "done""#), "{record}");
    // To the next one it looks as if it were still at work, and done a moment later.
    let lock = common::files::lock::open(&site.path("out/.muster/lock")).unwrap();
    common::files::lock::attempt(&lock).unwrap();
    let earlier = record.replace(r#""state": "done""#, r#""state": "running""#);
    std::fs::write(site.path("out/run.json"), earlier).unwrap();
    let mut again = Run::of(&mut start());
    again.until("another coordinator is at work");
    std::fs::write(site.path("out/run.json"), record).unwrap();
    drop(lock);
    let again = again.end();
    assert!(again.status.success(), "{again:?}");
    assert!(again.stdout.contains("is done already"), "{again:?}");
    assert!(worker.wait().success(), "{again:?}");
}

#[test]
fn a_coordinator_of_another_job_in_its_place_costs_nothing() {
    let stage = Stage::new();
    let quiet = stage.site.train("quiet", &OPTIONS);
    let mut run = stage.coordinator("out", &[]);
    let stage = stage.with_workers();
    run.until("3 workers  eta").steps(20).process.kill();
    let mut other = stage.coordinator("other", &["--set", "seed=7"]);
    let began = Instant::now();
    for worker in ["one", "two", "three"] {
        while !stage.log(worker).contains("keeping it and waiting") {
            assert!(
                began.elapsed() < WAITING_WORKER_TIMEOUT,
                "{}",
                stage.log(worker)
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    other.process.kill();
    let run = stage.coordinator("out", &[]).end();
    assert!(run.status.success(), "{run:?}");
    for worker in ["one", "two", "three"] {
        let log = stage.log(worker);
        let said = log.lines().find(|line| line.contains("keeping it and"));
        for output in ["out", "other"] {
            let record = stage.site.json(&format!("{output}/run.json"));
            let digest = record["job_digest"].as_str().unwrap();
            assert!(said.unwrap().contains(digest), "{log}");
        }
        assert!(log.contains(AGAIN), "{log}");
    }
    stage.check(&quiet);
}
