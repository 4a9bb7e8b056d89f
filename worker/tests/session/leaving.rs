//! Workers that are asked to stop.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use proto::v1;
use proto::v1::coordinator_message::Message as Down;
use proto::v1::worker_message::Message as Up;
use tokio_util::sync::CancellationToken;
use worker::join;
use worker::{Finished, JoinOptions};

use super::coordinator::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_asked_to_stop_says_goodbye() {
    let mut stage = stage().await;
    let shutdown = CancellationToken::new();
    let worker = tokio::spawn(join(stage.options(), shutdown.clone()));
    let mut peer = stage.session().await;
    peer.joined().await;
    peer.send(Down::Welcome(stage.welcome.clone())).await;
    peer.ready().await;
    while_it_is_ready().await;
    shutdown.cancel();
    match peer.next().await.unwrap() {
        Up::Draining(draining) => assert_eq!(draining.reason, "it was asked to stop"),
        other => panic!("{other:?}"),
    }
    let finish = v1::Finish {
        failed: false,
        reason: "its work is counted".into(),
        resumable: false,
    };
    peer.send(Down::Finish(finish)).await;
    drop(peer);
    assert_eq!(worker.await.unwrap().unwrap(), Finished::Left);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_still_loads_says_goodbye_at_once() {
    let mut stage = stage().await;
    let shutdown = CancellationToken::new();
    let worker = tokio::spawn(join(stage.options(), shutdown.clone()));
    let mut peer = stage.session().await;
    peer.joined().await;
    // Without the model's files it cannot begin.
    stage.welcome.model_dir = "/nowhere".into();
    let gate = stage.fake.clone();
    let _held = gate.gate.write().await;
    peer.send(Down::Welcome(stage.welcome.clone())).await;
    // The first heartbeat says that it has read the Welcome.
    let first = peer.up.message().await.unwrap().unwrap();
    assert!(matches!(first.message, Some(Up::Heartbeat(_))), "{first:?}");
    shutdown.cancel();
    match peer.next().await.unwrap() {
        Up::Leaving(leaving) => assert!(!leaving.failed),
        other => panic!("{other:?}"),
    }
    drop(peer);
    assert_eq!(worker.await.unwrap().unwrap(), Finished::Left);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_not_let_go_leaves_when_its_patience_ends() {
    let mut stage = stage().await;
    let patience = Duration::from_millis(400);
    let options = JoinOptions {
        draining_timeout: patience,
        ..stage.options()
    };
    let shutdown = CancellationToken::new();
    let worker = tokio::spawn(join(options, shutdown.clone()));
    let mut peer = stage.session().await;
    peer.joined().await;
    peer.send(Down::Welcome(stage.welcome.clone())).await;
    peer.ready().await;
    while_it_is_ready().await;
    let asked = Instant::now();
    shutdown.cancel();
    assert!(matches!(peer.next().await, Some(Up::Draining(_))));
    match peer.next().await.unwrap() {
        Up::Leaving(leaving) => assert!(!leaving.failed),
        other => panic!("{other:?}"),
    }
    assert!(asked.elapsed() >= patience);
    drop(peer);
    assert_eq!(worker.await.unwrap().unwrap(), Finished::Left);
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_a_worker_that_waits_to_be_let_go() {
    for (signal, code) in [("-TERM", 0), ("-INT", 130)] {
        let mut stage = stage().await;
        let token = stage.folder.path().join("token");
        std::fs::write(&token, TOKEN).unwrap();
        let mut worker = Process(
            Command::new(env!("CARGO_BIN_EXE_worker"))
                .args(["join", &stage.address, "--threads", "1", "--token-file"])
                .arg(&token)
                .env("MUSTER_CACHE_DIR", stage.folder.path().join("cache"))
                .stderr(Stdio::null())
                .spawn()
                .unwrap(),
        );
        let mut peer = stage.session().await;
        peer.joined().await;
        peer.send(Down::Welcome(stage.welcome.clone())).await;
        peer.ready().await;
        while_it_is_ready().await;
        worker.signal(signal);
        assert!(matches!(peer.next().await, Some(Up::Draining(_))));
        assert!(worker.0.try_wait().unwrap().is_none(), "it waits");
        let asked = Instant::now();
        worker.signal(signal);
        // Without a word.
        assert!(peer.next().await.is_none());
        let status = worker.0.wait().unwrap();
        assert_eq!(status.code(), Some(code), "{signal}");
        assert!(asked.elapsed() < worker::DRAINING_TIMEOUT / 2);
    }
}

/// Does not outlive the test.
struct Process(Child);

impl Process {
    fn signal(&self, signal: &str) {
        let id = self.0.id().to_string();
        let sent = Command::new("kill").args([signal, &id]).status().unwrap();
        assert!(sent.success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
