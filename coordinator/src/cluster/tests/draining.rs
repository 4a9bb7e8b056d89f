//! Workers that are asked to stop.

use super::*;

#[test]
fn what_a_leaving_worker_holds_counts_and_the_rest_goes_to_others() {
    let mut scene = Scene::with_workers(2);
    scene.cluster.settings.min_workers = 1;
    // Worker 1 has 0 and 1, worker 2 has 2 and 3.
    scene.check(draining(2), &["w2 withdraw [3]"]);
    scene.check(done(2, 0, 2), &[]);
    scene.after(done(1, 0, 0));
    scene.check(withdrawn(2, &[3]), &["w1 lease [3]"]);
    scene.check(draining(2), &[]);
    scene.after(done(1, 0, 1));
    scene.check(
        done(1, 0, 3),
        &[
            "w1 exchange 0",
            "w2 exchange 0",
            "w1 plan train 1",
            "w2 plan train 1",
            "w1 lease [0]",
            "w1 lease [1]",
        ],
    );
    scene.check(reported(2, 1, "a"), &[]);
    scene.check(
        reported(1, 1, "a"),
        &[
            "committed 1 loss 1.5",
            "w2 finish",
            "w1 generation 2 at 1 of [1] behind []",
        ],
    );
}

#[test]
fn a_worker_that_holds_nothing_of_the_step_goes_at_once() {
    let mut scene = Scene::with_workers(2);
    scene.cluster.settings.min_workers = 1;
    scene.check(draining(2), &["w2 withdraw [3]"]);
    scene.check(withdrawn(2, &[3]), &[]);
    scene.check(
        withdrawn(2, &[2]),
        &["w2 finish", "w1 generation 2 at 0 of [1] behind []"],
    );
}

/// Worker 1 alone, after one step, has one slot of the next and is asked to stop.
fn alone_and_leaving() -> Scene {
    let mut scene = Scene::with_workers(1);
    for slot in 0..4 {
        scene.after(done(1, 0, slot));
    }
    scene.after(reported(1, 1, "weights-1"));
    scene.now += LOSSES_GATHER;
    // Slot 0 of the next step is in hand; it would be of no use to anybody.
    scene.check(draining(1), &["w1 withdraw [1]"]);
    let Event::SlotsWithdrawn {
        worker,
        mut withdrawn,
    } = withdrawn(1, &[1])
    else {
        unreachable!("withdrawn makes SlotsWithdrawn")
    };
    withdrawn.step = 1;
    scene.check(Event::SlotsWithdrawn { worker, withdrawn }, &[]);
    scene
}

#[test]
fn the_only_holder_of_the_state_saves_it_first() {
    let mut scene = alone_and_leaving();
    scene.check(done(1, 1, 0), &["w1 save 1"]);
    scene.check(stored(1), &["w1 finish", "waiting 0 of 1"]);
    // Who comes next goes on from there.
    scene.after(join(WorkerId(2)));
    scene.check(
        ready(WorkerId(2), 1),
        &["w2 generation 2 at 1 of [2] behind []"],
    );
}

#[test]
fn who_loaded_an_older_state_than_the_one_that_was_saved_loads_again() {
    let mut scene = alone_and_leaving();
    scene.after(done(1, 1, 0));
    scene.after(join(WorkerId(2)));
    scene.check(stored(1), &["w1 finish"]);
    scene.check(
        ready(WorkerId(2), 0),
        &[
            "w2 expel: the state after step 1 is on disk and nobody else has it: it loads that one",
            "waiting 0 of 1",
        ],
    );
}

#[test]
fn a_state_that_cannot_be_saved_is_asked_for_once() {
    let mut scene = alone_and_leaving();
    scene.check(done(1, 1, 0), &["w1 save 1"]);
    let failed = Event::StateFailed {
        worker: WorkerId(1),
        step: 1,
        reason: "the disk is full".into(),
        disk: true,
    };
    scene.check(failed, &[]);
    scene.check(lost(1), &["waiting 0 of 1"]);
}

#[test]
fn a_spare_goes_at_once() {
    let mut scene = Scene::with(2, |settings| settings.max_workers = Some(1));
    scene.check(draining(2), &["w2 finish"]);
}
