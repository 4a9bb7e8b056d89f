//! The real driver, cluster, service and store against workers that run the real step on a toy's arithmetic, over a simulated
//! network in simulated time: processes die and come back, hang, are cut off from each other, and every seed must end with the bits of the quiet run.
//!
//! `MUSTER_SIM_SEED=n` replays one seed and prints what happens in it; `MUSTER_SIM_SEEDS=n` tries the first `n` seeds.
#![cfg(feature = "single-node")]
#![allow(clippy::unwrap_used)]

mod bulk;
mod collective;
mod dice;
mod faults;
mod feed;
mod heard;
mod mesh;
mod net;
mod oracle;
mod rpc;
mod session;
mod site;
mod trainer;
mod truth;
mod worker;
mod world;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use faults::{PARTED_MS, Plan};
use site::Scratch;
use world::{Report, count, run};

/// In the normal test run.
const SEEDS: u64 = 1000;

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Tries every seed on all cores, and says how to see what went wrong.
fn try_seeds(plan: impl Fn(u64) -> Plan + Sync, check: impl Fn(&Report) + Sync) {
    let scratch = Arc::new(Scratch::new());
    if let Some(seed) = variable("MUSTER_SIM_SEED") {
        let report = run(&scratch, &plan(seed), true);
        println!("{report:#?}");
        assert!(report.violations.is_empty(), "seed {seed}");
        return check(&report);
    }
    let seeds = variable("MUSTER_SIM_SEEDS").unwrap_or(SEEDS);
    let next = AtomicU64::new(0);
    let failed = Mutex::new(Vec::new());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::SeqCst);
                    if seed >= seeds {
                        return;
                    }
                    let report = run(&scratch, &plan(seed), false);
                    if report.violations.is_empty() {
                        check(&report);
                    } else {
                        failed.lock().unwrap().push((seed, report.violations));
                    }
                }
            });
        }
    });
    let mut failed = failed.into_inner().unwrap();
    failed.sort();
    for (seed, violations) in failed.iter().take(20) {
        println!("seed {seed}: {}", violations.join("; "));
    }
    assert!(
        failed.is_empty(),
        "{} of {seeds} seeds failed; see one with MUSTER_SIM_SEED={} cargo test -p coordinator --test simulation",
        failed.len(),
        failed[0].0
    );
}

#[test]
fn a_quiet_run_comes_to_the_known_weights() {
    let report = run(&Arc::new(Scratch::new()), &Plan::quiet(), false);
    assert_eq!(report.violations, Vec::<String>::new());
    assert_eq!(report.generations, 1);
    assert!(report.simulated_ms < 60_000);
}

#[test]
fn every_seed_ends_with_the_bits_of_the_quiet_run() {
    let (withdrawn, let_go) = (AtomicU64::new(0), AtomicU64::new(0));
    try_seeds(Plan::random, |report| {
        count(&withdrawn, report.withdrawn);
        count(&let_go, report.let_go);
    });
    let is_part = variable("MUSTER_SIM_SEED").or(variable("MUSTER_SIM_SEEDS"));
    if is_part.is_none() {
        // So that the seeds prove something about them.
        let counted = [withdrawn, let_go].map(AtomicU64::into_inner);
        assert!(
            counted.iter().all(|count| *count > SEEDS / 5),
            "{counted:?}"
        );
    }
}

#[test]
fn a_worker_that_comes_back_when_others_have_begun_again_takes_them_along() {
    let scratch = Arc::new(Scratch::new());
    let mut begun_again = 0;
    for seed in 0..200 {
        let report = run(&scratch, &Plan::deserted(seed), false);
        assert_eq!(report.violations, Vec::<String>::new(), "seed {seed}");
        begun_again += report.begun_again;
    }
    // So that the seeds prove something about it.
    assert!(begun_again > 20, "{begun_again}");
}

#[test]
fn a_state_that_has_other_weights_than_its_step_is_not_stored() {
    let scratch = Arc::new(Scratch::new());
    for seed in 0..20 {
        let report = run(&scratch, &Plan::spoiled(seed), false);
        assert_eq!(report.violations, Vec::<String>::new(), "seed {seed}");
        assert_eq!(report.refused_states, 1, "seed {seed}");
    }
}

#[test]
fn the_run_goes_on_with_those_who_reach_each_other() {
    let scratch = Arc::new(Scratch::new());
    let mut set_aside = 0;
    let seeds = variable("MUSTER_SIM_SEED").map_or(0..100, |seed| seed..seed + 1);
    let readable = seeds.end == seeds.start + 1;
    for seed in seeds {
        let report = run(&scratch, &Plan::parted(seed), readable);
        assert_eq!(report.violations, Vec::<String>::new(), "seed {seed}");
        assert!(report.ended_ms < PARTED_MS / 3, "seed {seed}: {report:?}");
        set_aside += u64::from(report.set_aside > 0);
    }
    // Some of these runs are over before the cut comes.
    assert!(set_aside > 10 || readable, "{set_aside}");
}

#[test]
fn one_seed_run_twice_gives_the_same_log() {
    let scratch = Arc::new(Scratch::new());
    for seed in 0..20 {
        let digest = || run(&scratch, &Plan::random(seed), false).digest;
        assert_eq!(digest(), digest(), "seed {seed}");
    }
}

#[test]
fn a_worker_that_computes_wrongly_is_sent_away_and_the_run_goes_on() {
    let scratch = Arc::new(Scratch::new());
    for seed in 0..20 {
        let report = run(&scratch, &Plan::wrong(seed), false);
        assert_eq!(report.violations, Vec::<String>::new(), "seed {seed}");
        assert_eq!(report.expulsions, 1, "seed {seed}");
    }
}
