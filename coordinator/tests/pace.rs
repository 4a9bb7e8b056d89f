//! Workers that hang, as real processes: the run goes on without them, and the weights are those of a quiet one.
#![cfg(all(unix, feature = "single-node"))]
#![allow(clippy::unwrap_used)]

mod support;

use support::{JOIN, Run, Site, free_port};
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
    let joined = runtime.block_on(worker::join(options, CancellationToken::new()));
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
