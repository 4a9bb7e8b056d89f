#![allow(clippy::unwrap_used)]

use std::fs;

use common::rng::CounterRng;
use tempfile::TempDir;

use super::record::{decode, encode};
use super::shared::MAX_WAITING;
use super::*;
use crate::cluster::run_event::StepRecord;

fn term(term: u64) -> Term {
    Term {
        term,
        identity: Identity {
            job_digest: "job".into(),
            base_model_digest: "model".into(),
            data_digest: "data".into(),
        },
        run: "run".into(),
        version: "1".into(),
    }
}

fn step(step: u64, skipped: bool) -> RunEvent {
    RunEvent::StepCommitted(StepRecord {
        step,
        epoch: 0.5,
        loss: 1.0 / step as f64,
        grad_norm: 0.5,
        learning_rate: 1e-3,
        num_tokens: 10 * step,
        mean_token_accuracy: 0.5,
        tokens_per_second: f64::NAN,
        workers: 3,
        generation: 2,
        weights_digest: Some(format!("weights-{step}")),
        skipped,
        eta_seconds: 1.0,
        mfu: Some(0.412),
        peak_memory_bytes: Some(1_500_000_000),
        seconds: 0.5,
        waiting_seconds: 0.25,
        shares: Vec::new(),
    })
}

fn started(generation: u64, workers: usize) -> RunEvent {
    RunEvent::Started {
        step: 0,
        total_steps: 10,
        workers,
        generation,
        numerics_class: "cpu".into(),
    }
}

/// A term with a generation and three steps, the last two of them skipped.
fn records() -> Vec<Record> {
    let mut history = History::default();
    let mut records = vec![Record::Term(term(1))];
    history.add(records[0].clone());
    let events = [
        started(2, 3),
        step(1, false),
        step(2, true),
        RunEvent::CheckpointSaved {
            step: 2,
            path: "checkpoint-2".into(),
        },
        step(3, true),
    ];
    for event in events {
        let record = history
            .record_of(&event, SystemTime::UNIX_EPOCH, 1)
            .unwrap();
        history.add(record.clone());
        records.push(record);
    }
    records
}

fn site() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join(WORK_FOLDER)).unwrap();
    folder
}

fn begin(folder: &TempDir, history: History, number: u64) -> (Journal, mpsc::Receiver<RunEvent>) {
    let (observer, notices) = mpsc::channel(64);
    let journal = Journal::begin(folder.path(), history, term(number), 0, observer).unwrap();
    (journal, notices)
}

fn stopped(resumable: bool) -> Outcome {
    Outcome::Stopped {
        step: 0,
        reason: String::new(),
        resumable,
    }
}

fn told(mut notices: mpsc::Receiver<RunEvent>) -> Vec<String> {
    let mut told = Vec::new();
    while let Ok(RunEvent::Notice(text)) = notices.try_recv() {
        told.push(text);
    }
    told
}

#[test]
fn a_history_knows_where_the_run_was() {
    let history = History::of(records());
    let earlier = history.earlier();
    assert_eq!(earlier.recorded, 3);
    assert_eq!(earlier.weights_digest.as_deref(), Some("weights-3"));
    assert_eq!(earlier.skipped_in_a_row, 2);
    // One of the three died with the coordinator.
    assert_eq!((earlier.generation, earlier.workers), (2, 2));
    assert_eq!(history.checkpoint_step(), Some(2));
    assert_eq!(history.lines().count(), 3);
    assert_eq!(History::of(history.compacted()), history);
}

#[test]
fn whoever_was_told_to_end_is_not_waited_for() {
    for (resumable, workers) in [(true, 2), (false, 0)] {
        let mut history = History::of(records());
        history.add(Record::Ended { resumable });
        assert_eq!(history.earlier().workers, workers);
        // A later term has workers of its own.
        history.add(Record::Term(term(2)));
        assert_eq!(history.earlier().workers, 2);
    }
}

#[test]
fn a_step_on_record_is_not_recorded_again() {
    let mut history = History::of(records());
    let before = history.clone();
    let again = history
        .record_of(&step(2, false), SystemTime::UNIX_EPOCH, 0)
        .unwrap();
    history.add(again);
    assert_eq!(history, before);
}

#[test]
fn every_truncation_leaves_the_records_before_it() {
    let records = records();
    let (bytes, _) = encode(&records);
    let mut ends = vec![];
    for count in 0..=records.len() {
        ends.push(encode(&records[..count]).0.len());
    }
    assert_eq!(*ends.last().unwrap(), bytes.len());
    for length in 0..=bytes.len() {
        let decoded = decode(&bytes[..length]);
        let whole = ends.iter().rposition(|end| *end <= length);
        let Some(whole) = whole else {
            assert_eq!(decoded, None);
            continue;
        };
        let decoded = decoded.unwrap();
        assert_eq!(decoded.records, records[..whole], "{length} bytes");
        assert_eq!(decoded.torn_bytes, length - ends[whole]);
    }
}

#[test]
fn damage_is_never_taken_for_a_record() {
    let records = records();
    let (bytes, _) = encode(&records);
    let mut rng = CounterRng::new(7, &[]);
    for _ in 0..3000 {
        let mut damaged = bytes.clone();
        for _ in 0..=rng.below(3) {
            let at = rng.below(bytes.len() as u64) as usize;
            damaged[at] ^= 1 << rng.below(8);
        }
        if rng.below(4) == 0 {
            // Blocks that were never written are zeros after a crash.
            let from = rng.below(bytes.len() as u64) as usize;
            damaged[from..].fill(0);
        }
        let first = damaged.iter().zip(&bytes).position(|(a, b)| a != b);
        let Some(decoded) = decode(&damaged) else {
            assert!(first.is_some_and(|first| first < record::MAGIC.len()));
            continue;
        };
        assert!(records.starts_with(&decoded.records));
        let whole = encode(&decoded.records).0.len();
        assert!(first.is_none_or(|first| whole <= first));
    }
}

#[test]
fn nothing_counts_behind_a_record_that_is_missing() {
    let records = records();
    let (mut bytes, _) = encode(&records);
    let end = |count: usize| encode(&records[..count]).0.len();
    bytes.drain(end(2)..end(3));
    assert_eq!(decode(&bytes).unwrap().records, records[..2]);
}

#[test]
fn what_was_observed_is_there_after_a_crash() {
    let folder = site();
    let (journal, notices) = begin(&folder, History::default(), 1);
    for number in 1..=100 {
        journal.observe(&step(number, false));
    }
    journal.observe(&started(4, 2));
    // As far as it got; then a torn tail.
    drop(journal);
    assert!(told(notices).is_empty());
    let path = path(folder.path());
    let mut bytes = fs::read(&path).unwrap();
    bytes.truncate(bytes.len() - 3);
    fs::write(&path, bytes).unwrap();

    let found = read(folder.path()).unwrap();
    assert_eq!(found.notices.len(), 1);
    assert!(found.notices[0].contains("are damaged") && found.notices[0].contains("101 records"));
    assert_eq!(found.history.recorded(), 100);
    assert_eq!(found.history.earlier().generation, 0);

    let (journal, _notices) = begin(&folder, found.history, 2);
    journal.observe(&step(101, false));
    journal.end(&stopped(true));
    let found = read(folder.path()).unwrap();
    assert!(found.notices.is_empty(), "{:?}", found.notices);
    assert_eq!(found.history.term().unwrap().term, 2);
    assert_eq!(found.history.recorded(), 101);
    assert_eq!(found.history.lines().count(), 101);
}

#[test]
fn a_term_is_durable_before_it_begins() {
    let folder = site();
    let (_journal, _notices) = begin(&folder, History::default(), 1);
    let found = read(folder.path()).unwrap();
    assert_eq!(found.history.term(), Some(&term(1)));
    assert!(found.history.is_of(&term(9).identity));
}

#[test]
fn a_file_that_is_no_journal_is_passed_over_with_a_word() {
    let folder = site();
    assert_eq!(read(folder.path()).unwrap().history, History::default());
    for content in ["", "MUSTERJ0 and more", "{}"] {
        fs::write(path(folder.path()), content).unwrap();
        let found = read(folder.path()).unwrap();
        assert_eq!(found.history, History::default());
        assert_eq!(found.notices.len(), 1, "{content:?}");
    }
}

#[test]
fn a_journal_that_cannot_be_begun_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    // A file where the folder should be.
    fs::write(folder.path().join(WORK_FOLDER), "").unwrap();
    let (observer, _notices) = mpsc::channel(4);
    let begun = Journal::begin(folder.path(), History::default(), term(1), 0, observer);
    assert!(begun.is_err());
}

/// `/dev/full` takes nothing.
#[cfg(target_os = "linux")]
#[test]
fn a_failed_write_is_told_and_everything_goes_to_a_new_file() {
    let folder = site();
    let path = path(folder.path());
    fs::write(&path, "").unwrap();
    let full = fs::OpenOptions::new().write(true).open("/dev/full");
    let writer = Writer::over(&path, full.unwrap());
    let history = History::of(records());
    let (observer, notices) = mpsc::channel(64);
    let journal = Journal::with(writer, history, 0, observer);
    journal.observe(&step(4, false));
    journal.observe(&step(5, false));
    drop(journal);
    let told = told(notices);
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(told[0].contains("training goes on") && told[1].contains("is written again"));
    let found = read(folder.path()).unwrap();
    assert_eq!(found.history.recorded(), 5);
    assert_eq!(found.history.lines().count(), 5);
}

#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_stays_full_is_told_once_and_stops_nobody() {
    let folder = site();
    // Nowhere to begin a new file either.
    let path = folder.path().join("file").join("journal");
    fs::write(folder.path().join("file"), "").unwrap();
    let full = fs::OpenOptions::new().write(true).open("/dev/full");
    let writer = Writer::over(&path, full.unwrap());
    let (observer, notices) = mpsc::channel(64);
    let journal = Journal::with(writer, History::of(records()), 0, observer);
    for number in 4..4 + 2 * MAX_WAITING as u64 {
        journal.observe(&step(number, false));
    }
    drop(journal);
    assert_eq!(told(notices).len(), 1);
}

#[test]
fn more_records_than_the_queue_holds_are_not_lost() {
    let mut state = State {
        history: History::default(),
        waiting: Vec::new(),
        overflowed: false,
        closed: false,
        remembered: 0,
        durable: 0,
    };
    let last = MAX_WAITING as u64 + 10;
    for number in 1..=last {
        let record = state
            .history
            .record_of(&step(number, false), SystemTime::UNIX_EPOCH, 0)
            .unwrap();
        state.remember(record);
    }
    assert!(state.overflowed && state.waiting.len() == MAX_WAITING);
    assert_eq!(History::of(state.history.compacted()).recorded(), last);
}

#[test]
fn a_journal_that_was_removed_is_written_anew_with_everything() {
    let folder = site();
    let (journal, notices) = begin(&folder, History::default(), 1);
    journal.observe(&step(1, false));
    fs::remove_dir_all(folder.path().join(WORK_FOLDER)).unwrap();
    journal.observe(&step(2, false));
    journal.end(&stopped(true));
    let found = read(folder.path()).unwrap();
    assert_eq!(found.history.recorded(), 2);
    assert_eq!(told(notices), [""; 0]);
}
