//! Workers that are asked to stop.

use proto::v1;
use proto::v1::coordinator_message::Message as Down;
use proto::v1::worker_message::Message as Up;
use tokio_util::sync::CancellationToken;
use worker::{Finished, join};

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
