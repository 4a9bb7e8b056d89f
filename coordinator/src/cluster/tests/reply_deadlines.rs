//! Engines that hang while their process goes on to send heartbeats.

use super::*;

const SECOND: Duration = Duration::from_secs(1);

/// That took twenty seconds.
fn long_done(id: u64, slot: u32) -> Event {
    done_after(id, 0, slot, 20_000_000)
}

/// Three workers, of which the first two have computed the slots of the first step; the exchange is ordered.
fn exchanging() -> Scene {
    exchanging_after(1_000_000)
}

/// The same after slots that took so long; 0: nobody knows how long.
fn exchanging_after(compute_us: u64) -> Scene {
    let mut scene = Scene::with_workers(3);
    scene.cluster.settings.min_workers = 1;
    for (worker, slot) in [(1, 0), (1, 1), (2, 2), (2, 3)] {
        scene.after(done_after(worker, 0, slot, compute_us));
    }
    scene
}

fn expelled(said: &[String]) -> Vec<&String> {
    let expel = |said: &&String| said.contains("expel");
    said.iter().filter(expel).collect()
}

#[test]
fn who_does_not_enter_a_generation_is_expelled_and_the_others_go_on() {
    let mut scene = exchanging();
    scene.after(lost(3));
    scene.after(entered(1, 2, 0, &[0, 1]));
    // Until then it may have been at a slot.
    assert_eq!(scene.pass(90 * SECOND, &[]), [""; 0]);
    assert_eq!(
        scene.pass(60 * SECOND, &[]),
        [
            "w2 expel: its engine does not answer: it did not enter the generation",
            "w1 generation 3 at 0 of [1] behind []"
        ]
    );
}

#[test]
fn those_who_hang_together_go_together() {
    let mut scene = exchanging();
    scene.after(lost(3));
    let said = scene.pass(300 * SECOND, &[]);
    assert_eq!(expelled(&said).len(), 2, "{said:?}");
    assert!(!said.iter().any(|said| said.contains("generation 3")));
    assert_eq!(scene.cluster.members.count(), 0);
}

#[test]
fn who_does_not_end_a_step_that_another_has_ended_is_expelled() {
    let mut scene = exchanging();
    scene.after(reported(1, 1, "a"));
    scene.after(reported(2, 1, "a"));
    assert_eq!(expelled(&scene.pass(59 * SECOND, &[])), [""; 0]);
    let said = scene.pass(2 * SECOND, &[]);
    assert_eq!(
        said[..2],
        [
            "w3 expel: its engine does not answer: it did not end the step",
            "committed 1 loss 1.5"
        ]
    );
    assert!(said[2].starts_with("w1 generation 2 at 1 of [1 2]"));
}

#[test]
fn who_never_loads_the_model_is_expelled() {
    let mut scene = Scene::with_workers(1);
    scene.after(join(WorkerId(2)));
    assert_eq!(expelled(&scene.pass(3590 * SECOND, &[])), [""; 0]);
    let said = scene.pass(20 * SECOND, &[]);
    assert_eq!(
        expelled(&said),
        ["w2 expel: its engine has not loaded the model after an hour"]
    );
}

#[test]
fn a_newcomer_whose_engine_takes_nothing_of_its_feed_is_expelled() {
    // The members have long slots.
    let mut scene = exchanging_after(0);
    scene.after(join(WorkerId(4)));
    scene.after(ready(WorkerId(4), 0));
    for id in [1, 2, 3] {
        scene.after(reported(id, 1, "a"));
    }
    assert!(scene.cluster.feeds.follows(WorkerId(4)));
    assert_eq!(expelled(&scene.pass(1790 * SECOND, &[])), [""; 0]);
    let said = scene.pass(20 * SECOND, &[]);
    assert_eq!(
        expelled(&said),
        ["w4 expel: its engine does not answer: it took nothing of its feed"]
    );
}

#[test]
fn time_in_which_the_coordinator_slept_is_nobodys_fault() {
    let mut scene = exchanging();
    scene.after(reported(1, 1, "a"));
    scene.now += 3600 * SECOND;
    assert_eq!(expelled(&scene.after(Event::Ticked)), [""; 0]);
    scene.after(reported(2, 1, "a"));
    scene.after(reported(3, 1, "a"));
    assert_eq!(expelled(&scene.pass(120 * SECOND, &[])), [""; 0]);
    assert_eq!(scene.cluster.members.count(), 3);
}

#[test]
fn a_worker_alone_that_hangs_in_a_slot_is_named_and_the_run_waits_for_another() {
    let mut scene = Scene::with_workers(1);
    scene.after(long_done(1, 0));
    // Many times what it took for the slot before.
    assert_eq!(scene.pass(64 * 20 * SECOND - SECOND, &[]), [""; 0]);
    assert_eq!(
        scene.pass(2 * SECOND, &[]),
        [
            "w1 expel: its engine does not answer: it has been at slot 1 of step 1 for 21 min and takes 20.0 s as a rule",
            "waiting 0 of 1"
        ]
    );
    scene.after(join(WorkerId(2)));
    scene.check(
        ready(WorkerId(2), 0),
        &["w2 generation 2 at 0 of [2] behind []"],
    );
}

#[test]
fn slots_that_go_on_are_not_taken_for_one_that_hangs() {
    let mut scene = Scene::with_workers(1);
    for slot in 0..3 {
        scene.after(long_done(1, slot));
        assert_eq!(expelled(&scene.pass(1000 * SECOND, &[])), [""; 0]);
    }
}

#[test]
fn where_nobody_knows_what_a_slot_takes_it_may_take_hours() {
    let mut scene = Scene::with_workers(1);
    assert_eq!(scene.pass(5 * 3600 * SECOND, &[]), [""; 0]);
    let said = scene.pass(3700 * SECOND, &[]);
    let reason =
        "w1 expel: its engine does not answer: it has been at slot 0 of step 1 for 360 min";
    assert_eq!(expelled(&said), [reason]);
}

#[test]
fn workers_that_all_hang_in_their_slots_are_sent_away() {
    let mut scene = Scene::with_workers(2);
    scene.after(long_done(1, 0));
    scene.after(long_done(2, 2));
    let said = scene.pass(1300 * SECOND, &[]);
    assert_eq!(expelled(&said).len(), 2, "{said:?}");
    assert_eq!(said.last().map(String::as_str), Some("waiting 0 of 2"));
}

#[test]
fn an_exchange_in_which_every_engine_hangs_is_made_again_by_those_that_answer() {
    let mut scene = Scene::exchanging();
    assert_eq!(scene.pass(599 * SECOND, &[]), [""; 0]);
    assert_eq!(
        scene.pass(2 * SECOND, &[]),
        [
            "w1 generation 2 at 0 of [1 2] behind []",
            "w2 generation 2 at 0 of [1 2] behind []"
        ]
    );
    scene.after(entered(1, 2, 0, &[0, 1]));
    let said = scene.pass(1900 * SECOND, &[]);
    let reason = "w2 expel: its engine does not answer: it did not enter the generation";
    assert_eq!(expelled(&said), [reason]);
}

#[test]
fn an_exchange_that_one_has_ended_is_not_made_again() {
    let mut scene = Scene::exchanging();
    scene.pass(590 * SECOND, &[]);
    scene.after(reported(1, 1, "a"));
    let said = scene.pass(20 * SECOND, &[]);
    assert_eq!(said, [""; 0]);
}

/// Two workers; the first one was asked for the state after the step that both have made.
fn asked_for_a_state() -> Scene {
    let mut scene = Scene::with_workers(2);
    scene.cluster.settings.min_workers = 1;
    scene.cluster.saving.overdue();
    for (worker, slot) in [(1, 0), (1, 1), (2, 2)] {
        scene.after(done(worker, 0, slot));
    }
    let said = scene.after(done(2, 0, 3));
    assert!(said.contains(&"w1 save 1".to_owned()), "{said:?}");
    scene.after(reported(1, 1, "a"));
    scene.after(reported(2, 1, "a"));
    scene
}

#[test]
fn who_does_not_hand_over_the_state_that_it_was_asked_for_is_expelled() {
    let mut scene = asked_for_a_state();
    // It may have a slot in hand first, of which nothing is known.
    assert_eq!(scene.pass(2000 * SECOND, &[]), [""; 0]);
    assert_eq!(
        scene.pass(200 * SECOND, &[]),
        [
            "w1 expel: its engine does not answer: the state that it was asked for did not come",
            "w2 generation 2 at 1 of [2] behind []"
        ]
    );
    // It is had from another with the next step.
    scene.after(entered(2, 2, 1, &[]));
    let mut said = Vec::new();
    for slot in 0..4 {
        said.extend(scene.after(done(2, 1, slot)));
    }
    assert!(said.contains(&"w2 save 2".to_owned()), "{said:?}");
}

#[test]
fn a_disk_that_takes_its_time_with_a_state_is_not_its_workers_fault() {
    let mut scene = asked_for_a_state();
    scene.after(Event::StateArrived {
        worker: WorkerId(1),
        step: 1,
    });
    assert_eq!(expelled(&scene.pass(4 * 3600 * SECOND, &[])), [""; 0]);
}

#[test]
fn a_slot_that_was_asked_back_while_the_coordinator_slept_may_still_be_given_back() {
    let mut scene = Scene::with_workers(2);
    for (worker, slot) in [(1, 0), (2, 2), (1, 1)] {
        scene.after(long_done(worker, slot));
    }
    assert_eq!(scene.pass(41 * SECOND, &[]), ["w2 withdraw [3]"]);
    scene.now += 3600 * SECOND;
    scene.check(
        Event::Heard {
            worker: WorkerId(1),
        },
        &[],
    );
    scene.check(withdrawn(2, &[3]), &["w1 lease [3]"]);
}
