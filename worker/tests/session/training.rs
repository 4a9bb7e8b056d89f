//! Steps by one worker and by several: whoever comes, goes or gives slots back, the weights are the same.

use proto::v1;
use proto::v1::coordinator_message::Message as Down;
use proto::v1::worker_message::Message as Up;

use super::coordinator::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_leaves_and_one_that_comes_change_nothing() {
    let expected = quiet_run().await;
    let mut stage = stage().await;
    let (first, mut one, member_one, _) = stage.ready_worker().await;
    let (second, mut two, member_two, _) = stage.ready_worker().await;
    let both = generation(1, &[&member_one, &member_two], 0, &[]);
    for (rank, peer) in [&mut one, &mut two].into_iter().enumerate() {
        peer.send(with_rank(&both, rank as u32)).await;
        peer.entered().await;
        peer.send(Down::Plan(stage.plan(1, 0))).await;
    }
    one.send(lease(1, 0, [0, 1, 2])).await;
    two.send(lease(1, 0, [3])).await;
    for _ in 0..3 {
        one.slot_done().await;
    }
    two.slot_done().await;
    let exchange = |generation, step| Down::Exchange(v1::Exchange { generation, step });
    for peer in [&mut one, &mut two] {
        // The next step is planned ahead.
        peer.send(exchange(1, 0)).await;
        peer.send(Down::Plan(stage.plan(1, 1))).await;
    }
    one.send(lease(1, 1, [0, 1])).await;
    two.send(lease(1, 1, [2])).await;
    for peer in [&mut one, &mut two] {
        assert_eq!(peer.reported().await.weights_digest, expected[0]);
    }
    for _ in 0..2 {
        one.slot_done().await;
    }
    two.slot_done().await;
    // The second goes with what it holds; a third comes, with the weights of the start.
    drop(two);
    second.abort();
    let (third, mut three, member_three, ready) = stage.ready_worker().await;
    assert_eq!(ready.step, 0);
    let changed = generation(2, &[&member_one, &member_three], 1, &[1]);
    for (rank, peer) in [&mut one, &mut three].into_iter().enumerate() {
        peer.send(with_rank(&changed, rank as u32)).await;
    }
    let entered = one.entered().await;
    assert_eq!((entered.step, slots(&entered)), (1, vec![0, 1]));
    let entered = three.entered().await;
    assert_eq!((entered.step, slots(&entered)), (1, vec![]));
    for peer in [&mut one, &mut three] {
        peer.send(Down::Plan(stage.plan(2, 1))).await;
    }
    // What names the old generation is void.
    three.send(lease(1, 1, [0])).await;
    three.send(lease(2, 1, [2, 3])).await;
    assert_eq!(three.slot_done().await.slot, 2);
    three.slot_done().await;
    for peer in [&mut one, &mut three] {
        peer.send(exchange(2, 1)).await;
    }
    for peer in [&mut one, &mut three] {
        assert_eq!(peer.reported().await.weights_digest, expected[1]);
    }
    finish(first, one).await;
    finish(third, three).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_begun_is_given_back_at_once_and_never_computed() {
    let mut stage = stage().await;
    let fake = stage.fake.clone();
    let gate = fake.gate.write().await;
    let (worker, mut peer, member, _) = stage.ready_worker().await;
    peer.send(with_rank(&generation(1, &[&member], 0, &[]), 0))
        .await;
    peer.entered().await;
    peer.send(Down::Plan(stage.plan(1, 0))).await;
    peer.send(lease(1, 0, 0..3)).await;
    let withdraw = |generation, slots: &[u32]| {
        Down::Withdraw(v1::Withdraw {
            generation,
            step: 0,
            kind: v1::PlanKind::Train as i32,
            slots: slots.to_vec(),
        })
    };
    // Those of another generation are not what was leased.
    peer.send(withdraw(2, &[0, 1, 2])).await;
    peer.send(withdraw(1, &[0, 2, 3])).await;
    match peer.next().await.unwrap() {
        Up::Withdrawn(withdrawn) => assert_eq!(withdrawn.slots, [0, 2]),
        other => panic!("{other:?}"),
    }
    drop(gate);
    peer.send(lease(1, 0, [2])).await;
    for slot in [1, 2] {
        assert_eq!(peer.slot_done().await.slot, slot);
    }
    // What is done is not given back.
    peer.send(withdraw(1, &[1])).await;
    peer.send(with_rank(&generation(2, &[&member], 0, &[]), 0))
        .await;
    assert_eq!(slots(&peer.entered().await), [1, 2]);
    finish(worker, peer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_peer_is_reported_and_the_survivor_keeps_its_slots() {
    let expected = quiet_run().await;
    let mut stage = stage().await;
    let (first, mut one, member_one, _) = stage.ready_worker().await;
    // A peer that connects and then dies in the exchange.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let ghost = v1::Member {
        worker: 2,
        name: "ghost".to_owned(),
        address: silent.local_addr().unwrap().to_string(),
    };
    let both = generation(1, &[&ghost, &member_one], 0, &[]);
    one.send(with_rank(&both, 1)).await;
    one.entered().await;
    one.send(Down::Plan(stage.plan(1, 0))).await;
    one.send(lease(1, 0, [1, 2])).await;
    one.slot_done().await;
    one.slot_done().await;
    let generation_one = 1;
    let step = 0;
    one.send(Down::Exchange(v1::Exchange {
        generation: generation_one,
        step,
    }))
    .await;
    tokio::task::spawn_blocking(move || {
        use std::io::{Read, Write};
        let (mut stream, _) = silent.accept().unwrap();
        let mut hello = [0; worker::collective::greeting::HELLO_BYTES];
        stream.read_exact(&mut hello).unwrap();
        let hello = worker::collective::greeting::Hello::decode(&hello).unwrap();
        let answer = worker::collective::greeting::Hello {
            from: hello.to,
            to: hello.from,
            ..hello
        };
        stream.write_all(&answer.encode()).unwrap();
    })
    .await
    .unwrap();
    match one.next().await.unwrap() {
        Up::PeerLost(lost) => assert_eq!((lost.generation, lost.rank), (1, 0)),
        other => panic!("{other:?}"),
    }
    one.send(with_rank(&generation(2, &[&member_one], 0, &[]), 0))
        .await;
    assert_eq!(slots(&one.entered().await), [1, 2]);
    one.send(Down::Plan(stage.plan(2, 0))).await;
    one.send(lease(2, 0, [0, 3])).await;
    one.slot_done().await;
    one.slot_done().await;
    let generation = 2;
    one.send(Down::Exchange(v1::Exchange { generation, step }))
        .await;
    assert_eq!(one.reported().await.weights_digest, expected[0]);
    finish(first, one).await;
}
