//! Who says nothing, and who could not be heard.

use super::*;
use crate::cluster::parts::failure_detector::deadline;

const SECOND: Duration = Duration::from_secs(1);

/// Two workers after one step, which makes the deadline the shortest.
fn measured(workers: u64) -> Scene {
    let mut scene = Scene::with_workers(workers);
    scene.cluster.settings.min_workers = 1;
    scene.now += SECOND / 10;
    let ranks: Vec<u64> = (1..=workers).collect();
    for slot in 0..4 {
        let holder = ranks.iter().find(|id| {
            scene
                .cluster
                .progress
                .ledger()
                .is_leased(WorkerId(**id), slot)
        });
        scene.after(done(*holder.unwrap(), 0, slot));
    }
    for id in ranks {
        scene.after(reported(id, 1, "a"));
    }
    scene
}

#[test]
fn the_deadline_is_two_mean_steps_within_bounds() {
    let seconds = |mean| deadline(mean).as_secs_f64();
    assert_eq!(seconds(Some(0.2)), 3.0);
    assert_eq!(seconds(Some(4.0)), 8.0);
    assert_eq!(seconds(Some(1000.0)), 30.0);
    assert_eq!(seconds(Some(f64::MAX)), 30.0);
    assert_eq!(seconds(None), 30.0);
}

#[test]
fn who_is_silent_beyond_the_deadline_is_expelled_and_the_others_go_on() {
    let mut scene = measured(2);
    assert_eq!(scene.pass(SECOND * 29 / 10, &[2]), [""; 0]);
    let commands = scene.pass(SECOND / 5, &[2]);
    assert_eq!(
        commands[0],
        "w2 expel: nothing was heard of it for 3.0 s, 3.0 s are allowed"
    );
    assert_eq!(commands[1], "w1 generation 2 at 1 of [1] behind []");
    assert_eq!(commands.len(), 2, "{commands:?}");
}

#[test]
fn heartbeats_alone_keep_a_worker() {
    let mut scene = measured(2);
    assert_eq!(scene.pass(SECOND * 600, &[]), [""; 0]);
}

#[test]
fn what_a_woken_worker_still_says_means_nothing() {
    let mut scene = measured(2);
    scene.pass(SECOND * 4, &[2]);
    scene.check(done(2, 1, 2), &[]);
    scene.check(reported(2, 2, "b"), &[]);
    scene.check(entered(2, 2, 1, &[2, 3]), &[]);
    scene.check(
        Event::Heard {
            worker: WorkerId(2),
        },
        &[],
    );
    assert_eq!(scene.pass(SECOND * 4, &[2]), [""; 0]);
}

#[test]
fn a_newcomer_that_hangs_while_it_loads_disturbs_nobody() {
    let mut scene = measured(2);
    scene.after(join(WorkerId(3)));
    assert_eq!(
        scene.pass(SECOND * 4, &[3]),
        ["w3 expel: nothing was heard of it for 3.0 s, 3.0 s are allowed"]
    );
}

#[test]
fn a_coordinator_that_slept_expels_nobody() {
    let mut scene = measured(3);
    scene.pass(SECOND * 2, &[3]);
    scene.now += SECOND * 3600;
    scene.check(Event::Ticked, &[]);
    let commands = scene.pass(SECOND * 29 / 10, &[3]);
    assert_eq!(commands, [""; 0]);
    let commands = scene.pass(SECOND / 5, &[3]);
    assert!(commands[0].starts_with("w3 expel"), "{commands:?}");
    assert_eq!(scene.cluster.members.count(), 2);
}

#[test]
fn workers_that_fall_silent_together_share_one_generation() {
    let mut scene = measured(10);
    // Their heartbeats are spread over a second.
    for id in 6..=10 {
        scene.pass(SECOND / 6, &[]);
        scene.after(Event::Heard {
            worker: WorkerId(id),
        });
    }
    let commands = scene.pass(SECOND * 6, &[6, 7, 8, 9, 10]);
    let count = |start: &str| {
        commands
            .iter()
            .filter(|said| said.starts_with(start))
            .count()
    };
    assert_eq!(count("w1 generation"), 1, "{commands:?}");
    assert_eq!(scene.cluster.members.count(), 5);
}
