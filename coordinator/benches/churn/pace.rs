//! Whether a pair of unequal workers delivers the sum of their speeds.
//!
//! Two workers of one machine share its cores, caches and memory with each other and with a coordinator, whatever they
//! work on. So what the pair is held against is what the same two do at the same time when each has a job of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::cluster::{Cluster, Job};

/// A throttled worker runs for so long, and then rests for as long: short beside a slot, as a slow machine is slow at
/// every moment.
const BEAT: Duration = Duration::from_millis(2);
/// A slot for each block: 64 a step.
const STEP: &str = "global_batch_size=64";
const BLOCK: &str = "sequence_len=128";

/// Tokens a second of two workers.
pub struct Pair {
    /// Each in a job of its own, at the same time.
    pub apart: [f64; 2],
    /// Both in one job.
    pub together: f64,
}

impl Pair {
    /// What both deliver together, of what each delivers by itself.
    pub fn share(&self) -> f64 {
        self.together / self.apart.iter().sum::<f64>()
    }
}

/// One worker at full speed and one at half, then both at full speed.
pub fn measure(job: &Job, least: Duration) -> [Pair; 2] {
    let apart = {
        let mut clusters = [(); 2].map(|()| Cluster::start(job, 1, &[STEP, BLOCK], 1));
        let unequal = {
            let _throttle = Throttle::new(clusters[1].worker(0).id());
            rates(&mut clusters, least)
        };
        [unequal, rates(&mut clusters, least)]
    };
    let mut pair = [Cluster::start(job, 2, &[STEP, BLOCK], 1)];
    let together = {
        let unequal = {
            let _throttle = Throttle::new(pair[0].worker(1).id());
            rates(&mut pair, least)
        };
        [unequal, rates(&mut pair, least)]
    };
    [0, 1].map(|index| Pair {
        apart: [apart[index][0], apart[index][1]],
        together: together[index][0],
    })
}

/// Of clusters that run at the same time, once their speeds are known: after one step.
fn rates(clusters: &mut [Cluster], least: Duration) -> Vec<f64> {
    std::thread::scope(|scope| {
        let rate = |cluster| scope.spawn(move || rate(cluster, least));
        let rates: Vec<_> = clusters.iter_mut().map(rate).collect();
        rates.into_iter().map(|rate| rate.join().unwrap()).collect()
    })
}

fn rate(cluster: &mut Cluster, least: Duration) -> f64 {
    let step = cluster.step();
    cluster.wait_beyond(step);
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
