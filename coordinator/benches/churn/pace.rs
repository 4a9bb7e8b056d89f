//! Whether a pair of unequal workers delivers the sum of their speeds.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::cluster::{Cluster, Job};

/// A throttled worker runs for so long, and then rests for as long.
const BEAT: Duration = Duration::from_millis(20);
/// A slot for each block: 64 a step.
const STEP: &str = "global_batch_size=64";

/// Tokens a second.
pub struct Pair {
    pub full: f64,
    pub half: f64,
    pub together: f64,
    /// Two at full speed: what this machine has for two.
    pub equals: f64,
}

/// One worker, one at half its speed, both of them, and two equal ones.
pub fn measure(least: Duration) -> Pair {
    Pair {
        full: rate(1, None, least),
        half: rate(1, Some(0), least),
        together: rate(2, Some(1), least),
        equals: rate(2, None, least),
    }
}

fn rate(workers: usize, throttled: Option<usize>, least: Duration) -> f64 {
    let mut cluster = Cluster::start(&Job::Quickstart, workers, &[STEP]);
    let _throttle = throttled.map(|seat| Throttle::new(cluster.worker(seat).id()));
    // The new speed is to be known.
    cluster.settle();
    cluster.tokens_per_second(least)
}

/// Stops a process half of the time.
struct Throttle {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Throttle {
    fn new(process: u32) -> Self {
        let over = Arc::<AtomicBool>::default();
        let ends = over.clone();
        let thread = std::thread::spawn(move || {
            while !ends.load(Ordering::SeqCst) {
                send(process, libc::SIGSTOP);
                std::thread::sleep(BEAT);
                send(process, libc::SIGCONT);
                std::thread::sleep(BEAT);
            }
        });
        Self {
            over,
            thread: Some(thread),
        }
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn send(process: u32, signal: libc::c_int) {
    // SAFETY: a call without memory; a process that is gone is an error, which is of no interest.
    unsafe { libc::kill(process as libc::pid_t, signal) };
}
