//! Workers that do not reach each other: who takes part, who waits, and who has to go.

use super::*;
use crate::cluster::parts::probing::probes::ANSWER_LIMIT;

const SECOND: Duration = Duration::from_secs(1);

/// A worker under this number, with the name of another before it.
fn join_as(id: u64, name: &str) -> Event {
    join_with(WorkerId(id), |join| join.name = name.to_owned())
}

fn accusation(id: u64, generation: u64, rank: u32) -> Event {
    let lost = v1::PeerLost {
        generation,
        rank,
        reason: "was silent for 3.0 s".into(),
    };
    let worker = WorkerId(id);
    Event::PeerLost { worker, lost }
}

impl Scene {
    fn cut(&mut self, pairs: &[(u64, u64)]) {
        for (a, b) in pairs {
            self.unreached.extend([(*a, *b), (*b, *a)]);
        }
    }
}

/// What commands there are of this kind to that worker.
fn to_worker<'a>(commands: &'a [String], start: &str) -> Vec<&'a String> {
    commands
        .iter()
        .filter(|said| said.starts_with(start))
        .collect()
}

#[test]
fn a_newcomer_and_those_who_are_here_try_each_other_before_it_takes_part() {
    let mut scene = Scene::with(1, |_| ());
    let commands = scene.handle(join(WorkerId(2)));
    let probes = commands.iter().filter_map(|command| match command {
        Command::SendProbe { worker, probe } => Some((
            worker.0,
            probe.members.iter().map(|m| m.worker).collect::<Vec<_>>(),
        )),
        _ => None,
    });
    assert_eq!(probes.collect::<Vec<_>>(), [(1, vec![2]), (2, vec![1])]);
    scene.handle(ready(WorkerId(2), 0));
    assert!(scene.cluster.entrants().is_empty());
    // Who never answers is not waited for without end.
    scene.now += ANSWER_LIMIT;
    scene.handle(Event::Ticked);
    assert!(scene.cluster.entrants().contains(&WorkerId(2)));
}

#[test]
fn of_two_the_one_whose_address_fails_goes_whoever_came_first() {
    for (first, reached) in [((2, 1), 1), ((1, 2), 2)] {
        let mut scene = Scene::new(|settings| settings.min_workers = 2);
        scene.unreached.insert(first);
        let mut said = Vec::new();
        for id in 1..=2 {
            said.extend(scene.after(join(WorkerId(id))));
            said.extend(scene.after(ready(WorkerId(id), 0)));
        }
        said.extend(scene.pass(SECOND * 90, &[]));
        let (other, address) = (3 - reached, format!("10.0.0.{reached}:9"));
        let refused = to_worker(
            &said,
            &format!("w{reached} refuse: worker w{other} cannot reach it at {address}"),
        );
        assert_eq!(refused.len(), 1, "{said:#?}");
        assert!(refused[0].contains("connection timed out"), "{refused:?}");
        assert!(refused[0].contains("--exchange-port"), "{refused:?}");
        assert!(to_worker(&said, "w1 generation").is_empty(), "{said:#?}");
        for end in ["refuse", "expel"] {
            let healthy = to_worker(&said, &format!("w{other} {end}"));
            assert!(healthy.is_empty(), "{said:#?}");
        }
        // The healthy one goes on with the next that comes.
        scene.unreached.clear();
        said = scene.after(join(WorkerId(3)));
        said.extend(scene.after(ready(WorkerId(3), 0)));
        let together = format!("w3 generation 1 at 0 of [{other} 3] behind []");
        assert!(said.contains(&together), "{said:#?}");
    }
}

#[test]
fn where_neither_reaches_the_other_both_wait_until_they_do() {
    let mut scene = Scene::new(|settings| settings.min_workers = 2);
    scene.cut(&[(1, 2)]);
    let mut said = Vec::new();
    for id in 1..=2 {
        said.extend(scene.after(join(WorkerId(id))));
        said.extend(scene.after(ready(WorkerId(id), 0)));
    }
    said.extend(scene.pass(SECOND * 600, &[]));
    assert_eq!(scene.cluster.members.count(), 2, "{said:#?}");
    assert!(to_worker(&said, "w1 generation").is_empty(), "{said:#?}");
    scene.unreached.clear();
    // They are tried oftener than beside a run that goes on.
    said = scene.pass(SECOND * 6, &[]);
    let together = "w1 generation 1 at 0 of [1 2] behind []".to_owned();
    assert!(said.contains(&together), "{said:#?}");
}

#[test]
fn the_world_shrinks_to_the_largest_group_that_works_and_grows_again() {
    for alone in 1..=3 {
        let mut scene = Scene::with_workers(3);
        scene.cluster.settings.min_workers = 1;
        let kept: Vec<u64> = (1..=3).filter(|id| *id != alone).collect();
        scene.cut(&[(alone, kept[0]), (alone, kept[1])]);
        // Whoever accuses whom first.
        let rank = |id: u64| id as u32 - 1;
        let mut said = scene.after(accusation(kept[0], 1, rank(alone)));
        said.extend(scene.after(accusation(alone, 1, rank(kept[1]))));
        said.extend(scene.pass(SECOND, &[]));
        let reason = format!("w{alone} expel: worker w{} cannot reach it", kept[0]);
        assert_eq!(to_worker(&said, &reason).len(), 1, "{said:#?}");
        let on = format!(
            "w{} generation 2 at 0 of [{} {}] behind []",
            kept[0], kept[0], kept[1]
        );
        assert!(said.contains(&on), "{said:#?}");
        let expelled = said.iter().filter(|said| said.contains(" expel: "));
        assert_eq!(expelled.count(), 1, "{said:#?}");

        for id in kept.clone() {
            scene.after(entered(id, 2, 0, &[]));
        }
        // It comes back under another number, and waits until it fits.
        scene.cut(&[(4, kept[0]), (4, kept[1])]);
        said = scene.after(join_as(4, &format!("w{alone}")));
        said.extend(scene.after(ready(WorkerId(4), 0)));
        assert_eq!(to_worker(&said, "w4 aside: ").len(), 1, "{said:#?}");
        said = scene.pass(SECOND * 120, &[]);
        assert!(said.is_empty(), "{said:#?}");
        assert!(scene.cluster.entrants().is_empty());
        scene.unreached.clear();
        scene.pass(SECOND * 31, &[]);
        assert!(scene.cluster.entrants().contains(&WorkerId(4)));
        assert!(scene.cluster.probing.is_at_peace());
    }
}

#[test]
fn an_exchange_that_breaks_although_both_are_reached_is_tried_three_times_and_then_not_for_ever() {
    let mut scene = Scene::with_workers(2);
    scene.cluster.settings.min_workers = 1;
    let mut said = Vec::new();
    for generation in 1..=3 {
        said = scene.after(accusation(1, generation, 1));
        said.extend(scene.pass(SECOND, &[]));
    }
    let gone = to_worker(&said, "w2 expel: worker w1 cannot reach it");
    assert_eq!(gone.len(), 1, "{said:#?}");
    assert!(gone[0].contains("broke 3 times in a row"), "{gone:?}");
    // It comes back, but not at once.
    scene.after(join_as(3, "w2"));
    scene.after(ready(WorkerId(3), 0));
    assert!(scene.cluster.entrants().is_empty());
    scene.pass(SECOND * 6, &[]);
    assert!(scene.cluster.entrants().contains(&WorkerId(3)));
}

#[test]
fn a_worker_that_runs_alone_is_not_sent_away_for_one_that_cannot_reach_it() {
    let mut scene = Scene::with(1, |_| ());
    for slot in 0..4 {
        scene.after(done(1, 0, slot));
    }
    scene.after(reported(1, 1, "a"));
    scene.unreached.insert((2, 1));
    let mut said = scene.after(join(WorkerId(2)));
    said.extend(scene.after(ready(WorkerId(2), 0)));
    said.extend(scene.pass(SECOND * 120, &[]));
    assert_eq!(scene.cluster.members.ranks(), [WorkerId(1)], "{said:#?}");
    assert!(
        scene.cluster.members.get(WorkerId(2)).is_some(),
        "{said:#?}"
    );
    assert_eq!(
        to_worker(&said, "w2 aside: it cannot reach worker w1 at 10.0.0.1:9").len(),
        1
    );
}

#[test]
fn a_worker_that_runs_alone_hands_over_where_several_cannot_reach_it() {
    let mut scene = Scene::with(1, |_| ());
    for slot in 0..4 {
        scene.after(done(1, 0, slot));
    }
    scene.after(reported(1, 1, "weights-1"));
    scene.now += LOSSES_GATHER;
    scene.unreached.extend([(2, 1), (3, 1)]);
    let mut said = Vec::new();
    for id in 2..=3 {
        said.extend(scene.after(join(WorkerId(id))));
        said.extend(scene.after(ready(WorkerId(id), 0)));
    }
    assert!(said.contains(&"w1 withdraw [1]".to_owned()), "{said:#?}");
    let Event::SlotsWithdrawn {
        worker,
        mut withdrawn,
    } = withdrawn(1, &[1])
    else {
        unreachable!("withdrawn makes SlotsWithdrawn")
    };
    withdrawn.step = 1;
    scene.after(Event::SlotsWithdrawn { worker, withdrawn });
    scene.check(done(1, 1, 0), &["w1 save 1"]);
    said = scene.after(stored(1));
    assert_eq!(
        to_worker(&said, "w1 refuse: worker w2 cannot reach it at 10.0.0.1:9").len(),
        1,
        "{said:#?}"
    );
    // Those who waited load it, and are as many as can be.
    for id in 2..=3 {
        let reload = format!("w{id} expel: the state after step 1 is on disk");
        assert_eq!(to_worker(&said, &reload).len(), 1, "{said:#?}");
    }
}

#[test]
fn where_too_few_reach_the_newest_state_the_others_compute_it_again() {
    let mut scene = Scene::new(|settings| settings.min_workers = 2);
    for id in 1..=2 {
        scene.after(join(WorkerId(id)));
        scene.after(ready(WorkerId(id), 0));
    }
    for id in 1..=2 {
        scene.after(entered(id, 1, 0, &[]));
    }
    for (worker, slot) in [(1, 0), (1, 1), (2, 2), (2, 3)] {
        scene.after(done(worker, 0, slot));
    }
    for id in 1..=2 {
        scene.after(reported(id, 1, "a"));
    }
    scene.now += LOSSES_GATHER;
    scene.after(lost(2));
    // Worker 1 alone has the state after step 1, and the two who come do not reach it.
    scene.cut(&[(1, 3), (1, 4)]);
    let mut said = Vec::new();
    for id in 3..=4 {
        said.extend(scene.after(join(WorkerId(id))));
        said.extend(scene.after(ready(WorkerId(id), 0)));
    }
    let together = "w3 generation 2 at 0 of [3 4] behind []".to_owned();
    assert!(said.contains(&together), "{said:#?}");
    assert!(scene.cluster.members.get(WorkerId(1)).is_some());
}

#[test]
fn two_that_claim_one_address_do_not_send_each_other_away() {
    let mut scene = Scene::with(1, |_| ());
    let Event::WorkerJoined { worker, join, .. } = join(WorkerId(2)) else {
        unreachable!("join makes a WorkerJoined")
    };
    let address = "10.0.0.1:9".to_owned();
    let said = scene.after(Event::WorkerJoined {
        worker,
        join,
        address,
    });
    assert_eq!(said.len(), 1);
    assert!(
        said[0].starts_with("w2 expel: worker w1 is reached at 10.0.0.1:9 already"),
        "{said:?}"
    );
    assert!(scene.cluster.members.get(WorkerId(1)).is_some());
}

#[test]
fn a_member_stays_where_a_newcomer_and_it_do_not_reach_each_other_whoever_says_so_first() {
    for is_newcomer_first in [false, true] {
        let mut scene = Scene::with_workers(2);
        scene.cut(&[(1, 3)]);
        let commands = scene.handle(join(WorkerId(3)));
        scene.handle(ready(WorkerId(3), 0));
        let probes = commands.iter().filter_map(|command| match command {
            Command::SendProbe { worker, probe } => Some(scene.answer(*worker, probe)),
            _ => None,
        });
        let mut answers: Vec<Event> = probes.collect();
        if is_newcomer_first {
            answers.reverse();
        }
        let mut said = Vec::new();
        for answer in answers {
            said.extend(scene.after(answer));
        }
        assert_eq!(said.len(), 1, "{said:#?}");
        assert!(said[0].starts_with("w3 aside: "), "{said:#?}");
    }
}

#[test]
fn whoever_dies_before_it_answers_holds_nobody_up() {
    let mut scene = Scene::new(|settings| settings.min_workers = 2);
    let mut said = Vec::new();
    for id in 1..=3 {
        for command in scene.handle(join(WorkerId(id))) {
            // The first one never answers.
            if let Command::SendProbe { worker, probe } = command
                && worker != WorkerId(1)
            {
                let answer = scene.answer(worker, &probe);
                said.extend(scene.after(answer));
            }
        }
        if id > 1 {
            said.extend(scene.after(ready(WorkerId(id), 0)));
        }
    }
    assert!(to_worker(&said, "w2 generation").is_empty(), "{said:#?}");
    said = scene.after(lost(1));
    let together = "w2 generation 1 at 0 of [2 3] behind []".to_owned();
    assert!(said.contains(&together), "{said:#?}");
}

#[test]
fn every_pair_that_failed_is_tried_again_however_many_there_are() {
    let mut scene = Scene::with_workers(2);
    scene.cluster.settings.min_workers = 1;
    for (worker, slot) in [(1, 0), (1, 1), (2, 2), (2, 3)] {
        scene.after(done(worker, 0, slot));
    }
    for id in 1..=2 {
        scene.after(reported(id, 1, "weights-1"));
    }
    scene.now += LOSSES_GATHER;
    let count = 2 * MAX_PROBED as u64 + 1;
    let newcomers = 3..3 + count;
    scene.cluster.settings.min_workers = count as usize;
    scene.after(lost(2));
    // The first has the newest state, but they go on without it as soon as they are enough.
    for id in newcomers.clone() {
        scene.cut(&[(1, id)]);
        scene.after(join(WorkerId(id)));
        scene.after(ready(WorkerId(id), 0));
    }
    assert!(!scene.cluster.members.ranks().contains(&WorkerId(1)));
    for id in newcomers {
        scene.after(entered(id, 2, 0, &[]));
    }
    let failing = |scene: &Scene| scene.cluster.probing.failing_with(WorkerId(1));
    assert_eq!(failing(&scene), count as usize);
    // The first of them stay out of its reach, which is found out about the others all the same.
    let still_cut = MAX_PROBED as u64;
    scene
        .unreached
        .retain(|(from, to)| *from.max(to) < 3 + still_cut);
    scene.pass(SECOND * 60, &[]);
    assert_eq!(failing(&scene), MAX_PROBED);
    scene.unreached.clear();
    scene.pass(SECOND * 60, &[]);
    assert!(scene.cluster.probing.is_at_peace());
}

#[test]
fn of_a_cut_pair_is_told_once_and_nobody_who_waited_for_it_is_blamed() {
    let mut scene = Scene::with_workers(3);
    scene.cluster.settings.min_workers = 1;
    scene.cut(&[(1, 2)]);
    // Each says of the third that it was silent: it waited for those two.
    for (by, rank) in [(1, 2), (2, 2), (3, 0)] {
        scene.after(accusation(by, 1, rank));
    }
    scene.pass(SECOND, &[]);
    // Whoever was sent away comes back under another number.
    scene.cut(&[(1, 4)]);
    scene.after(join_as(4, "w2"));
    scene.after(ready(WorkerId(4), 0));
    scene.pass(SECOND * 10, &[]);
    let said = scene.notices.join("\n");
    assert_eq!(said.matches("cannot reach worker").count(), 3, "{said}");
    let group = "2 of 3 workers reach each other and take part; tried again from time to time: w2";
    assert_eq!(said.matches(group).count(), 1, "{said}");
    assert!(!said.contains("the exchange broke"), "{said}");
    scene.unreached.clear();
    scene.pass(SECOND * 40, &[]);
    let last = scene.notices.last().unwrap();
    assert_eq!(last, "all 3 workers reach each other again");
}

#[test]
fn where_too_few_reach_each_other_it_is_said_how_many_are_needed() {
    let mut scene = Scene::new(|settings| settings.min_workers = 2);
    scene.cut(&[(1, 2)]);
    for id in 1..=2 {
        scene.after(join(WorkerId(id)));
        scene.after(ready(WorkerId(id), 0));
    }
    let said = scene.notices.last().unwrap();
    assert_eq!(
        said,
        "1 of 2 workers reach each other, and 2 are needed; tried again from time to time: w2"
    );
}
