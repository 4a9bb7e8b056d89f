//! A newcomer that copies its state from a member while that goes on.

use proto::v1;
use proto::v1::coordinator_message::Message as Down;
use proto::v1::worker_message::Message as Up;
use std::time::Duration;

use super::coordinator::*;

/// A newcomer copies the state of a member that goes on, and then takes part: after step 2 at once, or with the update
/// that leads there still on its way.
async fn join_by_feed(last_update_is_late: bool) {
    let expected = quiet_run().await;
    let mut stage = stage().await;
    let (first, mut one, mut member_one, _) = stage.ready_worker().await;
    let (second, mut two, mut member_two, _) = stage.ready_worker().await;
    (member_one.worker, member_two.worker) = (7, 8);
    let alone = generation(1, &[&member_one], 0, &[]);
    one.send(with_rank(&alone, 0)).await;
    one.entered().await;
    let (attempt, worker) = (1, 8);
    two.send(Down::Follow(v1::Follow {
        attempt,
        worker,
        // The copy, which others may have begun before, is older.
        step: 2,
        source: Some(member_one.clone()),
    }))
    .await;
    let exchange = |generation, step| Down::Exchange(v1::Exchange { generation, step });
    let mut both = generation(2, &[&member_one, &member_two], 2, &[]);
    for step in 0..2 {
        one.send(Down::Plan(stage.plan(1, step))).await;
        one.send(lease(1, step, 0..4)).await;
        for _ in 0..4 {
            one.slot_done().await;
        }
        if step == 1 && last_update_is_late {
            both.fed = vec![1];
            two.send(with_rank(&both, 1)).await;
        }
        one.send(exchange(1, step)).await;
        let report = one.reported().await;
        assert_eq!(report.weights_digest, expected[step as usize]);
        if step == 0 {
            one.send(Down::Feed(v1::Feed { attempt, worker })).await;
        }
        let synced = two.synced().await;
        assert_eq!((synced.attempt, synced.step), (1, step + 1));
        let repeated = synced
            .report
            .map(|report| (report.weights_digest, report.grad_norm));
        let made = (step == 1).then_some((report.weights_digest, report.grad_norm));
        assert_eq!(repeated, made);
    }
    one.send(with_rank(&both, 0)).await;
    if !last_update_is_late {
        two.send(with_rank(&both, 1)).await;
    }
    for (peer, slots) in [(&mut one, 0..2), (&mut two, 2..4)] {
        assert_eq!(peer.entered().await.step, 2);
        peer.send(Down::Plan(stage.plan(2, 2))).await;
        peer.send(lease(2, 2, slots)).await;
        peer.slot_done().await;
        peer.slot_done().await;
    }
    for peer in [&mut one, &mut two] {
        peer.send(exchange(2, 2)).await;
    }
    // Weights and moments are those of one that was there from the start.
    for peer in [&mut one, &mut two] {
        assert_eq!(peer.reported().await.weights_digest, expected[2]);
    }
    finish(first, one).await;
    let two = tell_what_is_not_on_record(&mut stage, two, &expected).await;
    finish(second, two).await;
}

/// To a coordinator that lost the records a worker tells all of each step: what came with the copy, with the feed, and what its peer
/// held in the exchange. Of what is on record it tells nothing.
async fn tell_what_is_not_on_record(stage: &mut Stage, mut two: Peer, expected: &[String]) -> Peer {
    for recorded in [0, 2] {
        drop(two);
        stage.welcome.recorded = recorded;
        let ready;
        (two, _, ready) = stage.rejoined().await;
        let told = |update: &v1::Update| {
            let report = update.report.as_ref().unwrap();
            assert_eq!(report.weights_digest, expected[report.step as usize - 1]);
            let slots: Vec<u32> = update.slots.iter().map(|held| held.slot).collect();
            assert!(update.slots.iter().all(|held| held.loss_sum > 0.0));
            (report.step, slots)
        };
        let told: Vec<_> = ready.updates.iter().map(told).collect();
        let all: Vec<_> = (recorded + 1..=3)
            .map(|step| (step, vec![0, 1, 2, 3]))
            .collect();
        assert_eq!(told, all);
    }
    two
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newcomer_repeats_the_updates_of_its_source_to_the_bit() {
    join_by_feed(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newcomer_enters_with_its_last_update_on_the_way() {
    join_by_feed(true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newcomer_obeys_while_it_follows() {
    let mut stage = stage().await;
    let (worker, mut peer, _, _) = stage.ready_worker().await;
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let follow = |attempt, address: String| {
        Down::Follow(v1::Follow {
            attempt,
            worker: 1,
            step: 1,
            source: Some(v1::Member {
                address,
                ..v1::Member::default()
            }),
        })
    };
    // One that accepts and says nothing, then one that ends the feed at once.
    peer.send(follow(1, silent.local_addr().unwrap().to_string()))
        .await;
    peer.send(Down::SaveState(v1::SaveState {
        step: 0,
        r#final: false,
    }))
    .await;
    while stage.fake.uploads.lock().unwrap().is_empty() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let ended = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    peer.send(follow(2, ended.local_addr().unwrap().to_string()))
        .await;
    tokio::task::spawn_blocking(move || {
        use std::io::Write;
        use worker::collective::frame::{FrameHeader, FrameKind};
        let (mut stream, _) = ended.accept().unwrap();
        let header = FrameHeader::of(FrameKind::Ended, 0, b"has had enough");
        stream.write_all(&header.encode()).unwrap();
        stream.write_all(b"has had enough").unwrap();
        // Closing while unread bytes wait would reset the connection, and the answer might be lost.
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    })
    .await
    .unwrap();
    match peer.next().await.unwrap() {
        Up::FeedLost(lost) => {
            assert_eq!(lost.attempt, 2);
            assert_eq!(lost.reason, "has had enough");
        }
        other => panic!("{other:?}"),
    }
    peer.send(follow(3, silent.local_addr().unwrap().to_string()))
        .await;
    finish(worker, peer).await;
}
