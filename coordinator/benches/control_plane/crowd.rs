//! All simulated workers: who is alive, who has entered, what they have computed together.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::wire::MAX_MESSAGE_BYTES;
use tokio::task::JoinHandle;
use tonic::transport::Endpoint;

use crate::worker::{Client, live};

/// How often the crowd looks whether it has settled.
pub const POLL: Duration = Duration::from_millis(20);
/// What has not settled by then never will.
const SETTLING: Duration = Duration::from_secs(300);
/// Instead of the time of a slot, where it has no end.
const ENDLESS: u64 = u64::MAX;
/// Connecting at a time.
const CONNECTING: usize = 32;

/// All workers of the benchmark.
pub struct Crowd {
    address: String,
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

pub struct Shared {
    /// How long one takes.
    slot_ms: AtomicU64,
    /// The newest that anybody heard of, its members, who is alive at all, and how many have entered it.
    pub generation: AtomicU64,
    members: AtomicUsize,
    pub alive: AtomicUsize,
    entered: AtomicUsize,
    pub slots: AtomicU64,
    pub steps: AtomicU64,
}

impl Crowd {
    pub fn new(address: String) -> Self {
        Self {
            address,
            shared: Arc::new(Shared {
                slot_ms: AtomicU64::new(0),
                generation: AtomicU64::new(0),
                members: AtomicUsize::new(0),
                alive: AtomicUsize::new(0),
                entered: AtomicUsize::new(0),
                slots: AtomicU64::new(0),
                steps: AtomicU64::new(0),
            }),
            workers: Vec::new(),
        }
    }

    /// Connects them, some at a time.
    pub async fn join(&mut self, count: usize) {
        let turn = Arc::new(tokio::sync::Semaphore::new(CONNECTING));
        for number in 0..count {
            let permit = turn.clone().acquire_owned().await;
            let endpoint = Endpoint::from_shared(self.address.clone()).expect("it is an address");
            let shared = self.shared.clone();
            self.workers.push(tokio::spawn(async move {
                let channel = endpoint.connect().await.expect("the coordinator is there");
                drop(permit);
                let client = Client::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
                live(client, shared.clone(), number).await;
                // Sent away, which a machine that is too busy for heartbeats may be.
                shared.alive.fetch_sub(1, Ordering::SeqCst);
            }));
        }
        let began = Instant::now();
        while self.alive() < count {
            assert!(
                began.elapsed() < SETTLING,
                "{} of {count} workers have joined",
                self.alive()
            );
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until everyone who has a session has entered one generation.
    pub async fn settled(&self) {
        let shared = &self.shared;
        let began = Instant::now();
        loop {
            let alive = shared.alive.load(Ordering::SeqCst);
            let (members, entered) = (&shared.members, &shared.entered);
            if members.load(Ordering::SeqCst) == alive && entered.load(Ordering::SeqCst) == alive {
                return;
            }
            assert!(
                began.elapsed() < SETTLING,
                "{alive} workers are there and have not entered one generation: {} of {} have",
                entered.load(Ordering::SeqCst),
                members.load(Ordering::SeqCst)
            );
            tokio::time::sleep(POLL).await;
        }
    }

    pub fn alive(&self) -> usize {
        self.shared.alive.load(Ordering::SeqCst)
    }

    /// Lets them compute slots that take so long, or only be there, each with a slot that has no end.
    pub fn compute(&self, slot_ms: Option<u64>) {
        let slot_ms = slot_ms.unwrap_or(ENDLESS);
        self.shared.slot_ms.store(slot_ms, Ordering::SeqCst);
    }

    /// The processes of the first `count` die.
    pub fn lose(&mut self, count: usize) {
        self.shared.alive.fetch_sub(count, Ordering::SeqCst);
        for worker in self.workers.drain(..count) {
            worker.abort();
        }
    }

    pub fn generations(&self) -> u64 {
        self.shared.generation.load(Ordering::SeqCst)
    }

    pub fn slots(&self) -> u64 {
        self.shared.slots.load(Ordering::SeqCst)
    }

    pub fn steps(&self) -> u64 {
        self.shared.steps.load(Ordering::SeqCst)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        for worker in &self.workers {
            worker.abort();
        }
    }
}

impl Shared {
    /// Somebody entered `generation`, which has so many members.
    pub fn enter(&self, generation: u64, members: usize) {
        if self.generation.fetch_max(generation, Ordering::SeqCst) < generation {
            self.members.store(members, Ordering::SeqCst);
            self.entered.store(0, Ordering::SeqCst);
        }
        if self.generation.load(Ordering::SeqCst) == generation {
            self.entered.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// None where slots have no end.
    pub fn slot_ms(&self) -> Option<u64> {
        let slot_ms = self.slot_ms.load(Ordering::SeqCst);
        Some(slot_ms).filter(|slot_ms| *slot_ms != ENDLESS)
    }
}
