//! What it costs when machines come, go and hang, on this machine with real processes, and what the exact exchange costs
//! beside a plain one. Prints tables; asserts nothing.
//!
//!     cargo bench -p coordinator --bench churn [-- --quick] [--only NAME] [--rounds N] [--scalars N]
//!
//! Names: kill, hang, join, restart, checkpoint, pace, exchange. Measure alone: anything else that runs here shows.
#![allow(clippy::unwrap_used)]

mod cluster;
mod exchange;
mod pace;
// The scenes of the chaos test need more of it.
#[allow(dead_code)]
#[path = "../../tests/chaos/process.rs"]
mod process;
#[path = "../../tests/support/mod.rs"]
mod support;

use std::time::Duration;

use clap::Parser;
use cluster::{Cluster, Job};

/// Churn
#[derive(Parser)]
struct Options {
    /// Few rounds and small sizes, to see that it runs
    #[arg(long)]
    quick: bool,
    /// Only this part
    #[arg(long, value_parser = ["kill", "hang", "join", "restart", "checkpoint", "pace", "exchange"])]
    only: Option<String>,
    /// Of each measurement [default: 9, quick: 2]
    #[arg(long)]
    rounds: Option<usize>,
    /// Trainable scalars of the model that joiners fetch and checkpoints hold [default: 10 million, quick: 1 million]
    #[arg(long)]
    scalars: Option<usize>,
    /// What cargo says to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    fn rounds(&self) -> usize {
        self.rounds.unwrap_or(if self.quick { 2 } else { 9 })
    }

    fn full(&self) -> Job {
        let default = if self.quick { 1_000_000 } else { 10_000_000 };
        let scalars = self.scalars.unwrap_or(default);
        Job::Full { scalars }
    }
}

fn main() {
    if let Ok(address) = std::env::var(process::JOIN) {
        process::work(address);
    }
    let options = Options::parse();
    let wanted = |name: &str| options.only.as_deref().is_none_or(|only| only == name);
    println!(
        "{:<60} {:>6} {:>10} {:>10}",
        "seconds", "rounds", "median", "worst"
    );
    if wanted("kill") {
        kill(&options);
    }
    if wanted("hang") {
        hang(&options);
    }
    if wanted("join") {
        join(&options);
    }
    if wanted("restart") {
        restart(&options);
    }
    if wanted("checkpoint") {
        checkpoint(&options);
    }
    if wanted("pace") {
        pace(&options);
    }
    if wanted("exchange") {
        exchange(&options);
    }
}

/// One row: median and worst.
fn row(what: &str, values: &[Duration]) {
    figures(what, values.iter().map(Duration::as_secs_f64).collect());
}

fn figures(what: &str, mut values: Vec<f64>) {
    values.sort_by(f64::total_cmp);
    let (median, worst) = (values[values.len() / 2], values[values.len() - 1]);
    let rounds = values.len();
    println!("{what:<60} {rounds:>6} {median:>10.3} {worst:>10.3}");
}

/// The usual time between two commits.
fn baseline(cluster: &mut Cluster) -> Duration {
    let from = cluster.step();
    let mut gaps = cluster.gaps(|step, _| step >= from + 12);
    gaps.sort();
    gaps[gaps.len() / 2]
}

/// Pauses for a part of a step that differs from round to round, so that every phase of it is hit.
fn pause(round: usize, step: Duration) {
    std::thread::sleep(step.mul_f64(round as f64 * 0.37 % 1.0));
}

/// The time from `disturb` to the next commit, round by round.
fn recoveries(
    cluster: &mut Cluster,
    rounds: usize,
    disturb: impl Fn(&mut Cluster, usize),
    repair: impl Fn(&mut Cluster, usize),
) -> Vec<Duration> {
    let step_time = baseline(cluster);
    let recovery = |round: usize| {
        pause(round, step_time);
        let seat = round % cluster.workers.len();
        let began = std::time::Instant::now();
        disturb(cluster, seat);
        let step = cluster.step();
        let took = cluster.wait_beyond(step) - began;
        repair(cluster, seat);
        cluster.settle();
        took
    };
    (0..rounds).map(recovery).collect()
}

fn kill(options: &Options) {
    let mut cluster = Cluster::start(&Job::Quickstart, 3, &[], 5);
    row("step with 3 workers", &[baseline(&mut cluster)]);
    let times = recoveries(
        &mut cluster,
        options.rounds(),
        |cluster, seat| cluster.workers[seat] = None,
        Cluster::start_worker,
    );
    row("kill -9 of a worker, to the next committed step", &times);
}

fn hang(options: &Options) {
    let mut cluster = Cluster::start(&Job::Quickstart, 3, &[], 5);
    let times = recoveries(
        &mut cluster,
        options.rounds(),
        |cluster, seat| cluster.worker(seat).signal("-STOP"),
        |cluster, seat| cluster.worker(seat).signal("-CONT"),
    );
    row("SIGSTOP of a worker, to the next committed step", &times);
}

/// The largest gap between commits around a join, less a usual step.
fn join(options: &Options) {
    for (what, job) in [
        ("LoRA of the quick start", Job::Quickstart),
        ("all weights", options.full()),
    ] {
        let mut cluster = Cluster::start(&job, 3, &[], 5);
        let stall = |round: usize| {
            cluster.workers[2] = None;
            cluster.settle();
            let usual = baseline(&mut cluster);
            pause(round, usual);
            cluster.start_worker(2);
            let mut entered = None;
            let gaps = cluster.gaps(|step, workers| {
                if workers == 3 {
                    entered.get_or_insert(step);
                }
                entered.is_some_and(|entered| step >= entered + 3)
            });
            gaps.into_iter()
                .max()
                .unwrap_or_default()
                .saturating_sub(usual)
        };
        let stalls: Vec<Duration> = (0..options.rounds()).map(stall).collect();
        row(
            &format!("join: longest stall of the others ({what})"),
            &stalls,
        );
    }
}

fn restart(options: &Options) {
    let mut cluster = Cluster::start(&Job::Quickstart, 3, &["save_steps=50"], 5);
    let times = recoveries(
        &mut cluster,
        options.rounds(),
        |cluster, _| {
            cluster.kill_coordinator();
            cluster.start_coordinator();
        },
        |_, _| {},
    );
    row(
        "kill -9 and restart of the coordinator, to the next step",
        &times,
    );
}

/// What a checkpoint costs: steps that one is saved beside against as many that follow, of the same run.
fn checkpoint(options: &Options) {
    /// Steps between two checkpoints; one is stored long before half of them are made.
    const EVERY: u64 = 20;
    /// Seconds between two where the job leaves it to the run, or more.
    const BY_THE_CLOCK: f64 = 60.0;
    let every = format!("save_steps={EVERY}");
    let mut cluster = Cluster::start(&options.full(), 1, &[&every], 5);
    let aligned = cluster.step().next_multiple_of(EVERY);
    let mut stretch = |from: u64, steps: u64| {
        let (began, used) = cluster.reach(from);
        let (ended, used_then) = cluster.reach(from + steps);
        ((ended - began).as_secs_f64(), used_then - used)
    };
    let save = |round: usize| {
        let saved = aligned + round as u64 * EVERY;
        let (with, processor_with) = stretch(saved, EVERY / 2);
        let (without, processor) = stretch(saved + EVERY / 2, EVERY / 2);
        (with - without, processor_with - processor, 2.0 * without)
    };
    let saves: Vec<(f64, f64, f64)> = (0..options.rounds()).map(save).collect();
    let delays: Vec<f64> = saves.iter().map(|(delay, ..)| *delay).collect();
    let shares = saves.iter().map(|(delay, _, usual)| 100.0 * delay / usual);
    figures("a checkpoint delays the run by", delays.clone());
    let processor = saves.iter().map(|(_, processor, _)| *processor);
    figures("a checkpoint takes of processors", processor.collect());
    let usual = saves.iter().map(|(.., usual)| *usual / EVERY as f64);
    figures("step without a checkpoint", usual.collect());
    let what = format!("checkpoint every {EVERY} steps, % of the run's time");
    figures(&what, shares.collect());
    let by_the_clock = delays.iter().map(|delay| 100.0 * delay / BY_THE_CLOCK);
    let what = format!("by the clock, every {BY_THE_CLOCK} s at most, % of the run's time");
    figures(&what, by_the_clock.collect());
}

/// Pairs of which one runs at half its speed, and equal ones, against the sum of what both do apart.
fn pace(options: &Options) {
    let small = Job::Full { scalars: 2_000_000 };
    let jobs = [
        ("all of 2 million weights", small, 5),
        ("quick start", Job::Quickstart, 5),
    ];
    println!();
    println!(
        "{:<48} {:>9} {:>9} {:>9} {:>8}",
        "tokens/s, 64 slots a step", "one", "other", "together", "of sum"
    );
    for round in 0..options.rounds.unwrap_or(if options.quick { 1 } else { 2 }) {
        for (model, job, seconds) in &jobs {
            let seconds = if options.quick { 1 } else { *seconds };
            let pairs = pace::measure(job, Duration::from_secs(seconds));
            for (what, pair) in ["one at half its speed", "equal"].into_iter().zip(pairs) {
                println!(
                    "{:<48} {:>9.0} {:>9.0} {:>9.0} {:>7.1}%",
                    format!("{model}, {what} ({})", round + 1),
                    pair.apart[0],
                    pair.apart[1],
                    pair.together,
                    100.0 * pair.share()
                );
            }
        }
    }
}

fn exchange(options: &Options) {
    let sizes: &[usize] = match options.quick {
        true => &[250_000],
        false => &[250_000, 1_000_000, 5_000_000, 25_000_000],
    };
    println!();
    println!(
        "{:<10} {:>8} {:>12} {:>12} {:>12} {:>12} {:>8}",
        "scalars", "workers", "exact MiB", "float MiB", "exact ms", "float ms", "ratio"
    );
    for &scalars in sizes {
        for ranks in 1..=4 {
            let exact = medians(exchange::exact(ranks, scalars, options.rounds()));
            let plain = medians(exchange::plain(ranks, scalars, options.rounds()));
            println!(
                "{scalars:<10} {ranks:>8} {:>12.2} {:>12.2} {:>12.2} {:>12.2} {:>8.2}",
                exact.0,
                plain.0,
                exact.1,
                plain.1,
                exact.1 / plain.1
            );
        }
    }
}

/// MiB and milliseconds.
fn medians(mut measured: Vec<exchange::Measured>) -> (f64, f64) {
    measured.sort_by_key(|measured| measured.time);
    let time = measured[measured.len() / 2].time;
    measured.sort_by_key(|measured| measured.bytes);
    let bytes = measured[measured.len() / 2].bytes;
    (bytes as f64 / f64::from(1 << 20), time.as_secs_f64() * 1e3)
}
