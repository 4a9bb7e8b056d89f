//! Coordinators that cannot be had: none, another program, or one that says no.

use proto::v1;
use proto::v1::coordinator_message::Message as Down;
use proto::v1::worker_message::Message as Up;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use worker::join;
use worker::{JoinOptions, WorkerError};

use super::coordinator::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_no_coordinator_is_given_up_at_once() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut heard = [0; 24];
            stream.read_exact(&mut heard).await.unwrap();
            let answer = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n";
            stream.write_all(answer).await.unwrap();
            // Closing while unread bytes wait would reset the connection, and the answer might be lost.
            stream.shutdown().await.unwrap();
            tokio::io::copy(&mut stream, &mut tokio::io::sink())
                .await
                .ok();
        }
    });
    let started = Instant::now();
    let joined = join(JoinOptions::new(&address), CancellationToken::new()).await;
    assert_eq!(
        joined.unwrap_err().to_string(),
        format!("{address} answers, but is no Muster coordinator")
    );
    assert!(started.elapsed() < Duration::from_secs(3));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_coordinator_says_against_a_worker_is_the_error() {
    let mut stage = stage().await;
    let mut options = stage.options();
    options.token = None;
    let error = join(options, CancellationToken::new()).await.unwrap_err();
    assert!(matches!(&error, WorkerError::Refused { .. }), "{error}");
    assert!(error.to_string().contains("token"), "{error}");

    let worker = tokio::spawn(join(stage.options(), CancellationToken::new()));
    let mut peer = stage.session().await;
    assert_eq!(peer.joined().await.version, worker::VERSION);
    let refusal = "this run is of another numerics class";
    let status = Err(Status::failed_precondition(refusal));
    peer.down.send(status).await.unwrap();
    let error = worker.await.unwrap().unwrap_err();
    assert!(error.to_string().contains(refusal), "{error}");

    let (worker, peer, ..) = stage.ready_worker().await;
    let reason = "three steps in a row were skipped".to_owned();
    let failed = true;
    peer.send(Down::Finish(v1::Finish {
        failed,
        reason,
        resumable: false,
    }))
    .await;
    let error = worker.await.unwrap().unwrap_err();
    assert_eq!(
        error.to_string(),
        "the job failed: three steps in a row were skipped"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_reads_differently_here_names_both_digests() {
    let mut stage = stage().await;
    stage.welcome.job_digest = "5".repeat(64);
    let worker = tokio::spawn(join(stage.options(), CancellationToken::new()));
    let mut peer = stage.session().await;
    peer.joined().await;
    peer.send(Down::Welcome(stage.welcome.clone())).await;
    let heard = match peer.next().await.unwrap() {
        Up::Leaving(leaving) => leaving.reason,
        other => panic!("{other:?}"),
    };
    drop(peer);
    let message = worker.await.unwrap().unwrap_err().to_string();
    for message in [message, heard] {
        assert!(
            message.contains(&"5".repeat(64)) && message.contains(&stage.job.digest()),
            "{message}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_is_not_there_is_given_up_in_time() {
    let vacant = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = vacant.local_addr().unwrap().to_string();
    drop(vacant);
    let started = Instant::now();
    let error = join(
        JoinOptions {
            connect_timeout: Duration::from_secs(1),
            ..JoinOptions::new(&address)
        },
        CancellationToken::new(),
    )
    .await
    .unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(10));
    assert!(error.to_string().contains(&address), "{error}");
    for wrong in ["", ":7077", "host:port", "http://host:7077"] {
        let joined = join(JoinOptions::new(wrong), CancellationToken::new()).await;
        assert!(matches!(joined, Err(WorkerError::Address(_))), "{wrong}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_prepares_is_waited_for_beyond_every_timeout() {
    let mut stage = stage().await;
    let mut options = stage.options();
    options.connect_timeout = Duration::ZERO;
    let worker = tokio::spawn(join(options, CancellationToken::new()));
    // More often than a worker without a state comes back to one that it loses.
    for percent in 0..20 {
        let mut peer = stage.session().await;
        peer.joined().await;
        let mut status = Status::unavailable("come back");
        let moment = format!("tokenising the data, {percent}%");
        let metadata = status.metadata_mut();
        metadata.insert(common::wire::PREPARING_KEY, moment.parse().unwrap());
        peer.down.send(Err(status)).await.unwrap();
    }
    let mut peer = stage.session().await;
    peer.joined().await;
    peer.send(Down::Finish(v1::Finish::default())).await;
    let ended = worker.await.unwrap().unwrap();
    assert!(matches!(ended, worker::Finished::Job { .. }), "{ended:?}");
}
