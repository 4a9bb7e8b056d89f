//! Workers that hang or are asked to stop, as real processes: the run goes on without them, and the weights are those of a quiet one.
#![cfg(all(unix, feature = "single-node"))]
#![allow(clippy::unwrap_used)]

mod support;

use support::{Finished, JOIN, Process, Run, Site, free_port, join_until_terminated};
use worker::JoinOptions;

/// Not a test: what [`Site::join`] starts this binary for.
#[test]
#[ignore = "a worker, started by the tests"]
fn worker_process() {
    let Ok(address) = std::env::var(JOIN) else {
        return;
    };
    let mut options = JoinOptions::new(address);
    options.threads = Some(1);
    join_until_terminated(options).unwrap();
}

/// A job of so many steps that was done once in peace, and is to be done again by workers that join.
struct Stage {
    site: Site,
    steps: usize,
    quiet: String,
    port: u16,
}

impl Stage {
    fn new(steps: usize) -> Self {
        let site = Site::new();
        let quiet = site.train("quiet", &["--max-steps", &steps.to_string()]);
        let port = free_port();
        Self {
            site,
            steps,
            quiet,
            port,
        }
    }

    fn start(&self, options: &[&str]) -> Run {
        let listen = format!("127.0.0.1:{}", self.port);
        let steps = self.steps.to_string();
        let own = ["--max-steps", &steps, "--listen", &listen];
        Run::of(&mut self.site.start("out", &[&own[..], options].concat()))
    }

    fn join(&self, name: &str) -> Process {
        self.site.join(name, self.port)
    }

    /// The run ends well, and so do these workers.
    fn end<const N: usize>(&self, run: Run, mut workers: [Process; N]) -> Finished {
        let run = run.end();
        assert!(run.status.success(), "{run:?}");
        assert!(workers.iter_mut().all(|worker| worker.wait().success()));
        assert_eq!(self.site.digest("out"), self.quiet);
        assert_eq!(self.site.steps("out").len(), self.steps);
        run
    }
}

#[test]
fn a_worker_that_hangs_is_expelled_and_comes_back_as_a_newcomer() {
    let stage = Stage::new(60);
    let mut run = stage.start(&["--min-workers", "2"]);
    let [steady, hanging] = ["steady", "hanging"].map(|name| stage.join(name));
    run.steps(5);
    hanging.signal("-STOP");
    run.until("nothing was heard of it for").until("1 of 2");
    hanging.signal("-CONT");
    run.until("joined").steps(5);
    stage.end(run, [steady, hanging]);
}

#[test]
fn a_coordinator_that_was_stopped_expels_nobody() {
    let stage = Stage::new(60);
    let mut run = stage.start(&["--min-workers", "2"]);
    let workers = ["first", "second"].map(|name| stage.join(name));
    run.steps(5).process.signal("-STOP");
    std::thread::sleep(std::time::Duration::from_secs(5));
    run.process.signal("-CONT");
    let run = stage.end(run, workers);
    assert!(!run.stdout.contains("nothing was heard"), "{run:?}");
}

#[test]
fn a_worker_that_is_asked_to_stop_hands_over_and_leaves() {
    let stage = Stage::new(120);
    let mut run = stage.start(&[]);
    let [stays, mut leaves] = ["stays", "leaves"].map(|name| stage.join(name));
    run.until("joined").until("joined").steps(5);
    leaves.signal("-TERM");
    run.until("left: it was asked to stop (1 worker)");
    assert!(leaves.wait().success());
    stage.end(run, [stays]);
}

#[test]
fn the_only_worker_leaves_its_state_behind() {
    let stage = Stage::new(200);
    let mut run = stage.start(&[]);
    let mut spot = stage.join("spot");
    run.steps(10);
    spot.signal("-TERM");
    run.until("saved ")
        .until("left: it was asked to stop (0 workers)");
    assert!(spot.wait().success());
    let next = stage.join("next");
    let run = stage.end(run, [next]);
    assert!(!run.stdout.contains("computed again"), "{run:?}");
}

#[test]
fn a_spare_takes_the_place_of_a_worker_that_dies() {
    let stage = Stage::new(600);
    let mut run = stage.start(&["--min-workers", "2", "--set", "cluster.max_workers=2"]);
    let [mut first, second, third] = ["first", "second", "third"].map(|name| stage.join(name));
    run.until("(3 workers)").steps(5);
    let all_by_two = || {
        let steps = stage.site.steps("out");
        steps.iter().all(|step| step["workers"] == 2)
    };
    assert!(all_by_two());
    first.kill();
    stage.end(run, [second, third]);
    assert!(all_by_two());
}

#[test]
fn a_run_of_skipped_steps_ends_with_the_rows_at_fault() {
    let site = Site::new();
    // The first update is far too large: gradients are out of range after it.
    let diverging = [
        "full",
        "--set",
        "learning_rate=1000",
        "--set",
        "warmup_steps=0",
    ];
    let bound = ["--set", "max_skipped_steps=2", "--set", "eval_steps=100"];
    let workers = ["--single-node", "--local-workers", "2"];
    let options = [&diverging[..], &bound, &workers].concat();
    let run = Run::of(&mut site.start("out", &options)).end();
    assert!(!run.status.success(), "{run:?}");
    for part in ["3 steps in a row", "of its slots [", "data.jsonl:"] {
        assert!(run.stderr.contains(part), "{part}: {run:?}");
    }
    assert!(run.stdout.contains(" skipped: its gradient"), "{run:?}");
    let skipped = |step: &&serde_json::Value| step["skipped"] == true;
    assert_eq!(site.steps("out").iter().filter(skipped).count(), 3);
}
