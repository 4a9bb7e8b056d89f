//! What gradients travel over: as members' GPUs allow, and as NCCL fails.

use super::*;
use crate::cluster::parts::probing::broken_exchanges::PEER_LOST_GRACE;

const VERSION: u32 = 22_703;

fn gpu(uuid: &str) -> v1::Gpu {
    v1::Gpu {
        uuid: uuid.to_owned(),
        nccl_version: VERSION,
        nccl_fault: String::new(),
    }
}

/// Joins workers, which form a generation when the last one is ready.
fn scene(gpus: &[Option<v1::Gpu>]) -> (Scene, Vec<String>, Vec<String>) {
    let mut scene = Scene::new(|settings| settings.min_workers = gpus.len());
    let (mut orders, mut notices) = (Vec::new(), Vec::new());
    for (id, gpu) in (1..).zip(gpus) {
        scene.after(join_with(WorkerId(id), |join| join.gpu = gpu.clone()));
        (orders, notices) = tell(&mut scene, ready(WorkerId(id), 0));
    }
    scene.now += LOSSES_GATHER;
    (scene, orders, notices)
}

/// What follows: commands, and what people are told.
fn tell(scene: &mut Scene, event: Event) -> (Vec<String>, Vec<String>) {
    let mut commands = Vec::new();
    scene.cluster.handle(scene.now, event, &mut commands);
    let notices = commands.iter().filter_map(|command| match command {
        Command::Emit(RunEvent::Notice(text)) => Some(text.clone()),
        _ => None,
    });
    let notices = notices.collect();
    (commands.iter().filter_map(describe).collect(), notices)
}

fn id(worker: u64, generation: u64) -> Event {
    let id = vec![7; 128].into();
    Event::NcclIdentified {
        worker: WorkerId(worker),
        nccl_id: v1::NcclId { generation, id },
    }
}

fn nccl_lost(worker: u64, generation: u64) -> Event {
    let reason = "a cable".to_owned();
    Event::NcclLost {
        worker: WorkerId(worker),
        lost: v1::NcclLost { generation, reason },
    }
}

#[test]
fn workers_with_a_gpu_each_exchange_over_nccl() {
    let (mut scene, orders, notices) = scene(&[Some(gpu("a")), Some(gpu("b"))]);
    assert_eq!(
        orders,
        [
            "w1 generation 1 at 0 of [1 2] behind [] over NCCL",
            "w2 generation 1 at 0 of [1 2] behind [] over NCCL"
        ]
    );
    assert_eq!(notices, [""; 0]);
    scene.check(id(1, 1), &["w1 NCCL id", "w2 NCCL id"]);
    // Of a generation that is over.
    scene.check(id(1, 0), &[]);
}

#[test]
fn an_identifier_that_is_not_due_costs_its_sender_the_session() {
    for event in [id(2, 1), id(1, 1)] {
        let (mut scene, ..) = scene(&[Some(gpu("a")), Some(gpu("b"))]);
        if event.speaker() == Some(WorkerId(1)) {
            scene.after(event.clone());
        }
        let after = scene.after(event);
        assert!(
            after[0].contains("expel: it sent an identifier for NCCL that was not due"),
            "{after:?}"
        );
    }
}

#[test]
fn whoever_cannot_use_nccl_is_named_once_and_all_exchange_over_tcp() {
    let without = v1::Gpu {
        nccl_version: 0,
        nccl_fault: "libnccl.so.2 cannot be loaded".to_owned(),
        ..gpu("b")
    };
    let older = v1::Gpu {
        nccl_version: 22_100,
        ..gpu("b")
    };
    for (other, reason) in [
        (None, "w2 computes on the processor"),
        (
            Some(without),
            "w2 has no NCCL: libnccl.so.2 cannot be loaded",
        ),
        (Some(older), "w1 has NCCL 2.27.3 but w2 has 2.21.0"),
        (Some(gpu("a")), "w1 and w2 share a GPU"),
    ] {
        let (mut scene, orders, notices) = scene(&[Some(gpu("a")), other.clone()]);
        assert!(!orders[0].contains("NCCL") && !orders[1].contains("NCCL"));
        let expected = format!("gradients are exchanged over TCP: {reason}");
        assert_eq!(notices, [expected]);
        scene.after(lost(2));
        scene.after(join_with(WorkerId(3), |join| join.gpu = other));
        let (orders, notices) = tell(&mut scene, ready(WorkerId(3), 0));
        assert!(orders[0].contains("generation 2"), "{orders:?}");
        // The same again, but for the name.
        let names_another = notices.iter().all(|notice| notice.contains("w3"));
        assert!(names_another, "{notices:?}");
    }
}

#[test]
fn nothing_is_said_of_nccl_where_nobody_has_a_gpu_or_one_is_alone() {
    for gpus in [vec![None, None], vec![Some(gpu("a"))]] {
        let (_, orders, notices) = scene(&gpus);
        assert!(!orders[0].contains("NCCL"));
        assert_eq!(notices, [""; 0]);
    }
}

#[test]
fn a_failure_of_nccl_among_living_workers_ends_its_use() {
    let (mut scene, ..) = scene(&[Some(gpu("a")), Some(gpu("b"))]);
    scene.check(nccl_lost(1, 0), &[]);
    scene.check(nccl_lost(1, 1), &[]);
    scene.now += PEER_LOST_GRACE;
    // The other has said nothing since.
    scene.check(
        Event::Heard {
            worker: WorkerId(1),
        },
        &[],
    );
    let alive = Event::Heard {
        worker: WorkerId(2),
    };
    let (orders, notices) = tell(&mut scene, alive);
    assert_eq!(
        orders,
        [
            "w1 generation 2 at 0 of [1 2] behind []",
            "w2 generation 2 at 0 of [1 2] behind []"
        ]
    );
    let expected = "gradients are exchanged over TCP: NCCL failed on w1: a cable";
    assert_eq!(notices, [expected]);
    // For the rest of the term.
    scene.now += LOSSES_GATHER;
    scene.after(lost(2));
    scene.after(join_with(WorkerId(3), |join| join.gpu = Some(gpu("c"))));
    let (orders, notices) = tell(&mut scene, ready(WorkerId(3), 0));
    assert_eq!(orders[0], "w1 generation 3 at 0 of [1 3] behind []");
    assert_eq!(notices, [""; 0]);
}

#[test]
fn a_failure_of_nccl_that_a_lost_worker_explains_is_not_held_against_it() {
    let gpus = ["a", "b", "c"].map(|uuid| Some(gpu(uuid)));
    let (mut scene, ..) = scene(&gpus);
    scene.cluster.settings.min_workers = 1;
    scene.check(nccl_lost(1, 1), &[]);
    scene.check(
        lost(2),
        &[
            "w1 generation 2 at 0 of [1 3] behind [] over NCCL",
            "w3 generation 2 at 0 of [1 3] behind [] over NCCL",
        ],
    );
    assert_eq!(scene.pass(2 * PEER_LOST_GRACE, &[]), [""; 0]);
    // One that is silent is expelled first, too.
    scene.check(nccl_lost(1, 2), &[]);
    let after = scene.pass(Duration::from_secs(40), &[3]);
    assert!(
        after[0].starts_with("w3 expel: nothing was heard"),
        "{after:?}"
    );
    assert_eq!(after[1], "w1 generation 3 at 0 of [1] behind []");
}

#[test]
fn a_worker_lost_where_too_few_are_left_is_not_held_against_nccl_either() {
    let (mut scene, ..) = scene(&[Some(gpu("a")), Some(gpu("b"))]);
    scene.check(nccl_lost(1, 1), &[]);
    scene.after(Event::WorkerLost {
        worker: WorkerId(2),
        reason: "gone".to_owned(),
    });
    scene.pass(Duration::from_secs(1), &[]);
    scene.after(join_with(WorkerId(3), |join| join.gpu = Some(gpu("c"))));
    let (orders, notices) = tell(&mut scene, ready(WorkerId(3), 0));
    assert!(orders[0].ends_with("over NCCL"), "{orders:?}");
    assert_eq!(notices, [""; 0]);
}
