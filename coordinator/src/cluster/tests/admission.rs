//! Who may take part, and from when.

use super::*;

#[test]
fn a_mismatch_at_the_door_names_both_sides() {
    let other = |change: fn(&mut v1::Join)| join_with(WorkerId(2), change);
    let mut scene = Scene::new(|_| {});
    scene.check(join(WorkerId(1)), &["w1 welcome"]);
    scene.check(
        other(|join| join.version = "2".into()),
        &[
            "w2 refuse: worker w2 runs Muster 2 but the coordinator runs 1; install the same version on both",
        ],
    );
    scene.check(
        other(|join| join.numerics_class = "gpu".into()),
        &[
            "w2 refuse: worker w2 is of numerics class gpu but this run is of class cpu; workers of different classes \
             would not give the same bits",
        ],
    );
    scene.check(
        other(|join| join.job_digest = "another".into()),
        &["w2 refuse: worker w2 holds the state of job another but this coordinator runs job job"],
    );
}

#[test]
fn a_worker_that_loaded_something_else_is_refused() {
    let mut scene = Scene::new(|settings| settings.min_workers = 3);
    for id in 1..=2 {
        scene.after(join(WorkerId(id)));
    }
    scene.after(ready(WorkerId(1), 0));
    let Event::WorkerReady { worker, mut ready } = ready(WorkerId(2), 0) else {
        unreachable!("ready makes a WorkerReady")
    };
    ready.layout_digest = "wider".into();
    scene.check(
        Event::WorkerReady { worker, ready },
        &["w2 refuse: worker w2 has the trainable layout wider but worker w1 has layout"],
    );
}

#[test]
fn the_first_generation_waits_for_min_workers() {
    let mut scene = Scene::new(|settings| settings.min_workers = 2);
    scene.check(Event::Ticked, &["waiting 0 of 2"]);
    scene.after(join(WorkerId(1)));
    scene.check(ready(WorkerId(1), 0), &[]);
    scene.after(join(WorkerId(2)));
    scene.check(
        ready(WorkerId(2), 0),
        &[
            "w1 generation 1 at 0 of [1 2] behind []",
            "w2 generation 1 at 0 of [1 2] behind []",
        ],
    );
    scene.check(
        entered(1, 1, 0, &[]),
        &["w1 plan train 0", "w1 lease [0]", "w1 lease [1]"],
    );
}

#[test]
fn a_spare_replaces_the_fallen_at_once() {
    let mut scene = Scene::with(2, |settings| {
        settings.min_workers = 1;
        settings.max_workers = Some(1);
    });
    scene.check(lost(1), &["w2 generation 2 at 0 of [2] behind []"]);
}

#[test]
fn below_min_workers_the_run_waits_and_says_so() {
    let mut scene = Scene::with_workers(2);
    scene.check(lost(2), &["waiting 1 of 2"]);
    scene.after(join(WorkerId(3)));
    scene.check(
        ready(WorkerId(3), 0),
        &[
            "w1 generation 2 at 0 of [1 3] behind []",
            "w3 generation 2 at 0 of [1 3] behind []",
        ],
    );
}
