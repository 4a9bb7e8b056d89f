//! What the control plane costs: a real coordinator process (driver, cluster, service, no engine) and many simulated
//! workers, each with a connection and a session of its own, in a second process.
//!
//!     cargo bench -p coordinator --bench control_plane -- --workers 1000
//!
//! Prints a table: processor and memory of the coordinator while workers only say that they are there, while a step goes
//! on, and how long the loss of a tenth of them takes to settle. Processor time is read from `/proc`, so it holds on a
//! busy machine too; durations are upper bounds there.

mod coordinator;
mod crowd;
mod process;
mod toy;
mod worker;

use std::time::{Duration, Instant};

use clap::Parser;

use crowd::Crowd;
use process::Coordinator;

/// While workers join.
const QUICK_SLOT_MS: u64 = 100;
/// Until what came before is not part of a steady state any more.
const CALMING: Duration = Duration::from_secs(3);

#[derive(Parser)]
struct Options {
    /// Simulated workers.
    #[arg(long, default_value_t = 1000)]
    workers: usize,
    /// Milliseconds that a worker takes for a slot.
    #[arg(long, default_value_t = 2000)]
    slot_ms: u64,
    /// Slots of a step for each worker.
    #[arg(long, default_value_t = 2)]
    slots_per_worker: usize,
    /// Seconds that each steady state is watched.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Be the coordinator: minimum of workers, slots of a step. For the process that this one starts.
    #[arg(long, num_args = 2, hide = true)]
    serve: Option<Vec<usize>>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let options = Options::parse();
    if let Some(serve) = &options.serve {
        return coordinator::run(serve[0], serve[1]);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime needs no more than the system gives every process");
    runtime.block_on(measure(&options));
}

async fn measure(options: &Options) {
    let lost = options.workers / 10;
    let slots = options.workers * options.slots_per_worker;
    let mut coordinator = Coordinator::start(options.workers - lost, slots);
    println!(
        "{:28} {:>8} {:>10} {:>10}   {} workers",
        "", "cores", "RSS MiB", "peak MiB", options.workers
    );
    let mut crowd = Crowd::new(coordinator.address.clone());

    let began = Instant::now();
    let joining = coordinator.usage();
    // Newcomers enter when a step is settled, so steps are quick until all are in.
    crowd.compute(Some(QUICK_SLOT_MS));
    crowd.join(options.workers).await;
    crowd.settled().await;
    coordinator.report("joining", &joining);
    println!(
        "{:28} {:.1} s, {} generations",
        "",
        began.elapsed().as_secs_f64(),
        crowd.generations()
    );

    let steady = Duration::from_secs(options.seconds);
    crowd.compute(None);
    tokio::time::sleep(CALMING).await;
    let usage = coordinator.usage();
    tokio::time::sleep(steady).await;
    coordinator.report("heartbeats", &usage);

    crowd.compute(Some(options.slot_ms));
    tokio::time::sleep(CALMING).await;
    let (usage, slots, steps) = (coordinator.usage(), crowd.slots(), crowd.steps());
    tokio::time::sleep(steady).await;
    let (slots, steps) = (crowd.slots() - slots, crowd.steps() - steps);
    assert!(
        slots > 0 && steps > 0,
        "{slots} slots and {steps} steps in {steady:?}: no step went on, so nothing says what one costs"
    );
    coordinator.report("heartbeats and steps", &usage);
    println!(
        "{:28} {:.0} slots/s, {steps} steps",
        "",
        slots as f64 / steady.as_secs_f64()
    );

    let (usage, before) = (coordinator.usage(), crowd.generations());
    let began = Instant::now();
    crowd.lose(lost);
    crowd.settled().await;
    let settled = began.elapsed();
    coordinator.report(&format!("losing {lost}"), &usage);
    println!(
        "{:28} {:.1} s until settled, {} generations, {} workers are left",
        "",
        settled.as_secs_f64(),
        crowd.generations() - before,
        crowd.alive()
    );
    // Before the coordinator, whose end they would lament.
    drop(crowd);
    tokio::time::sleep(Duration::from_millis(100)).await;
}
