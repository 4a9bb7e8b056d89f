//! Newcomers that copy their state while the others go on.

use super::*;
use crate::cluster::parts::feeds::MAX_FEEDS_PER_SOURCE;

fn synced(id: u64, attempt: u64, step: u64) -> Event {
    let report = v1::StepReport {
        step,
        weights_digest: "b".to_owned(),
        ..Default::default()
    };
    let synced = v1::Synced {
        attempt,
        step,
        report: (step > 1).then_some(report),
    };
    let worker = WorkerId(id);
    Event::WorkerSynced { worker, synced }
}

fn feed_lost(id: u64, attempt: u64) -> Event {
    let reason = "its source has left".to_owned();
    let lost = v1::FeedLost { attempt, reason };
    let worker = WorkerId(id);
    Event::FeedLost { worker, lost }
}

impl Scene {
    /// Two workers compute the slots of `step`; nobody has reported yet.
    fn compute(&mut self, step: u64) {
        // At first worker 1 had entered before worker 2.
        let leased = match step {
            0 => [1, 1, 2, 2],
            _ => [1, 2, 1, 2],
        };
        for (slot, worker) in leased.into_iter().enumerate() {
            self.after(done(worker, step, slot as u32));
        }
    }

    /// Workers 1 and 2 have made one update; worker 3 came before it, has no state, and follows worker 2.
    fn following() -> Self {
        let mut scene = Scene::with_workers(2);
        scene.cluster.settings.min_workers = 1;
        scene.after(join(WorkerId(3)));
        scene.check(ready(WorkerId(3), 0), &[]);
        scene.compute(0);
        scene.check(
            reported(2, 1, "a"),
            &["w2 feed 1 to w3", "w3 follow 1 of w2 from 1"],
        );
        scene.check(reported(1, 1, "a"), &["committed 1 loss 1.5"]);
        scene
    }
}

#[test]
fn whoever_has_the_state_of_the_others_needs_no_feed() {
    let mut scene = Scene::with(1, |_| ());
    scene.after(join(WorkerId(2)));
    scene.check(ready(WorkerId(2), 0), &[]);
}

#[test]
fn nobody_waits_for_a_newcomer_that_lacks_state() {
    let mut scene = Scene::following();
    scene.compute(1);
    scene.check(reported(1, 2, "b"), &[]);
    // No new generation.
    scene.check(reported(2, 2, "b"), &["committed 2 loss 1.5"]);
}

#[test]
fn a_newcomer_that_has_the_committed_state_enters_when_a_step_is_settled() {
    let mut scene = Scene::following();
    scene.check(synced(3, 1, 1), &[]);
    scene.compute(1);
    scene.check(synced(3, 1, 2), &[]);
    scene.check(reported(1, 2, "b"), &[]);
    scene.check(
        reported(2, 2, "b"),
        &[
            "committed 2 loss 1.5",
            "w1 generation 2 at 2 of [1 2 3] behind []",
            "w2 generation 2 at 2 of [1 2 3] behind []",
            "w3 generation 2 at 2 of [1 2 3] behind []",
        ],
    );
}

#[test]
fn one_that_lacks_the_last_update_enters_with_it() {
    let mut scene = Scene::following();
    scene.check(synced(3, 1, 1), &[]);
    scene.compute(1);
    scene.check(reported(1, 2, "b"), &[]);
    scene.check(
        reported(2, 2, "b"),
        &[
            "committed 2 loss 1.5",
            "w1 generation 2 at 2 of [1 2 3] behind [] fed [2]",
            "w2 generation 2 at 2 of [1 2 3] behind [] fed [2]",
            "w3 generation 2 at 2 of [1 2 3] behind [] fed [2]",
        ],
    );
    scene.check(synced(3, 1, 2), &[]);
    for id in 1..=3 {
        assert!(!scene.after(entered(id, 2, 2, &[])).is_empty());
    }
}

#[test]
fn a_newcomer_that_dies_disturbs_nobody() {
    let mut scene = Scene::following();
    scene.check(lost(3), &[]);
    scene.compute(1);
    scene.check(reported(1, 2, "b"), &[]);
    scene.check(reported(2, 2, "b"), &["committed 2 loss 1.5"]);
}

#[test]
fn another_source_is_chosen_where_the_first_dies() {
    let mut scene = Scene::following();
    scene.after(synced(3, 1, 1));
    scene.cluster.settings.max_workers = Some(2);
    // It has the committed state, so it takes the place of the lost one at once.
    scene.check(
        lost(2),
        &[
            "w1 generation 2 at 1 of [1 3] behind []",
            "w3 generation 2 at 1 of [1 3] behind []",
        ],
    );

    let mut scene = Scene::following();
    scene.check(
        lost(2),
        &[
            "w1 generation 2 at 1 of [1] behind []",
            "w1 feed 2 to w3",
            "w3 follow 2 of w1 from 1",
        ],
    );
    // News of the earlier feed mean nothing.
    scene.check(feed_lost(3, 1), &[]);
    scene.check(synced(3, 1, 1), &[]);
}

#[test]
fn source_and_newcomer_may_die_in_any_order() {
    for deaths in [[2, 3], [3, 2]] {
        let mut scene = Scene::following();
        for id in deaths {
            scene.after(lost(id));
        }
        scene.after(entered(1, 2, 1, &[]));
        for slot in 0..4 {
            scene.after(done(1, 1, slot));
        }
        scene.check(reported(1, 2, "b"), &["committed 2 loss 1.5"]);
    }
}

#[test]
fn a_feed_that_breaks_off_begins_anew_elsewhere_and_not_for_ever() {
    let mut scene = Scene::following();
    scene.check(
        feed_lost(3, 1),
        &["w1 feed 2 to w3", "w3 follow 2 of w1 from 1"],
    );
    // From then on after a pause.
    for (attempt, source, pause) in [(2, 2, 500), (3, 1, 1000), (4, 2, 2000)] {
        let next = attempt + 1;
        let began = scene.now;
        scene.check(feed_lost(3, attempt), &[]);
        scene.now = began + Duration::from_millis(pause - 1);
        scene.check(Event::Ticked, &[]);
        scene.now += Duration::from_millis(1);
        assert!(scene.cluster.wakes_at().is_some_and(|at| at <= scene.now));
        assert_eq!(
            scene.after(Event::Ticked),
            [
                format!("w{source} feed {next} to w3"),
                format!("w3 follow {next} of w{source} from 1")
            ]
        );
    }
    scene.check(
        feed_lost(3, 5),
        &["w3 expel: its state could not be copied 5 times: its source has left"],
    );
}

#[test]
fn one_that_entered_for_its_last_update_waits_again_where_that_is_lost() {
    let mut scene = Scene::following();
    scene.after(synced(3, 1, 1));
    scene.compute(1);
    scene.after(reported(1, 2, "b"));
    scene.after(reported(2, 2, "b"));
    scene.check(
        feed_lost(3, 1),
        &[
            "w1 generation 3 at 2 of [1 2] behind []",
            "w2 generation 3 at 2 of [1 2] behind []",
            "w1 feed 2 to w3",
            "w3 follow 2 of w1 from 2",
        ],
    );
}

#[test]
fn one_that_has_what_it_entered_for_enters_once_though_its_source_ends_the_feed_first() {
    // The last update came before the generation did, or after it.
    for comes_before in [true, false] {
        let mut scene = Scene::following();
        scene.after(synced(3, 1, 1));
        scene.compute(1);
        scene.after(reported(1, 2, "b"));
        if comes_before {
            scene.after(synced(3, 1, 2));
        }
        scene.after(reported(2, 2, "b"));
        if !comes_before {
            scene.check(synced(3, 1, 2), &[]);
        }
        // Its source was told of the generation and has nothing more for it, while the newcomer has yet to be told.
        scene.check(feed_lost(3, 1), &[]);
        for id in 1..=3 {
            assert!(!scene.after(entered(id, 2, 2, &[])).is_empty());
        }
        assert_eq!(scene.cluster.generation.number(), 2);
        assert!(scene.cluster.members.all_entered());
    }
}

#[test]
fn one_that_entered_waits_again_where_its_source_dies() {
    let mut scene = Scene::following();
    scene.after(synced(3, 1, 1));
    scene.compute(1);
    scene.after(reported(1, 2, "b"));
    scene.after(reported(2, 2, "b"));
    scene.now += Duration::from_secs(1);
    scene.check(
        lost(2),
        &[
            "w1 generation 3 at 2 of [1] behind []",
            "w1 feed 2 to w3",
            "w3 follow 2 of w1 from 2",
        ],
    );
}

#[test]
fn one_that_has_an_update_which_died_with_its_source_waits_until_the_others_have_it() {
    let mut scene = Scene::following();
    scene.after(synced(3, 1, 1));
    scene.compute(1);
    // Worker 2 made the update and fed it, but its report never came.
    scene.after(synced(3, 1, 2));
    scene.check(lost(2), &["w1 generation 2 at 1 of [1] behind []"]);
    scene.after(entered(1, 2, 1, &[0, 2]));
    for slot in [1, 3] {
        scene.after(done(1, 1, slot));
    }
    scene.check(
        reported(1, 2, "b"),
        &[
            "committed 2 loss 1.5",
            "w1 generation 3 at 2 of [1 3] behind []",
            "w3 generation 3 at 2 of [1 3] behind []",
        ],
    );

    // The same where it is a member by then.
    let mut scene = Scene::following();
    scene.after(synced(3, 1, 1));
    scene.compute(1);
    scene.check(
        lost(2),
        &[
            "w1 generation 2 at 1 of [1 3] behind []",
            "w3 generation 2 at 1 of [1 3] behind []",
        ],
    );
    scene.check(synced(3, 1, 2), &[]);
    scene.check(
        entered(3, 2, 2, &[]),
        &["w1 generation 3 at 1 of [1] behind []"],
    );
}

#[test]
fn an_update_that_only_a_newcomer_is_left_to_know_of_has_its_record() {
    let mut scene = Scene::following();
    scene.after(synced(3, 1, 1));
    scene.compute(1);
    scene.after(synced(3, 1, 2));
    scene.after(lost(2));
    scene.now += Duration::from_secs(1);
    scene.check(
        lost(1),
        &[
            "committed 2 loss 1.5",
            "w3 generation 3 at 2 of [3] behind []",
        ],
    );
}

#[test]
fn a_newcomer_that_repeats_an_update_wrongly_is_sent_away() {
    let mut scene = Scene::following();
    scene.after(synced(3, 1, 1));
    scene.compute(1);
    scene.after(reported(1, 2, "a"));
    scene.after(reported(2, 2, "a"));
    let commands = scene.after(synced(3, 1, 2));
    assert!(
        commands[0].starts_with("w3 expel: its weights after step 2 are b where the others have a"),
        "{commands:?}"
    );
}

#[test]
fn an_impossible_step_expels_its_sender() {
    let mut scene = Scene::following();
    scene.check(
        synced(3, 1, 3),
        &["w3 expel: it says that it has seen 3 updates of 2"],
    );
}

#[test]
fn who_has_no_room_follows_nobody() {
    let mut scene = Scene::with(2, |settings| {
        settings.min_workers = 2;
        settings.max_workers = Some(2);
    });
    scene.cluster.settings.min_workers = 1;
    scene.after(join(WorkerId(3)));
    scene.after(ready(WorkerId(3), 0));
    scene.compute(0);
    scene.check(reported(1, 1, "a"), &[]);
    scene.check(reported(2, 1, "a"), &["committed 1 loss 1.5"]);
    // Within the step, with the whole state: there is nobody else to take the place.
    scene.check(
        lost(2),
        &[
            "w1 generation 2 at 1 of [1 3] behind [1]",
            "w3 generation 2 at 1 of [1 3] behind [1]",
        ],
    );
}

#[test]
fn whoever_is_needed_to_go_on_at_all_gets_the_state_from_the_generation() {
    let mut scene = Scene::following();
    scene.cluster.settings.min_workers = 2;
    scene.check(
        lost(2),
        &[
            "w1 generation 2 at 1 of [1 3] behind [1]",
            "w3 generation 2 at 1 of [1 3] behind [1]",
        ],
    );
    // What the feed brought meanwhile is of no more use.
    scene.check(synced(3, 1, 1), &[]);
}

#[test]
fn several_newcomers_share_the_members_out() {
    let mut scene = Scene::with(2, |settings| settings.min_workers = 2);
    scene.cluster.settings.min_workers = 1;
    for id in 3..=12 {
        scene.after(join(WorkerId(id)));
        scene.after(ready(WorkerId(id), 0));
    }
    scene.compute(0);
    let first = scene.after(reported(1, 1, "a"));
    assert_eq!(first.len(), 2 * MAX_FEEDS_PER_SOURCE, "{first:?}");
    let second = scene.after(reported(2, 1, "a"));
    let follows: Vec<&String> = second.iter().filter(|c| c.contains("follow")).collect();
    assert_eq!(follows.len(), MAX_FEEDS_PER_SOURCE, "{second:?}");
    assert!(follows.iter().all(|follow| follow.contains("of w2")));
    // Who goes makes room.
    let third = scene.after(lost(3));
    assert_eq!(third, ["w1 feed 9 to w11", "w11 follow 9 of w1 from 1"]);
}

#[test]
fn who_was_asked_to_stop_is_nobodys_source_while_others_stay() {
    let mut scene = Scene::with(3, |settings| settings.min_workers = 3);
    scene.cluster.settings.min_workers = 1;
    // One more than the other two members can feed.
    let newcomers = 2 * MAX_FEEDS_PER_SOURCE as u64 + 1;
    for id in 4..4 + newcomers {
        scene.after(join(WorkerId(id)));
        scene.after(ready(WorkerId(id), 0));
    }
    for (slot, worker) in [1, 1, 2, 2].into_iter().enumerate() {
        scene.after(done(worker, 0, slot as u32));
    }
    scene.after(draining(3));
    let mut said = scene.after(reported(3, 1, "a"));
    said.extend(scene.after(reported(2, 1, "a")));
    let feeds_of = |worker| {
        let start = format!("w{worker} feed");
        said.iter().filter(|said| said.starts_with(&start)).count()
    };
    assert_eq!([feeds_of(2), feeds_of(3)], [MAX_FEEDS_PER_SOURCE, 0]);
}

#[test]
fn the_state_of_a_generation_comes_from_a_member_that_stays() {
    let mut scene = Scene::with(3, |settings| settings.min_workers = 3);
    scene.cluster.settings.min_workers = 1;
    scene.after(draining(1));
    let source = |scene: &mut Scene| {
        let mut commands = Vec::new();
        let gone = Event::WorkerLost {
            worker: WorkerId(3),
            reason: "killed".into(),
        };
        scene.cluster.handle(scene.now, gone, &mut commands);
        commands.iter().find_map(|command| match command {
            Command::SendGeneration { generation, .. } => Some(generation.source),
            _ => None,
        })
    };
    assert_eq!(source(&mut scene), Some(1));
}

#[test]
fn two_missing_updates_are_too_many_unless_steps_are_short() {
    for (milliseconds, enters) in [(10_000, false), (10, true)] {
        let mut scene = Scene::following();
        scene.after(synced(3, 1, 0));
        scene.now += Duration::from_millis(milliseconds);
        scene.compute(1);
        scene.after(reported(1, 2, "b"));
        let commands = scene.after(reported(2, 2, "b"));
        let generation = "w3 generation 2 at 2 of [1 2 3] behind [] fed [2]".to_owned();
        assert_eq!(commands.contains(&generation), enters, "{commands:?}");
    }
}
