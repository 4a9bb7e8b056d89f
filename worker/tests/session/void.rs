//! Orders of a generation or a step that is not the worker's: nothing comes of them.

use proto::v1;
use proto::v1::coordinator_message::Message as Down;

use super::coordinator::*;

#[tokio::test(flavor = "multi_thread")]
async fn what_is_ordered_for_another_step_changes_nothing() {
    let mut stage = stage().await;
    let (worker, mut peer, member, _) = stage.ready_worker().await;
    peer.send(with_rank(&generation(1, &[&member], 0, &[]), 0))
        .await;
    peer.entered().await;
    peer.send(Down::Plan(stage.plan(1, 0))).await;
    peer.send(lease(1, 0, [0, 1])).await;
    for slot in [0, 1] {
        assert_eq!(peer.slot_done().await.slot, slot);
    }
    // As they come where the exchange before them broke.
    let (generation_number, step) = (1, 1);
    peer.send(Down::Plan(stage.plan(generation_number, step)))
        .await;
    peer.send(lease(generation_number, step, [0, 2])).await;
    peer.send(Down::Exchange(v1::Exchange {
        generation: generation_number,
        step,
    }))
    .await;
    // So that they are not void for the next generation alone.
    while_it_is_ready().await;
    peer.send(with_rank(&generation(2, &[&member], 0, &[]), 0))
        .await;
    let entered = peer.entered().await;
    assert_eq!((entered.generation, entered.step), (2, 0));
    assert_eq!(slots(&entered), [0, 1]);
    finish(worker, peer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_generations_that_wait_only_the_newest_is_entered() {
    let mut stage = stage().await;
    let (worker, mut peer, member, _) = stage.ready_worker().await;
    peer.send(with_rank(&generation(1, &[&member], 0, &[]), 0))
        .await;
    peer.entered().await;
    let fake = stage.fake.clone();
    let held = fake.gate.write().await;
    peer.send(Down::Plan(stage.plan(1, 0))).await;
    peer.send(lease(1, 0, [0])).await;
    // The engine waits for the blocks of its slot from now on.
    while_it_is_ready().await;
    for number in [2, 3] {
        peer.send(with_rank(&generation(number, &[&member], 0, &[]), 0))
            .await;
    }
    // Given back without the engine: the session has read what came before.
    peer.send(lease(3, 0, [1])).await;
    let withdraw = v1::Withdraw {
        generation: 3,
        step: 0,
        kind: v1::PlanKind::Train as i32,
        slots: vec![1],
    };
    peer.send(Down::Withdraw(withdraw)).await;
    peer.withdrawn().await;
    drop(held);
    assert_eq!(peer.entered().await.generation, 3);
    finish(worker, peer).await;
}
