//! Engines that hang while their process goes on to send heartbeats.

use super::*;

const SECOND: Duration = Duration::from_secs(1);

/// Three workers, of which the first two have computed the slots of the first step; the exchange is ordered.
fn exchanging() -> Scene {
    let mut scene = Scene::with_workers(3);
    scene.cluster.settings.min_workers = 1;
    for (worker, slot) in [(1, 0), (1, 1), (2, 2), (2, 3)] {
        let Event::SlotDone { worker, mut done } = done(worker, 0, slot) else {
            unreachable!("done makes a SlotDone")
        };
        done.compute_us = 1_000_000;
        scene.after(Event::SlotDone { worker, done });
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
    let mut scene = exchanging();
    scene.after(join(WorkerId(4)));
    scene.after(ready(WorkerId(4), 0));
    for id in [1, 2, 3] {
        scene.after(reported(id, 1, "a"));
    }
    assert!(scene.cluster.joining.follows(WorkerId(4)));
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
