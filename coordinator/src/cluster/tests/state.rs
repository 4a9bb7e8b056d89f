//! Checkpoints, the result, and stopping.

use super::*;

fn stop(reason: String) -> Event {
    Event::StopRequested {
        reason,
        resumable: false,
    }
}

#[test]
fn a_checkpoint_is_asked_for_before_its_step_is_left() {
    let mut scene = Scene::with_workers(1);
    scene.cluster.saving.overdue();
    for slot in 0..3 {
        scene.after(done(1, 0, slot));
    }
    scene.check(
        done(1, 0, 3),
        &[
            "w1 exchange 0",
            "w1 save 1",
            "w1 plan train 1",
            "w1 lease [0]",
            "w1 lease [1]",
        ],
    );
}

#[test]
fn a_checkpoint_is_asked_for_once_though_its_exchange_is_repeated() {
    let mut scene = Scene::with_workers(2);
    scene.cluster.settings.min_workers = 1;
    scene.cluster.saving.overdue();
    for (worker, slot) in [(1, 0), (1, 1), (2, 2)] {
        scene.after(done(worker, 0, slot));
    }
    let commands = scene.after(done(2, 0, 3));
    assert!(commands.contains(&"w1 save 1".to_owned()));
    // The exchange breaks; the one who is left computes the other's slots and sums alone.
    scene.after(lost(2));
    scene.after(entered(1, 2, 0, &[0, 1]));
    scene.after(done(1, 0, 2));
    let commands = scene.after(done(1, 0, 3));
    assert_eq!(commands[..2], ["w1 exchange 0", "w1 plan train 1"]);
    scene.after(reported(1, 1, "a"));
    scene.after(stored(1));
    assert_eq!(scene.cluster.saving.pending_count(), 0);
}

#[test]
fn a_stop_stores_the_newest_state_first() {
    let mut scene = Scene::exchanging();
    let reason = "Ctrl-C".to_owned();
    scene.check(stop(reason), &[]);
    scene.check(reported(2, 1, "a"), &["w2 save 1"]);
    scene.check(reported(1, 1, "a"), &["committed 1 loss 1.5"]);
    scene.check(
        stored(1),
        &[
            "w1 finish",
            "w2 finish",
            "end Stopped { step: 1, reason: \"Ctrl-C\", resumable: false }",
        ],
    );
}

#[test]
fn another_worker_is_asked_where_the_one_that_stores_is_lost() {
    let mut scene = Scene::exchanging();
    let reason = "Ctrl-C".to_owned();
    scene.after(stop(reason));
    scene.after(reported(2, 1, "a"));
    scene.after(reported(1, 1, "a"));
    scene.check(lost(2), &["w1 save 1"]);
}

#[test]
fn a_stop_with_nothing_new_ends_at_once() {
    let mut scene = Scene::with_workers(1);
    let reason = "Ctrl-C".to_owned();
    scene.check(
        stop(reason),
        &[
            "w1 finish",
            "end Stopped { step: 0, reason: \"Ctrl-C\", resumable: false }",
        ],
    );
}

#[test]
fn training_waits_rather_than_leave_a_checkpoint_out() {
    let mut scene = Scene::with_workers(1);
    // The course saves after step 3; two earlier states are still on their way.
    for step in 0..2 {
        scene.cluster.saving.overdue();
        for slot in 0..4 {
            scene.after(done(1, step, slot));
        }
        scene.after(reported(1, step + 1, "a"));
    }
    for slot in 0..2 {
        let Event::SlotDone { worker, mut done } = done(1, 2, slot) else {
            unreachable!("done makes a SlotDone")
        };
        done.kind = PlanKind::Eval.to_wire();
        scene.after(Event::SlotDone { worker, done });
    }
    for slot in 0..3 {
        scene.after(done(1, 2, slot));
    }
    scene.check(done(1, 2, 3), &[]);
    let commands = scene.after(stored(1));
    assert_eq!(commands[..2], ["w1 exchange 2", "w1 save 3"]);
}

#[test]
fn an_evaluation_that_was_cut_off_is_made_up_for() {
    for (last_evaluated, plan) in [(None, "w1 plan eval 2"), (Some(2), "w1 plan train 2")] {
        let mut scene = Scene::new(|settings| {
            settings.start_step = 2;
            settings.last_evaluated = last_evaluated;
        });
        scene.after(join(WorkerId(1)));
        scene.after(ready(WorkerId(1), 2));
        let commands = scene.after(entered(1, 1, 2, &[]));
        assert_eq!(commands[0], plan);
    }
}

#[test]
fn the_workers_of_a_coordinator_that_is_to_be_resumed_are_told_to_wait() {
    let mut scene = Scene::with_workers(1);
    let event = Event::StopRequested {
        reason: "SIGTERM".to_owned(),
        resumable: true,
    };
    let mut commands = Vec::new();
    scene.cluster.handle(scene.now, event, &mut commands);
    assert!(
        matches!(&commands[..], [Command::SendFinish { finish, .. }, _] if finish.resumable),
        "{commands:?}"
    );
}

/// Six steps are done, and the result is asked for.
fn with_result() -> Scene {
    let mut scene = Scene::new(|settings| {
        settings.start_step = 6;
        settings.last_evaluated = Some(6);
    });
    scene.after(join(WorkerId(1)));
    scene.after(ready(WorkerId(1), 6));
    scene.after(entered(1, 1, 6, &[]));
    scene
}

fn not_saved(disk: bool) -> Event {
    Event::StateFailed {
        worker: WorkerId(1),
        step: 6,
        reason: "no space".into(),
        disk,
    }
}

#[test]
fn a_result_that_finds_no_room_is_kept_and_asked_for_until_it_does() {
    let mut scene = with_result();
    for pause in [1, 2, 4, 8, 16, 30, 30] {
        scene.check(not_saved(true), &[]);
        scene.check(Event::Ticked, &[]);
        let early = Duration::from_secs(pause) - Duration::from_millis(1);
        assert!(scene.pass(early, &[]).is_empty(), "{pause}");
        let again = scene.pass(Duration::from_millis(1), &[]);
        assert_eq!(again, ["w1 save 6 last"], "{pause}");
    }
    let end = "end Finished { step: 6, weights_digest: \"a\" }";
    scene.check(result_stored(6), &["w1 finish", end]);
}

#[test]
fn a_run_whose_result_found_no_room_for_long_can_be_resumed() {
    let mut scene = with_result();
    let began = scene.now;
    while scene.after(not_saved(true)).is_empty() {
        let again = scene.pass(Duration::from_secs(30), &[]);
        assert_eq!(again, ["w1 save 6 last"]);
        assert!(scene.now < began + Duration::from_secs(700));
    }
    assert!(scene.now >= began + Duration::from_secs(600));

    let mut scene = with_result();
    scene.after(not_saved(true));
    scene.pass(Duration::from_secs(600), &[]);
    let mut commands = Vec::new();
    scene
        .cluster
        .handle(scene.now, not_saved(true), &mut commands);
    let [Command::SendFinish { finish, .. }, Command::End(outcome)] = &commands[..] else {
        panic!("{commands:?}");
    };
    assert!(finish.resumable && !finish.failed);
    assert!(
        matches!(
            outcome,
            Outcome::Stopped {
                step: 6,
                resumable: true,
                ..
            }
        ),
        "{outcome:?}"
    );
}

#[test]
fn a_result_that_never_arrives_whole_fails_the_run() {
    let mut scene = with_result();
    for _ in 0..2 {
        scene.check(not_saved(false), &["w1 save 6 last"]);
    }
    let end = scene.after(not_saved(false));
    assert!(
        end.iter().any(|line| line.starts_with("end Failed")),
        "{end:?}"
    );
}

#[test]
fn a_stop_while_workers_are_awaited_tells_what_is_on_record() {
    for (resumable, told) in [(true, 94), (false, 0)] {
        let mut scene = Scene::new(|settings| {
            settings.earlier.recorded = 94;
            settings.earlier.workers = 1;
        });
        scene.after(Event::Ticked);
        let event = Event::StopRequested {
            reason: "SIGTERM".into(),
            resumable,
        };
        let mut commands = Vec::new();
        scene.cluster.handle(scene.now, event, &mut commands);
        let Some(Command::End(Outcome::Stopped { step, .. })) = commands.last() else {
            panic!("{commands:?}");
        };
        assert_eq!(*step, told);
    }
}

#[test]
fn a_result_on_disk_counts_though_its_worker_is_lost() {
    let mut scene = Scene::new(|settings| {
        settings.start_step = 6;
        settings.last_evaluated = Some(6);
    });
    scene.after(join(WorkerId(1)));
    scene.after(ready(WorkerId(1), 6));
    let commands = scene.after(entered(1, 1, 6, &[]));
    assert_eq!(commands, ["w1 save 6 last"]);
    scene.after(lost(1));
    let commands = scene.after(result_stored(6));
    assert_eq!(
        commands,
        ["end Finished { step: 6, weights_digest: \"a\" }"]
    );
}

#[test]
fn a_state_that_takes_long_to_arrive_is_compared_with_its_own_step() {
    let mut scene = Scene::with_workers(1);
    scene.cluster.saving.overdue();
    for slot in 0..3 {
        scene.after(done(1, 0, slot));
    }
    let said = scene.after(done(1, 0, 3));
    assert!(said.contains(&"w1 save 1".to_owned()), "{said:?}");
    for (step, digest) in [(1, "a"), (2, "b")] {
        scene.after(reported(1, step, digest));
        for slot in 0..4 {
            scene.after(done(1, step, slot));
        }
    }
    assert_eq!(scene.cluster.weights_digest(1), Some("a"));
}

#[test]
fn which_weights_a_step_has_is_decided_when_all_have_reported() {
    let mut scene = Scene::exchanging();
    assert!(scene.cluster.awaits_digest(1));
    scene.after(reported(1, 1, "a"));
    assert!(scene.cluster.awaits_digest(1));
    scene.after(reported(2, 1, "a"));
    assert!(!scene.cluster.awaits_digest(1));
    assert_eq!(scene.cluster.weights_digest(1), Some("a"));
}
