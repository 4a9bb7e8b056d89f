//! Coordinators that die: what they had written down is there again, up to a moment of chance, and the toys keep what they
//! hold and come back, each in its own time.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use super::super::tests::{course, join, settings};
use super::super::{Cluster, Event, WorkerId};
use super::{SLOTS, TOTAL_STEPS, World, finished};
use crate::cluster::run_event::RunEvent;
use crate::store::journal::{History, Record};

/// The coordinator dies in one of so many moments.
const DEATHS: u64 = 700;
/// Longer than a new term waits for anybody: some come back too late.
const LONGEST_ABSENCE_MS: u64 = 20_000;
/// Between two attempts of those who hurry.
const SHORT_ABSENCE_MS: u64 = 1_000;

/// What outlives a coordinator.
pub struct Disk {
    pub term: u64,
    pub deaths_left: u32,
    /// Sessions that may still break while both ends live.
    pub breaks_left: u32,
    min_workers: usize,
    history: History,
    records: Vec<Record>,
    /// Steps that were given up with a word to the user.
    lost_records: BTreeSet<u64>,
}

impl Disk {
    pub fn new(min_workers: usize) -> Self {
        Self {
            term: 1,
            deaths_left: 0,
            breaks_left: 0,
            min_workers,
            history: History::default(),
            records: Vec::new(),
            lost_records: BTreeSet::new(),
        }
    }

    /// A checkpoint waits for the record of its step, where there will be one.
    pub fn may_store(&self, step: u64, committed: &[u64]) -> bool {
        committed.contains(&step) || self.lost_records.contains(&step)
    }

    pub fn observe(&mut self, event: &RunEvent) {
        if let RunEvent::Notice(text) = event
            && let Some(rest) = text.strip_prefix("the record of step ")
            && let Some((step, _)) = rest.split_once(" is lost")
        {
            self.lost_records.extend(step.parse::<u64>());
        }
        if let Some(record) = self.history.record_of(event, SystemTime::UNIX_EPOCH, 0) {
            self.history.add(record.clone());
            self.records.push(record);
        }
    }
}

impl World {
    pub(super) fn coordinator_dies(&mut self) -> bool {
        let dies = self.disk.deaths_left > 0 && self.rng.below(DEATHS) == 0;
        self.disk.deaths_left -= u32::from(dies);
        dies
    }

    /// The next coordinator knows what the journal holds, of which the newest records may be missing, and the newest
    /// checkpoint.
    pub(super) fn restart(&mut self) {
        let unsynced = self.rng.below(4).min(self.disk.records.len() as u64);
        let kept = self.disk.records.len() - unsynced as usize;
        self.disk.records.truncate(kept);
        self.disk.history = History::of(self.disk.records.clone());
        self.disk.term += 1;
        let earlier = self.disk.history.earlier();
        // As with the lines of metrics.jsonl.
        let recorded = earlier.recorded.max(self.stored);
        self.committed.retain(|step| *step <= recorded);
        self.evaluated.retain(|step| *step <= recorded);
        let mut settings = settings();
        settings.min_workers = self.disk.min_workers;
        settings.earlier = earlier;
        settings.start_step = self.stored;
        settings.last_evaluated = self.evaluated.last().copied();
        self.cluster = Cluster::new(settings, course(TOTAL_STEPS, SLOTS));
        for id in self.toys.keys().copied().collect::<Vec<_>>() {
            self.leave_session(id);
        }
        self.handle(Event::Ticked);
    }

    /// The connection breaks, and the coordinator notices.
    pub(super) fn lose_session(&mut self, id: WorkerId) {
        self.disk.breaks_left -= 1;
        self.leave_session(id);
        let reason = "its connection broke".to_owned();
        self.handle(Event::WorkerLost { worker: id, reason });
    }

    /// What was on its way in either direction is lost; what it was told it still does.
    fn leave_session(&mut self, id: WorkerId) {
        let longest = match self.rng.below(4) {
            0 => LONGEST_ABSENCE_MS,
            _ => SHORT_ABSENCE_MS,
        };
        let absence = Duration::from_millis(self.rng.below(longest));
        if let Some(toy) = self.toys.get_mut(&id) {
            toy.down.clear();
            toy.up.clear();
            toy.away_until = Some(self.now + absence);
        }
    }

    /// Those whose absence is over join again, under another number.
    pub(super) fn come_back(&mut self) {
        let now = self.now;
        let is_due = |id: &WorkerId| {
            let toy = &self.toys[id];
            toy.hangs_until.is_none() && toy.away_until.is_some_and(|until| until <= now)
        };
        let due: Vec<WorkerId> = self.toys.keys().copied().filter(is_due).collect();
        for id in due {
            self.rejoin(id);
        }
    }

    fn rejoin(&mut self, before: WorkerId) {
        let Some(mut toy) = self.toys.remove(&before) else {
            return;
        };
        let id = WorkerId(self.next_id);
        self.next_id += 1;
        // One that never loaded anything has nothing to bring.
        toy.rejoined_with_state = toy.ready;
        toy.id = id;
        toy.term = self.disk.term;
        toy.away_until = None;
        toy.ready = false;
        toy.up.clear();
        toy.tasks.clear();
        toy.saves.clear();
        toy.generation = None;
        toy.receiving = false;
        toy.exchanging = None;
        toy.feeds = Default::default();
        let Event::WorkerJoined {
            worker,
            mut join,
            address,
        } = join(id)
        else {
            unreachable!("join makes a WorkerJoined")
        };
        if toy.rejoined_with_state {
            (join.job_digest, join.run) = ("job".into(), "run".into());
        }
        self.toys.insert(id, toy);
        self.handle(Event::WorkerJoined {
            worker,
            join,
            address,
        });
    }
}

#[test]
fn coordinators_that_die_lose_no_slot_and_record_no_step_twice() {
    let (mut terms, mut completed, mut lost) = (0, 0, 0);
    for seed in 0..1500 {
        let mut world = World::new(seed, 1 + (seed % 3) as usize, (seed % 3) as u32);
        world.disk.deaths_left = 1 + (seed % 4) as u32;
        world.disk.breaks_left = (seed % 5) as u32;
        let world = world.run();
        assert_eq!(world.outcome, finished(), "seed {seed}");
        let recorded: BTreeSet<u64> = world.committed.iter().copied().collect();
        assert_eq!(recorded.len(), world.committed.len(), "seed {seed}");
        assert!(world.committed.is_sorted(), "seed {seed}");
        for step in 1..=TOTAL_STEPS {
            let is_told = world.disk.lost_records.contains(&step);
            assert!(
                recorded.contains(&step) || is_told,
                "seed {seed}: step {step}"
            );
        }
        // An evaluation is made once, or not at all where its record was lost with the weights that it was of.
        assert!(world.evaluated.is_sorted(), "seed {seed}");
        assert_eq!(world.evaluated.last(), Some(&TOTAL_STEPS), "seed {seed}");
        terms += world.disk.term - 1;
        completed += u32::from(world.disk.lost_records.is_empty());
        lost += u32::from(!world.disk.lost_records.is_empty());
    }
    // All of it happens.
    assert!(
        terms > 1000 && completed > 500 && lost > 50,
        "{terms} {completed} {lost}"
    );
}
