//! Chaos: the quick start with three workers, real processes, and whatever can happen to them. Each run must end with the
//! weights, losses and evaluations of a quiet run of one worker, to the bit.
//!
//! A short selection runs with the other tests. The long one:
//!
//!     cargo test --release -p coordinator --test chaos -- --ignored --nocapture --test-threads 1
//!
//! `CHAOS_ROUNDS` says how many random plans it plays, `CHAOS_SEED` with which it begins.
#![cfg(all(feature = "single-node", target_os = "linux"))]
#![allow(clippy::unwrap_used)]

mod job;
mod network;
mod plan;
mod process;
mod proxy;
mod scene;
#[path = "../support/mod.rs"]
mod support;

use network::{Network, isolated};
use plan::{Deed, Plan};
use scene::play;

/// Steps of a short run.
const STEPS: u64 = 80;

/// Not a test: what the scenes start this binary for.
#[test]
#[ignore = "a worker, started by the tests"]
fn worker_process() {
    if let Ok(address) = std::env::var(process::JOIN) {
        process::work(address);
    }
}

#[test]
fn workers_killed_while_they_work_change_nothing() {
    // The first die when there is a state to copy. Who comes just after a checkpoint has little to copy, so that two may.
    let plan = Plan::quiet(STEPS)
        .workers(&[
            "forward:20",
            "exchange:9",
            "optimizer:3",
            "state-receive",
            "join",
            "fetch",
            "state-receive",
        ])
        .expect(&[
            "forward",
            "exchange",
            "optimizer",
            "state-receive",
            "join",
            "fetch",
        ]);
    play(&plan, Network::Loopback);
}

#[test]
fn workers_killed_while_they_hand_state_over_change_nothing() {
    let plan = Plan::quiet(STEPS)
        .workers(&[
            "state-send",
            "state-send",
            "",
            "",
            "",
            "upload",
            "upload",
            "upload",
        ])
        .deeds(&[
            (4, Deed::Kill(2)),
            (10, Deed::Kill(0)),
            (11, Deed::Kill(1)),
            (12, Deed::Kill(2)),
        ])
        .expect(&["state-send", "upload"]);
    play(&plan, Network::Loopback);
}

#[test]
fn a_coordinator_killed_at_every_place_changes_nothing() {
    let places = [
        "commit:5",
        "journal-write:4",
        "evaluate",
        "checkpoint-write:1",
        "checkpoint-write:2",
        "checkpoint-write:3",
        "result-write",
        "result-recorded",
    ];
    let plan = Plan::quiet(STEPS).coordinator(&places).expect(&[
        "commit",
        "journal-write",
        "evaluate",
        "checkpoint-write",
        "result-write",
        "result-recorded",
    ]);
    play(&plan, Network::Loopback);
}

#[test]
fn everybody_killed_at_once_changes_nothing() {
    let plan = Plan::quiet(STEPS).deeds(&[
        (0, Deed::KillEverybody),
        (13, Deed::KillEverybody),
        (20, Deed::KillCoordinator),
        (30, Deed::TerminateCoordinator),
    ]);
    play(&plan, Network::Loopback);
}

#[test]
fn workers_that_hang_or_are_cut_off_change_nothing() {
    let plan = Plan::quiet(STEPS)
        .workers(&["forward:20=stop"])
        .deeds(&[
            (6, Deed::Stop(1)),
            (12, Deed::Cut(2)),
            (20, Deed::Terminate(1)),
        ])
        .expect(&["forward"]);
    play(&plan, Network::Loopback);
}

#[test]
fn a_worker_whose_cable_is_pulled_changes_nothing() {
    let Some(mut command) = isolated(&std::env::current_exe().unwrap()) else {
        println!("skipped: this system lets a test have no network namespaces");
        return;
    };
    command.args(["--exact", "cable_scene", "--ignored", "--nocapture"]);
    let run = command.env(CABLES, "1").output().unwrap();
    let text = String::from_utf8_lossy(&run.stderr);
    assert!(
        run.status.success(),
        "{}{text}",
        String::from_utf8_lossy(&run.stdout)
    );
}

const CABLES: &str = "CHAOS_CABLES";

/// Not a test: the one above, in a network of its own.
#[test]
#[ignore = "started by another test"]
fn cable_scene() {
    if std::env::var_os(CABLES).is_some() {
        let plan = Plan::quiet(STEPS).deeds(&[(6, Deed::Cut(0)), (20, Deed::Cut(1))]);
        play(&plan, Network::Namespaces);
    }
}

#[test]
#[ignore = "long: every place, several times"]
fn every_place_several_times() {
    for deed in ["kill", "stop"] {
        for nth in [1, 2, 7] {
            for place in [
                "join",
                "fetch",
                "forward",
                "exchange",
                "optimizer",
                "state-receive",
            ] {
                let failpoint = format!("{place}:{nth}={deed}");
                println!("a worker at {failpoint}");
                let plan = Plan::quiet(STEPS)
                    .workers(&["", "", "", &failpoint])
                    .deeds(&[(5, Deed::Kill(1))]);
                play(&plan, Network::Loopback);
            }
            for place in ["state-send", "upload"] {
                let failpoint = format!("{place}:{nth}={deed}");
                println!("all workers at {failpoint}");
                let plan = Plan::quiet(STEPS)
                    .workers(&[&failpoint, &failpoint, &failpoint])
                    .deeds(&[(5, Deed::Kill(1))]);
                play(&plan, Network::Loopback);
            }
            for place in [
                "commit",
                "journal-write",
                "evaluate",
                "checkpoint-write",
                "result-write",
                "result-recorded",
            ] {
                let failpoint = format!("{place}:{nth}={deed}");
                println!("the coordinator at {failpoint}");
                play(
                    &Plan::quiet(STEPS).coordinator(&[&failpoint]),
                    Network::Loopback,
                );
            }
        }
    }
}

#[test]
#[ignore = "long: random plans"]
fn random_plans() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let first = number("CHAOS_SEED").unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.unwrap().as_secs()
    });
    for seed in first..first + number("CHAOS_ROUNDS").unwrap_or(30) {
        println!("CHAOS_SEED={seed}");
        play(&Plan::random(seed, 2 * STEPS), Network::Loopback);
    }
}
