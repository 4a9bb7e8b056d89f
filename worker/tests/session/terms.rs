//! Workers that lose their coordinator, or are sent away by it, and what they still hold when they come back.

use common::job::JobSpec;
use common::wire::JOB_KEY;
use proto::v1;
use proto::v1::coordinator_message::Message as Down;
use proto::v1::worker_message::Message as Up;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use worker::WorkerError;
use worker::join;
use worker::rpc::connect::ConnectError;

use super::coordinator::*;

impl Stage {
    /// A worker alone that has made the first step and holds slots 0 and 1 of the second.
    async fn one_step_further(&mut self) -> (Joined, Peer, v1::Member) {
        let (worker, mut peer, member, _) = self.ready_worker().await;
        self.make_first_step(&mut peer, &member).await;
        peer.send(Down::Plan(self.plan(1, 1))).await;
        peer.send(lease(1, 1, [0, 1])).await;
        peer.slot_done().await;
        peer.slot_done().await;
        (worker, peer, member)
    }

    async fn make_first_step(&self, peer: &mut Peer, member: &v1::Member) {
        peer.send(with_rank(&generation(1, &[member], 0, &[]), 0))
            .await;
        peer.entered().await;
        peer.send(Down::Plan(self.plan(1, 0))).await;
        peer.send(lease(1, 0, 0..4)).await;
        for _ in 0..4 {
            peer.slot_done().await;
        }
        let (generation, step) = (1, 0);
        peer.send(Down::Exchange(v1::Exchange { generation, step }))
            .await;
        assert_eq!(peer.reported().await.step, 1);
    }

    /// The worker comes back to a new term.
    pub async fn rejoined(&mut self) -> (Peer, v1::Join, v1::Ready) {
        let mut peer = self.session().await;
        let join = peer.joined().await;
        self.welcome.term += 1;
        peer.send(Down::Welcome(self.welcome.clone())).await;
        let ready = peer.ready().await;
        (peer, join, ready)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_goes_on_under_a_new_term_with_what_it_holds() {
    let expected = quiet_run().await;
    let mut stage = stage().await;
    stage.welcome.run = "run".to_owned();
    let (worker, peer, member) = stage.one_step_further().await;
    // A lease that is in hand when the coordinator dies is computed all the same.
    peer.send(lease(1, 1, [2])).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    drop(peer);

    let (mut peer, join, ready) = stage.rejoined().await;
    assert_eq!(
        (join.job_digest, join.run),
        (stage.job.digest(), "run".to_owned())
    );
    assert_eq!((ready.step, &ready.weights_digest), (1, &expected[0]));
    let update = ready.updates.last().unwrap();
    assert_eq!(update.report.as_ref().unwrap().weights_digest, expected[0]);
    assert_eq!(update.slots.len(), 4);
    assert!(update.slots.iter().all(|slot| slot.loss_sum > 0.0));

    // The same number as under the last term, which did not write its generation down.
    peer.send(with_rank(&generation(1, &[&member], 1, &[]), 0))
        .await;
    let entered = peer.entered().await;
    assert_eq!(slots(&entered), [0, 1, 2]);
    assert!(entered.held.iter().all(|held| held.trained_tokens == 15));
    peer.send(Down::Plan(stage.plan(1, 1))).await;
    peer.send(lease(1, 1, [3])).await;
    assert_eq!(peer.slot_done().await.slot, 3);
    let (generation, step) = (1, 1);
    peer.send(Down::Exchange(v1::Exchange { generation, step }))
        .await;
    assert_eq!(peer.reported().await.weights_digest, expected[1]);
    finish(worker, peer).await;
}

/// Passes connections on to `target`. Where it listens, and how many are open.
async fn counting_proxy(target: String) -> (String, Arc<AtomicUsize>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let open = Arc::new(AtomicUsize::new(0));
    let counted = open.clone();
    tokio::spawn(async move {
        loop {
            let (mut near, _) = listener.accept().await.unwrap();
            let mut far = tokio::net::TcpStream::connect(&target).await.unwrap();
            counted.fetch_add(1, Ordering::SeqCst);
            let counted = counted.clone();
            tokio::spawn(async move {
                let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                counted.fetch_sub(1, Ordering::SeqCst);
            });
        }
    });
    (address, open)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_ends_with_its_session_though_the_state_is_kept() {
    let mut stage = stage().await;
    let (address, open) = counting_proxy(stage.address.clone()).await;
    stage.address = address;
    let (worker, mut peer, _) = stage.one_step_further().await;
    let finish = v1::Finish {
        resumable: true,
        ..v1::Finish::default()
    };
    peer.send(Down::Finish(finish)).await;
    assert!(peer.next().await.is_none(), "it says nothing more");
    // It is not welcomed yet, so nothing has taken the place of what it had.
    let mut peer = stage.session().await;
    assert_eq!(peer.joined().await.job_digest, stage.job.digest());
    let began = Instant::now();
    while open.load(Ordering::SeqCst) > 1 {
        assert!(
            began.elapsed() < MESSAGE_TIMEOUT / 6,
            "the old connection is kept"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    peer.send(Down::Finish(v1::Finish::default())).await;
    assert!(worker.await.unwrap().is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_accumulator_that_cannot_be_counted_is_emptied() {
    let expected = quiet_run().await;
    let mut stage = stage().await;
    let (worker, peer, member) = stage.one_step_further().await;
    drop(peer);
    let (mut peer, ..) = stage.rejoined().await;
    peer.send(with_rank(&generation(2, &[&member], 1, &[]), 0))
        .await;
    assert_eq!(slots(&peer.entered().await), [0, 1]);
    let clear = true;
    peer.send(Down::Plan(v1::Plan {
        clear,
        ..stage.plan(2, 1)
    }))
    .await;
    // Computed again: were they still in the sum, it would be another.
    peer.send(lease(2, 1, 0..4)).await;
    for _ in 0..4 {
        peer.slot_done().await;
    }
    let (generation, step) = (2, 1);
    peer.send(Down::Exchange(v1::Exchange { generation, step }))
        .await;
    assert_eq!(peer.reported().await.weights_digest, expected[1]);
    finish(worker, peer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_expelled_comes_back_without_its_state() {
    let mut stage = stage().await;
    let (worker, peer, _) = stage.one_step_further().await;
    let status = Status::aborted("this machine computes wrongly");
    peer.down.send(Err(status)).await.unwrap();
    let (peer, join, ready) = stage.rejoined().await;
    assert!(join.job_digest.is_empty() && join.run.is_empty());
    assert_eq!(ready.step, 0);
    assert!(ready.updates.is_empty());
    finish(worker, peer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_state_of_an_earlier_run_is_dropped() {
    let mut stage = stage().await;
    let (worker, peer, _) = stage.one_step_further().await;
    drop(peer);
    stage.welcome.run = "anew".to_owned();
    let mut peer = stage.session().await;
    assert!(!peer.joined().await.job_digest.is_empty());
    peer.send(Down::Welcome(stage.welcome.clone())).await;
    assert!(matches!(peer.next().await, Some(Up::Leaving(_))));
    drop(peer);
    let (peer, join, ready) = stage.rejoined().await;
    assert!(join.job_digest.is_empty());
    assert_eq!(ready.step, 0);
    finish(worker, peer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_stops_to_be_resumed_is_waited_for() {
    let mut stage = stage().await;
    let (worker, peer, _) = stage.one_step_further().await;
    peer.send(Down::Finish(v1::Finish {
        failed: false,
        reason: "terminated by a signal".to_owned(),
        resumable: true,
    }))
    .await;
    let (peer, _, ready) = stage.rejoined().await;
    assert_eq!(ready.step, 1);
    finish(worker, peer).await;
}

/// How a coordinator refuses a worker at its door.
fn refusal(job_digest: &str) -> Status {
    let mut status = Status::failed_precondition("the state is of another job");
    let digest = job_digest.parse().unwrap();
    status.metadata_mut().insert(JOB_KEY, digest);
    status
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_of_another_job_is_no_reason_to_give_the_state_up() {
    let mut stage = stage().await;
    let (worker, peer, _) = stage.one_step_further().await;
    drop(peer);
    let other = JobSpec {
        seed: stage.job.seed + 1,
        ..stage.job.clone()
    };
    // It may say so, or take whoever comes.
    let peer = stage.session().await;
    let refused = Err(refusal(&other.digest()));
    peer.down.send(refused).await.unwrap();
    let mut peer = stage.session().await;
    assert_eq!(peer.joined().await.job_digest, stage.job.digest());
    peer.send(Down::Welcome(v1::Welcome {
        job: serde_json::to_vec(&other).unwrap().into(),
        job_digest: other.digest(),
        ..stage.welcome.clone()
    }))
    .await;
    match peer.next().await.unwrap() {
        Up::Leaving(leaving) => assert!(leaving.reason.contains(&other.digest())),
        message => panic!("{message:?}"),
    }
    drop(peer);
    let (peer, join, ready) = stage.rejoined().await;
    assert_eq!((join.job_digest, ready.step), (stage.job.digest(), 1));
    finish(worker, peer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_of_another_job_is_named_with_both_digests_when_time_is_up() {
    let mut stage = stage().await;
    let mut options = stage.options();
    options.reconnect_timeout = Duration::from_secs(1);
    let mut worker = tokio::spawn(join(options, CancellationToken::new()));
    let mut peer = stage.session().await;
    peer.joined().await;
    peer.send(Down::Welcome(stage.welcome.clone())).await;
    peer.ready().await;
    drop(peer);
    let (started, other) = (Instant::now(), "5".repeat(64));
    let mut calls = 0;
    let ended = loop {
        tokio::select! {
            ended = &mut worker => break ended,
            peer = stage.session() => {
                calls += 1;
                peer.down.send(Err(refusal(&other))).await.unwrap();
            }
        }
    };
    let error = ended.unwrap().unwrap_err();
    assert!(matches!(error, WorkerError::OtherJob { .. }), "{error}");
    let error = error.to_string();
    for part in [&stage.job.digest(), &other, &stage.address] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(error.lines().count(), 1);
    assert!(calls > 1 && started.elapsed() < Duration::from_secs(10));
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_holds_no_state_is_refused_at_once() {
    let mut stage = stage().await;
    let worker = tokio::spawn(join(stage.options(), CancellationToken::new()));
    let peer = stage.session().await;
    let refused = Err(refusal(&"5".repeat(64)));
    peer.down.send(refused).await.unwrap();
    let error = worker.await.unwrap().unwrap_err();
    assert!(matches!(error, WorkerError::Refused { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_does_not_come_back_is_given_up() {
    let mut stage = stage().await;
    let mut options = stage.options();
    options.reconnect_timeout = Duration::from_secs(1);
    let worker = tokio::spawn(join(options, CancellationToken::new()));
    let mut peer = stage.session().await;
    peer.joined().await;
    peer.send(Down::Welcome(stage.welcome.clone())).await;
    peer.ready().await;
    stage.server.abort();
    drop(peer);
    let started = Instant::now();
    let error = worker.await.unwrap().unwrap_err();
    assert!(
        matches!(
            error,
            WorkerError::Connect(ConnectError::Unreachable { .. })
        ),
        "{error}"
    );
    let error = error.to_string();
    assert!(error.contains(&stage.address) && error.lines().count() == 1);
    assert!(started.elapsed() < Duration::from_secs(10));
}
