//! A new term, and the workers that outlived the one before.

use super::*;
use crate::cluster::parts::generation::LOSSES_GATHER;

const SECOND: Duration = Duration::from_secs(1);

/// Step 1 of six is on record, two workers computed it, and the newest state on disk is that of the start.
fn new_term() -> Scene {
    Scene::new(|settings| {
        settings.earlier = PreviousTerms {
            recorded: 1,
            weights_digest: Some("weights-1".into()),
            generation: 3,
            workers: 2,
            numerics_class: Some("cpu".into()),
            ..PreviousTerms::default()
        };
    })
}

fn rejoin(id: u64, run: &str) -> Event {
    join_with(WorkerId(id), |join| {
        join.job_digest = "job".into();
        join.run = run.into();
    })
}

/// Ready after `step` updates, the last of which it made with these slots.
fn ready_again(id: u64, step: u64, slots: &[u32]) -> Event {
    let Event::WorkerReady { worker, mut ready } = ready(WorkerId(id), step) else {
        unreachable!("ready makes a WorkerReady")
    };
    ready.updates = vec![v1::Update {
        report: Some(v1::StepReport {
            step,
            weights_digest: format!("weights-{step}"),
            ..Default::default()
        }),
        slots: slots.iter().map(|slot| held_slot(*slot)).collect(),
    }];
    Event::WorkerReady { worker, ready }
}

#[test]
fn a_new_term_counts_the_slots_that_its_workers_hold() {
    let mut scene = new_term();
    scene.check(rejoin(1, "run"), &["w1 welcome"]);
    scene.check(ready_again(1, 1, &[]), &[]);
    scene.check(rejoin(2, "run"), &["w2 welcome"]);
    scene.check(
        ready_again(2, 1, &[]),
        &[
            "w1 generation 4 at 1 of [1 2] behind []",
            "w2 generation 4 at 1 of [1 2] behind []",
        ],
    );
    // Nothing is leased before it is known what the other has.
    scene.check(entered(1, 4, 1, &[0, 3]), &["w1 plan train 1"]);
    scene.check(entered(2, 4, 1, &[2]), &["w2 plan train 1", "w1 lease [1]"]);
    let commands = scene.after(done(1, 1, 1));
    assert_eq!(commands[..2], ["w1 exchange 1", "w2 exchange 1"]);
}

#[test]
fn a_step_whose_slots_are_all_held_is_exchanged_without_computing() {
    let mut scene = new_term();
    for id in 1..=2 {
        scene.after(rejoin(id, "run"));
        scene.after(ready_again(id, 1, &[]));
    }
    scene.after(entered(1, 4, 1, &[0, 1]));
    let commands = scene.after(entered(2, 4, 1, &[2, 3]));
    assert_eq!(
        commands[..3],
        ["w2 plan train 1", "w1 exchange 1", "w2 exchange 1"]
    );
}

#[test]
fn no_exchange_begins_before_every_member_has_entered() {
    let mut scene = new_term();
    for id in 1..=2 {
        scene.after(rejoin(id, "run"));
        scene.after(ready_again(id, 1, &[]));
    }
    scene.check(entered(1, 4, 1, &[0, 1, 2, 3]), &["w1 plan train 1"]);
    let commands = scene.after(entered(2, 4, 1, &[]));
    assert_eq!(
        commands[..3],
        ["w2 plan train 1", "w1 exchange 1", "w2 exchange 1"]
    );
}

#[test]
fn a_slot_that_another_has_empties_the_accumulator_that_brings_it() {
    let mut scene = new_term();
    for id in 1..=2 {
        scene.after(rejoin(id, "run"));
        scene.after(ready_again(id, 1, &[]));
    }
    scene.after(entered(1, 4, 1, &[0, 1]));
    scene.check(
        entered(2, 4, 1, &[1, 2, 3]),
        &["w2 plan train 1 clear", "w1 lease [2]", "w2 lease [3]"],
    );
    // Before it reads that, other generations begin: it still brings the same slots.
    scene.after(rejoin(3, "run"));
    scene.after(ready_again(3, 1, &[]));
    scene.now += LOSSES_GATHER;
    scene.after(lost(1));
    scene.check(entered(2, 6, 1, &[1, 2, 3]), &["w2 plan train 1"]);
    scene.check(entered(3, 6, 1, &[]), &["w3 plan train 1", "w2 lease [0]"]);
}

#[test]
fn a_record_that_the_journal_lost_is_completed_by_those_who_were_there() {
    let mut scene = new_term();
    for id in 1..=2 {
        scene.after(rejoin(id, "run"));
    }
    scene.check(ready_again(1, 2, &[0, 2]), &[]);
    scene.check(
        ready_again(2, 2, &[1, 3]),
        &[
            "committed 2 loss 1.5",
            "w1 generation 4 at 2 of [1 2] behind []",
            "w2 generation 4 at 2 of [1 2] behind []",
        ],
    );
}

#[test]
fn the_newest_state_is_the_runs_and_who_is_behind_copies_it() {
    let mut scene = new_term();
    scene.after(join(WorkerId(1)));
    scene.after(ready(WorkerId(1), 0));
    for id in 2..=3 {
        scene.after(rejoin(id, "run"));
    }
    scene.check(ready_again(2, 1, &[]), &[]);
    // Nobody knows the slots of the other worker, so step 2 has no record.
    scene.check(
        ready_again(3, 2, &[1, 3]),
        &[
            "w3 generation 4 at 2 of [3] behind []",
            "w3 feed 1 to w1",
            "w1 follow 1 of w3 from 2",
            "w3 feed 2 to w2",
            "w2 follow 2 of w3 from 2",
        ],
    );
    assert_eq!(scene.cluster.stats.recorded(), 2);
}

#[test]
fn one_with_the_newest_state_waits_a_moment_for_the_others() {
    let mut scene = new_term();
    scene.after(Event::Ticked);
    // However late the first one comes: the others may be as late.
    scene.now += 3 * SECOND;
    scene.after(rejoin(1, "run"));
    scene.check(ready_again(1, 1, &[]), &[]);
    scene.now += SECOND / 2;
    scene.check(Event::Ticked, &[]);
    assert_eq!(
        scene.pass(SECOND / 2, &[]),
        ["w1 generation 4 at 1 of [1] behind []"]
    );
}

#[test]
fn where_nobody_comes_back_the_checkpoint_is_gone_on_from() {
    let mut scene = new_term();
    let mut commands = Vec::new();
    scene
        .cluster
        .handle(scene.now, Event::Ticked, &mut commands);
    assert!(
        matches!(&commands[..], [Command::Emit(RunEvent::Notice(text))]
            if text.contains("0 of 2 are back; in 1 s the run goes on")),
        "{commands:?}"
    );
    scene.check(join(WorkerId(1)), &["w1 welcome"]);
    scene.check(ready(WorkerId(1), 0), &[]);
    assert_eq!(
        scene.pass(SECOND, &[]),
        ["w1 generation 4 at 0 of [1] behind []"]
    );
    // What was recorded is not recorded again.
    scene.after(entered(1, 4, 0, &[]));
    for slot in 0..4 {
        scene.after(done(1, 0, slot));
    }
    scene.check(reported(1, 1, "weights-1"), &[]);
    for slot in 0..4 {
        scene.after(done(1, 1, slot));
    }
    scene.check(reported(1, 2, "weights-2"), &["committed 2 loss 1.5"]);
}

#[test]
fn a_newcomer_that_is_ready_after_that_moment_begins_at_once() {
    let mut scene = new_term();
    scene.after(Event::Ticked);
    assert_eq!(scene.pass(3 * SECOND, &[]), ["waiting 0 of 1"]);
    scene.after(join(WorkerId(1)));
    scene.check(
        ready(WorkerId(1), 0),
        &["w1 generation 4 at 0 of [1] behind []"],
    );
}

#[test]
fn whoever_is_back_and_has_a_slot_in_hand_is_waited_for_a_little_longer() {
    for comes in [true, false] {
        let mut scene = new_term();
        scene.after(Event::Ticked);
        scene.after(join(WorkerId(1)));
        scene.after(ready(WorkerId(1), 0));
        scene.after(rejoin(2, "run"));
        assert_eq!(scene.pass(3 * SECOND, &[]), [""; 0]);
        if comes {
            scene.check(ready_again(2, 1, &[]), &[]);
        }
        let began = match comes {
            true => vec![
                "w2 generation 4 at 1 of [2] behind []",
                "w2 feed 1 to w1",
                "w1 follow 1 of w2 from 1",
            ],
            false => vec!["w1 generation 4 at 0 of [1] behind []"],
        };
        assert_eq!(scene.pass(SECOND, &[]), began);
    }
}

#[test]
fn a_worker_that_comes_back_in_mid_step_brings_the_slots_that_nobody_has() {
    let mut scene = new_term();
    scene.after(rejoin(1, "run"));
    scene.after(ready_again(1, 1, &[]));
    scene.pass(SECOND, &[]);
    scene.check(
        entered(1, 4, 1, &[]),
        &["w1 plan train 1", "w1 lease [0]", "w1 lease [1]"],
    );
    scene.after(done(1, 1, 0));
    scene.after(rejoin(2, "run"));
    scene.check(
        ready_again(2, 1, &[]),
        &[
            "w1 generation 5 at 1 of [1 2] behind []",
            "w2 generation 5 at 1 of [1 2] behind []",
        ],
    );
    scene.check(entered(1, 5, 1, &[0, 1]), &["w1 plan train 1"]);
    let commands = scene.after(entered(2, 5, 1, &[2, 3]));
    assert_eq!(
        commands[..3],
        ["w2 plan train 1", "w1 exchange 1", "w2 exchange 1"]
    );
}

#[test]
fn a_step_that_is_computed_again_to_other_weights_is_told() {
    let mut scene = new_term();
    scene.after(Event::Ticked);
    scene.after(join(WorkerId(1)));
    scene.after(ready(WorkerId(1), 0));
    scene.pass(SECOND, &[]);
    scene.after(entered(1, 4, 0, &[]));
    for slot in 0..4 {
        scene.after(done(1, 0, slot));
    }
    let mut commands = Vec::new();
    let report = reported(1, 1, "odd");
    scene.cluster.handle(scene.now, report, &mut commands);
    let told = |command: &Command| {
        matches!(command, Command::Emit(RunEvent::Notice(text))
            if text.starts_with("the weights after step 1 are odd now and were weights-1"))
    };
    assert!(commands.iter().any(told), "{commands:?}");
}

#[test]
fn wrong_weights_of_a_step_that_the_others_have_left_behind_do_not_come_back() {
    let mut scene = new_term();
    scene.after(Event::Ticked);
    scene.after(join(WorkerId(1)));
    scene.after(ready(WorkerId(1), 0));
    scene.pass(SECOND, &[]);
    scene.after(entered(1, 4, 0, &[]));
    for step in 0..2 {
        for slot in 0..4 {
            scene.after(done(1, step, slot));
        }
        scene.after(reported(1, step + 1, &format!("weights-{}", step + 1)));
    }
    scene.after(rejoin(2, "run"));
    let Event::WorkerReady { worker, mut ready } = ready_again(2, 1, &[]) else {
        unreachable!("ready_again makes a WorkerReady")
    };
    ready.weights_digest = "odd".into();
    scene.check(
        Event::WorkerReady { worker, ready },
        &["w2 expel: its weights after step 1 are odd where the others have weights-1; this machine computes wrongly"],
    );
}

#[test]
fn workers_of_another_class_may_not_begin_before_those_of_the_first_had_time_to_come_back() {
    let mut scene = new_term();
    scene.after(Event::Ticked);
    scene.now += 5 * SECOND;
    let other = |id| join_with(WorkerId(id), |join| join.numerics_class = "gpu".into());
    let refused = scene.after(other(1));
    assert!(
        refused[0].ends_with("may still come back: start this one again in 10 s"),
        "{refused:?}"
    );
    scene.now += 10 * SECOND;
    scene.check(other(2), &["w2 welcome"]);
    scene.check(
        ready(WorkerId(2), 0),
        &["w2 generation 4 at 0 of [2] behind []"],
    );
}

#[test]
fn a_state_that_nobody_comes_to_any_more_is_asked_for_no_longer_but_a_later_one_is() {
    let mut scene = new_term();
    scene.after(Event::Ticked);
    scene.after(join(WorkerId(1)));
    scene.after(ready(WorkerId(1), 0));
    scene.pass(SECOND, &[]);
    scene.after(entered(1, 4, 0, &[]));
    scene.cluster.saving.overdue();
    let mut commands = Vec::new();
    for slot in 0..4 {
        commands = scene.after(done(1, 0, slot));
    }
    assert_eq!(commands[..2], ["w1 exchange 0", "w1 save 1"]);
    // It gets the state after step 4 instead of making that exchange.
    scene.after(rejoin(2, "run"));
    scene.check(
        ready_again(2, 4, &[0, 1, 2, 3]),
        &[
            "committed 4 loss 1.5",
            "w1 generation 5 at 4 of [1 2] behind [0]",
            "w2 generation 5 at 4 of [1 2] behind [0]",
        ],
    );
    assert_eq!(scene.cluster.saving.pending_count(), 0);
}

#[test]
fn whoever_comes_back_late_spares_the_others_the_steps_it_has() {
    let mut scene = new_term();
    scene.after(join(WorkerId(1)));
    scene.after(ready(WorkerId(1), 0));
    scene.pass(SECOND, &[]);
    scene.after(entered(1, 4, 0, &[]));
    scene.after(rejoin(2, "run"));
    scene.check(
        ready_again(2, 1, &[]),
        &[
            "w1 generation 5 at 1 of [1 2] behind [0]",
            "w2 generation 5 at 1 of [1 2] behind [0]",
        ],
    );
}

#[test]
fn a_finished_exchange_counts_when_its_worker_comes_back_with_it() {
    let mut scene = Scene::exchanging();
    // Worker 2 has finished the exchange, but its connection breaks before it can say so.
    scene.check(lost(2), &["w1 generation 2 at 0 of [1] behind []"]);
    scene.after(rejoin(3, "run"));
    scene.check(
        ready_again(3, 1, &[2, 3]),
        &[
            "committed 1 loss 1.5",
            "w1 generation 3 at 1 of [1 3] behind [0]",
            "w3 generation 3 at 1 of [1 3] behind [0]",
        ],
    );
}

#[test]
fn the_state_of_another_run_is_dropped() {
    let mut scene = new_term();
    scene.check(
        rejoin(1, "another"),
        &["w1 expel: it holds the state of another run of this job (another there, run here)"],
    );
}

#[test]
fn wrong_weights_do_not_come_back() {
    let mut scene = new_term();
    scene.after(rejoin(1, "run"));
    let Event::WorkerReady { worker, mut ready } = ready_again(1, 1, &[]) else {
        unreachable!("ready_again makes a WorkerReady")
    };
    ready.weights_digest = "odd".into();
    scene.check(
        Event::WorkerReady { worker, ready },
        &["w1 expel: its weights after step 1 are odd where the others have weights-1; this machine computes wrongly"],
    );
}

#[test]
fn slots_of_a_step_that_is_not_due_are_forgotten_when_it_begins() {
    // The evaluation after step 2 was not recorded, but the worker had gone on to the next step.
    let mut scene = new_term();
    scene.cluster.settings.min_workers = 1;
    for id in 1..=2 {
        scene.after(rejoin(id, "run"));
    }
    scene.after(ready_again(1, 2, &[0, 1]));
    scene.after(ready_again(2, 2, &[2, 3]));
    scene.now += LOSSES_GATHER;
    scene.after(lost(2));
    scene.check(
        entered(1, 5, 2, &[3]),
        &["w1 plan eval 2", "w1 lease [0]", "w1 lease [1]"],
    );
    let mut commands = Vec::new();
    for slot in 0..2 {
        let Event::SlotDone { worker, mut done } = done(1, 2, slot) else {
            unreachable!("done makes a SlotDone")
        };
        done.kind = PlanKind::Eval.to_wire();
        commands = scene.after(Event::SlotDone { worker, done });
    }
    assert_eq!(commands[0], "w1 plan train 2 clear");
}

#[test]
fn a_worker_that_joins_anew_replaces_itself() {
    let mut scene = Scene::with_workers(2);
    scene.cluster.settings.min_workers = 1;
    let Event::WorkerJoined { mut join, .. } = rejoin(3, "run") else {
        unreachable!("rejoin makes a WorkerJoined")
    };
    join.name = "w2".to_owned();
    scene.check(
        Event::WorkerJoined {
            worker: WorkerId(3),
            join,
            address: "10.0.0.2:9".into(),
        },
        &[
            "w2 expel: it joined anew",
            "w1 generation 2 at 0 of [1] behind []",
            "w3 welcome",
        ],
    );
}
