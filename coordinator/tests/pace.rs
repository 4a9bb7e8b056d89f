//! Workers that hang or are asked to stop, as real processes: the run goes on without them, and the weights are those of a quiet one.
#![cfg(all(unix, feature = "single-node"))]
#![allow(clippy::unwrap_used)]

mod support;

use support::{JOIN, Run, Site, free_port};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
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
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let joined = runtime.block_on(async {
        let shutdown = CancellationToken::new();
        let asked = shutdown.clone();
        let mut terminated = signal(SignalKind::terminate()).unwrap();
        tokio::spawn(async move {
            terminated.recv().await;
            asked.cancel();
        });
        worker::join(options, shutdown).await
    });
    joined.unwrap();
}

#[test]
fn a_worker_that_hangs_is_expelled_and_comes_back_as_a_newcomer() {
    let site = Site::new();
    let steps = ["--max-steps", "60"];
    let quiet = site.train("quiet", &steps);

    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let options = [&steps[..], &["--listen", &listen, "--min-workers", "2"]].concat();
    let mut run = Run::of(&mut site.start("out", &options));
    let mut steady = site.join("steady", port);
    let mut hanging = site.join("hanging", port);
    run.steps(5);
    hanging.signal("-STOP");
    run.until("nothing was heard of it for").until("1 of 2");
    hanging.signal("-CONT");
    run.until("joined").steps(5);
    let run = run.end();
    assert!(run.status.success(), "{run:?}");
    assert!(steady.wait().success() && hanging.wait().success());
    assert_eq!(site.digest("out"), quiet);
    assert_eq!(site.steps("out").len(), 60);
}

#[test]
fn a_coordinator_that_was_stopped_expels_nobody() {
    let site = Site::new();
    let steps = ["--max-steps", "60"];
    let quiet = site.train("quiet", &steps);

    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let options = [&steps[..], &["--listen", &listen, "--min-workers", "2"]].concat();
    let mut run = Run::of(&mut site.start("out", &options));
    let mut workers = [site.join("first", port), site.join("second", port)];
    run.steps(5).process.signal("-STOP");
    std::thread::sleep(std::time::Duration::from_secs(5));
    run.process.signal("-CONT");
    let run = run.end();
    assert!(run.status.success(), "{run:?}");
    assert!(!run.stdout.contains("nothing was heard"), "{run:?}");
    assert!(workers.iter_mut().all(|worker| worker.wait().success()));
    assert_eq!(site.digest("out"), quiet);
}

#[test]
fn a_worker_that_is_asked_to_stop_hands_over_and_leaves() {
    let site = Site::new();
    let steps = ["--max-steps", "120"];
    let quiet = site.train("quiet", &steps);

    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let mut run = Run::of(&mut site.start("out", &[&steps[..], &["--listen", &listen]].concat()));
    let mut stays = site.join("stays", port);
    let mut leaves = site.join("leaves", port);
    run.until("joined").until("joined").steps(5);
    leaves.signal("-TERM");
    run.until("left: it was asked to stop (1 worker)");
    assert!(leaves.wait().success());
    let run = run.end();
    assert!(run.status.success(), "{run:?}");
    assert!(stays.wait().success());
    assert_eq!(site.digest("out"), quiet);
    assert_eq!(site.steps("out").len(), 120);
}

#[test]
fn the_only_worker_leaves_its_state_behind() {
    let site = Site::new();
    let steps = ["--max-steps", "60"];
    let quiet = site.train("quiet", &steps);

    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let mut run = Run::of(&mut site.start("out", &[&steps[..], &["--listen", &listen]].concat()));
    let mut spot = site.join("spot", port);
    run.steps(10);
    spot.signal("-TERM");
    run.until("saved ")
        .until("left: it was asked to stop (0 workers)");
    assert!(spot.wait().success());
    let mut next = site.join("next", port);
    let run = run.end();
    assert!(run.status.success(), "{run:?}");
    assert!(!run.stdout.contains("computed again"), "{run:?}");
    assert!(next.wait().success());
    assert_eq!(site.digest("out"), quiet);
    assert_eq!(site.steps("out").len(), 60);
}

#[test]
fn a_spare_takes_the_place_of_a_worker_that_dies() {
    let site = Site::new();
    let steps = ["--max-steps", "120"];
    let quiet = site.train("quiet", &steps);

    let port = free_port();
    let listen = format!("127.0.0.1:{port}");
    let bounds = ["--min-workers", "2", "--set", "cluster.max_workers=2"];
    let options = [&steps[..], &["--listen", &listen], &bounds].concat();
    let mut run = Run::of(&mut site.start("out", &options));
    let mut first = site.join("first", port);
    let mut others = [site.join("second", port), site.join("third", port)];
    run.until("(3 workers)").steps(5);
    let workers = |step: &serde_json::Value| step["workers"].as_u64();
    assert!(
        site.steps("out")
            .iter()
            .all(|step| workers(step) == Some(2))
    );
    first.kill();
    let run = run.end();
    assert!(run.status.success(), "{run:?}");
    assert!(others.iter_mut().all(|worker| worker.wait().success()));
    assert_eq!(site.digest("out"), quiet);
    assert!(
        site.steps("out")
            .iter()
            .all(|step| workers(step) == Some(2))
    );
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
