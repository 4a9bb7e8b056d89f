//! Deaths, broken exchanges and wrong machines.

use super::*;
use crate::cluster::parts::generation::{LOSSES_GATHER, losses_gather};
use crate::cluster::parts::probing::broken_exchanges::PEER_LOST_GRACE;

/// Workers 1 and 2 have computed the first step, and worker 2 has reported it.
fn committed_by_one_of_three() -> Scene {
    let mut scene = Scene::with_workers(3);
    scene.cluster.settings.min_workers = 1;
    for (worker, slot) in [(1, 0), (1, 1), (2, 2), (2, 3)] {
        scene.after(done(worker, 0, slot));
    }
    scene.after(reported(2, 1, "a"));
    scene
}

#[test]
fn a_lost_worker_costs_only_its_own_slots() {
    let mut scene = Scene::with_workers(2);
    scene.cluster.settings.min_workers = 1;
    scene.after(done(1, 0, 0));
    scene.check(lost(2), &["w1 generation 2 at 0 of [1] behind []"]);
    // Slot 1 was leased to worker 1 but not begun; 2 and 3 were worker 2's.
    scene.check(
        entered(1, 2, 0, &[0]),
        &["w1 plan train 0", "w1 lease [1]", "w1 lease [2]"],
    );
}

#[test]
fn a_slot_stays_with_its_worker_until_it_has_entered() {
    let mut scene = Scene::with_workers(3);
    scene.cluster.settings.min_workers = 1;
    // Worker 1 has 0 and 1, worker 2 has 2 and 3.
    scene.after(done(2, 0, 2));
    scene.after(lost(3));
    scene.check(entered(2, 2, 0, &[2]), &["w2 plan train 0", "w2 lease [3]"]);
    let late = done(1, 0, 0);
    scene.check(late, &[]);
    scene.check(entered(1, 2, 0, &[0]), &["w1 plan train 0", "w1 lease [1]"]);
}

#[test]
fn a_death_before_the_first_report_repeats_the_exchange_without_recomputing() {
    let mut scene = Scene::exchanging();
    scene.check(lost(2), &["w1 generation 2 at 0 of [1] behind []"]);
    scene.check(
        entered(1, 2, 0, &[0, 1]),
        &["w1 plan train 0", "w1 lease [2]", "w1 lease [3]"],
    );
}

#[test]
fn a_death_after_the_first_report_sends_state_to_who_is_behind() {
    let mut scene = committed_by_one_of_three();
    scene.check(
        lost(1),
        &[
            "committed 1 loss 1.5",
            "w2 generation 2 at 1 of [2 3] behind [1]",
            "w3 generation 2 at 1 of [2 3] behind [1]",
        ],
    );
}

#[test]
fn a_report_that_comes_after_the_new_generation_still_commits() {
    let mut scene = Scene::with_workers(3);
    scene.cluster.settings.min_workers = 1;
    for (worker, slot) in [(1, 0), (1, 1), (2, 2), (2, 3)] {
        scene.after(done(worker, 0, slot));
    }
    scene.check(
        lost(1),
        &[
            "w2 generation 2 at 0 of [2 3] behind []",
            "w3 generation 2 at 0 of [2 3] behind []",
        ],
    );
    scene.check(
        reported(2, 1, "a"),
        &[
            "committed 1 loss 1.5",
            "w2 generation 3 at 1 of [2 3] behind [1]",
            "w3 generation 3 at 1 of [2 3] behind [1]",
        ],
    );
}

#[test]
fn the_odd_digest_is_expelled_by_name() {
    let mut scene = Scene::with_workers(3);
    scene.cluster.settings.min_workers = 1;
    for (worker, slot) in [(1, 0), (1, 1), (2, 2), (2, 3)] {
        scene.after(done(worker, 0, slot));
    }
    scene.after(reported(1, 1, "b"));
    scene.after(reported(2, 1, "a"));
    scene.check(
        reported(3, 1, "a"),
        &[
            "w1 expel: its weights after step 1 are b where the others have a; this machine computes wrongly",
            "committed 1 loss 1.5",
            "w2 generation 2 at 1 of [2 3] behind []",
            "w3 generation 2 at 1 of [2 3] behind []",
        ],
    );
}

#[test]
fn two_workers_that_disagree_fail_the_job() {
    let mut scene = Scene::exchanging();
    scene.after(reported(1, 1, "a"));
    let commands = scene.after(reported(2, 1, "b"));
    assert_eq!(commands[..2], ["w1 finish failed", "w2 finish failed"]);
    assert!(commands[2].contains("w1 has a, w2 has b"), "{commands:?}");
}

#[test]
fn a_broken_exchange_between_living_workers_is_built_anew() {
    let mut scene = Scene::exchanging();
    let lost = v1::PeerLost {
        generation: 1,
        rank: 1,
        reason: "reset".into(),
    };
    let worker = WorkerId(1);
    scene.check(Event::PeerLost { worker, lost }, &[]);
    scene.check(Event::Ticked, &[]);
    scene.now += PEER_LOST_GRACE;
    scene.check(
        Event::Ticked,
        &[
            "w1 generation 2 at 0 of [1 2] behind []",
            "w2 generation 2 at 0 of [1 2] behind []",
        ],
    );
}

#[test]
fn an_accusation_from_an_earlier_generation_is_void() {
    let mut scene = Scene::with_workers(3);
    scene.cluster.settings.min_workers = 1;
    scene.after(lost(3));
    scene.after(entered(1, 2, 0, &[]));
    scene.after(entered(2, 2, 0, &[]));
    // Rank 1 of the generation before may be anybody now.
    let lost = v1::PeerLost {
        generation: 1,
        rank: 1,
        reason: "reset".into(),
    };
    let worker = WorkerId(1);
    scene.check(Event::PeerLost { worker, lost }, &[]);
    scene.now += PEER_LOST_GRACE;
    scene.check(Event::Ticked, &[]);
}

#[test]
fn a_late_report_with_other_weights_expels_its_sender() {
    let mut scene = committed_by_one_of_three();
    scene.after(lost(1));
    // Worker 3 had finished the exchange too, but not to the same weights.
    let said = scene.after(reported(3, 1, "b"));
    assert!(
        said.iter()
            .any(|said| said.starts_with("w3 expel: its weights after step 1 are b")),
        "{said:?}"
    );
}

#[test]
fn losses_that_come_together_form_one_generation_after_the_first() {
    let mut scene = Scene::with(1000, |settings| settings.min_workers = 1000);
    scene.cluster.settings.min_workers = 1;
    let gather = losses_gather(scene.cluster.members.ranks().len());
    scene.now += 2 * gather;
    let is_generation = |said: &&String| said.starts_with("w1000 generation");
    let mut generations = 0;
    for id in 1..=100 {
        // To hear of so many takes a while.
        scene.now += Duration::from_millis(15);
        let commands = scene.after(lost(id));
        generations += commands.iter().filter(is_generation).count();
    }
    assert_eq!(generations, 1, "the first loss is answered at once");
    scene.now += gather;
    let commands = scene.after(Event::Ticked);
    assert_eq!(commands.iter().filter(is_generation).count(), 1);
    assert_eq!(scene.cluster.members.ranks().len(), 900);
    scene.now += gather;
    assert_eq!(scene.after(Event::Ticked), [""; 0]);
}

#[test]
fn a_state_on_record_that_was_thought_to_be_lost_is_gone_on_from_when_its_holder_speaks() {
    for speaks in [reported(1, 1, "a"), entered(1, 2, 1, &[])] {
        let mut scene = Scene::exchanging();
        scene.after(reported(2, 1, "a"));
        // Worker 1 has made the update too, but has not said so yet.
        scene.check(
            lost(2),
            &[
                "committed 1 loss 1.5",
                "w1 generation 2 at 0 of [1] behind []",
            ],
        );
        scene.check(speaks, &["w1 generation 3 at 1 of [1] behind []"]);
    }
}

#[test]
fn who_says_to_have_entered_an_earlier_generation_has_not_entered_this_one() {
    let mut scene = Scene::with_workers(3);
    scene.cluster.settings.min_workers = 1;
    scene.after(lost(3));
    scene.check(entered(1, 1, 0, &[]), &[]);
    scene.check(
        entered(1, 2, 0, &[]),
        &["w1 plan train 0", "w1 lease [0]", "w1 lease [1]"],
    );
}

#[test]
fn no_exchange_begins_in_a_generation_that_lost_a_member() {
    let mut scene = Scene::with_workers(3);
    scene.cluster.settings.min_workers = 1;
    // 1 has slots 0 and 3, 2 has 1, 3 has 2.
    scene.after(lost(3));
    scene.after(entered(1, 2, 0, &[]));
    scene.after(entered(2, 2, 0, &[]));
    scene.check(lost(2), &[]);
    for slot in 0..4 {
        let commands = scene.after(done(1, 0, slot));
        let exchanges = |said: &String| said.contains("exchange");
        assert!(!commands.iter().any(exchanges), "{commands:?}");
    }
    scene.now += LOSSES_GATHER;
    scene.check(Event::Ticked, &["w1 generation 3 at 0 of [1] behind []"]);
}
