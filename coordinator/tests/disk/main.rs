//! Disks that fail: what counts is durable before it has its name, a failed save costs nothing but itself, and what a
//! broken disk left is named and passed over.
#![cfg(feature = "single-node")]
#![allow(clippy::unwrap_used)]

#[cfg(target_os = "linux")]
mod full;
#[path = "../support/mod.rs"]
mod support;
mod witness;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::files::adapter::AdapterConfig;
use common::files::atomic::AtomicDir;
use common::files::checkpoint::{self, checkpoint_dir, newest_valid};
use common::files::durable::Operation;
use common::files::model::ModelFolder;
use common::files::sink::Entries;
use common::files::{FileError, Flat, Layout, Snapshot, WeightsFormat, atomic};
use common::job::{InitWeights, TargetModules};
use coordinator::cluster::WorkerId;
use coordinator::cluster::run_event::RunEvent;
use coordinator::store::checkpoints::Received;
use coordinator::store::checkpoints::{Facts, Store};
use coordinator::store::journal::{History, Identity, Journal, Term};
use support::{Run, Site};
use tempfile::TempDir;
use witness::Witness;

/// Not a test: what [`Site::join`] starts this binary for.
#[test]
#[ignore = "a worker, started by the tests"]
fn worker_process() {
    support::work();
}

fn store(folder: &TempDir, save_total_limit: Option<usize>) -> Store {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/tiny-qwen3");
    Store {
        output_dir: folder.path().join("out"),
        model: ModelFolder::open(&model, InitWeights::Pretrained).unwrap(),
        job_digest: "job".into(),
        base_model_digest: "model".into(),
        save_total_limit,
        write_trainer_state: Box::new(|folder, step| {
            atomic::write(
                &folder.join("trainer_state.json"),
                step.to_string().as_bytes(),
            )
        }),
        template: None,
        eos_token: None,
        tokens: Vec::new(),
        renamed_tokens: Default::default(),
        end_tokens: Vec::new(),
        record_result: Box::new(|_, _| Ok(())),
        saved: Box::new(|_| ()),
    }
}

fn facts() -> Facts {
    Facts {
        layout_digest: "layout".into(),
        numerics_class: "test".into(),
        best_step: None,
    }
}

/// A state as it is when its last byte has come: written, and nothing more.
fn received(store: &Store, step: u64) -> Received {
    let layout = Arc::new(Layout::new([("model.a.weight".to_owned(), vec![40])]));
    let flat = |seed: u64| (0..40).map(|i| (seed * 100 + i) as f32).collect::<Flat>();
    let snapshot = Snapshot {
        step,
        weights: flat(step).into(),
        moments: vec![flat(step + 1).into(), flat(step + 2).into()],
        layout,
    };
    let folder = store.begin(step).unwrap();
    let format = WeightsFormat::Adapter(AdapterConfig::new(
        2,
        4.0,
        TargetModules::Named(vec!["q_proj".into()]),
    ));
    let mut files = Entries::default();
    snapshot.write_files(&mut files, &format).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    snapshot.write_files(elsewhere.path(), &format).unwrap();
    for entry in fs::read_dir(elsewhere.path()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    Received {
        worker: WorkerId(1),
        step,
        weights_digest: snapshot.weights_digest(),
        files: files.0,
        folder,
    }
}

fn newest_step(store: &Store) -> Option<u64> {
    let found = newest_valid(&store.output_dir).unwrap();
    assert!(found.damaged.is_empty(), "{:?}", found.damaged);
    found.newest.map(|(_, manifest)| manifest.step)
}

fn hidden(folder: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let is_hidden = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with('.');
    paths.filter(is_hidden).collect()
}

#[test]
fn a_checkpoint_is_durable_before_it_has_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(&folder, Some(1));
    for step in [1, 2] {
        let received = received(&store, step);
        let witness = Witness::of(folder.path(), None);
        store.commit(received, &facts()).unwrap();
        witness.check();
        // The old one is removed under a hidden name, which must be durable before its files go.
        assert!(
            matches!(witness.operations().last(), Some(Operation::SyncFolder(path)) if *path == store.output_dir)
        );
        assert_eq!(newest_step(&store), Some(step));
    }
    // In place of one of the same step.
    let again = received(&store, 2);
    let witness = Witness::of(folder.path(), None);
    store.commit(again, &facts()).unwrap();
    witness.check();
}

#[test]
fn the_result_is_durable_before_it_has_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(&folder, None);
    let received = received(&store, 9);
    let witness = Witness::of(folder.path(), None);
    store.commit_last(received).unwrap();
    witness.check();
    assert!(store.output_dir.join("adapter_model.safetensors").is_file());
}

#[test]
fn any_folder_and_file_is_durable_before_it_has_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let witness = Witness::of(folder.path(), None);
    for content in ["first", "second"] {
        let dir = AtomicDir::create(&folder.path().join("model")).unwrap();
        fs::write(dir.path().join("config.json"), content).unwrap();
        dir.commit().unwrap();
        atomic::write(&folder.path().join("run.json"), content.as_bytes()).unwrap();
        witness.check();
    }
}

#[test]
fn a_failed_fsync_is_final_and_the_next_save_starts_anew() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(&folder, None);
    store.commit(received(&store, 1), &facts()).unwrap();
    let mut failures = 0;
    for step in 2.. {
        let state = received(&store, step);
        let attempt = state.folder.path().to_owned();
        let witness = Witness::of(folder.path(), Some(failures));
        let Err(error) = store.commit(state, &facts()) else {
            break;
        };
        let failed: &FileError = &error;
        assert!(failed.to_string().contains("the disk failed"), "{failed}");
        // Nothing is tried again, and nothing is named; what was under way beside it may end.
        let log = witness.operations();
        let after = &log[failures + 1..];
        assert!(!after.contains(&log[failures]), "{log:?}");
        assert!(
            after
                .iter()
                .all(|operation| matches!(operation, Operation::SyncFile(_))),
            "{log:?}"
        );
        drop(witness);
        let is_named = checkpoint_dir(&store.output_dir, step).exists();
        assert_eq!(
            newest_step(&store),
            Some(if is_named { step } else { step - 1 })
        );
        assert!(
            hidden(&store.output_dir).is_empty(),
            "{:?}",
            hidden(&store.output_dir)
        );

        let again = received(&store, step);
        assert_ne!(again.folder.path(), attempt);
        store.commit(again, &facts()).unwrap();
        assert_eq!(newest_step(&store), Some(step));
        failures += 1;
    }
    // Three files of the state, three companions, the manifest, the folder, the name, and the folder of that.
    assert!(failures > 9, "{failures}");
}

#[test]
fn every_file_and_folder_of_a_checkpoint_is_made_durable_once_and_the_manifest_last() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(&folder, None);
    let received = received(&store, 1);
    let witness = Witness::of(folder.path(), None);
    store.commit(received, &facts()).unwrap();
    let log = witness.operations();
    let synced = |of_files: bool| -> Vec<&PathBuf> {
        let paths = log.iter().filter_map(|operation| match operation {
            Operation::SyncFile(path) if of_files => Some(path),
            Operation::SyncFolder(path) if !of_files => Some(path),
            _ => None,
        });
        paths.collect()
    };
    let saved = checkpoint_dir(&store.output_dir, 1);
    let names = |path: &PathBuf| path.file_name().unwrap().to_owned();
    let mut files: Vec<_> = synced(true).into_iter().map(names).collect();
    assert_eq!(files.last().unwrap(), checkpoint::MANIFEST);
    let entries = fs::read_dir(saved).unwrap();
    let mut expected: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
    files.sort();
    expected.sort();
    assert_eq!(files, expected);
    // Its own, and the one that holds its name.
    assert_eq!(synced(false).len(), 2, "{log:?}");
}

#[test]
fn a_term_and_every_batch_of_steps_are_durable_in_the_journal() {
    let folder = tempfile::tempdir().unwrap();
    let term = Term {
        term: 1,
        identity: Identity {
            job_digest: "job".into(),
            base_model_digest: "model".into(),
            data_digest: "data".into(),
        },
        run: "run".into(),
        version: "test".into(),
    };
    let (observer, _notices) = tokio::sync::mpsc::channel(8);
    let witness = Witness::of(folder.path(), None);
    let journal = Journal::begin(folder.path(), History::default(), term, 0, observer).unwrap();
    // Under its name, and found after a power cut.
    witness.check();
    let begun = witness.operations();
    let Some(Operation::SyncFolder(inside)) = begun.last() else {
        panic!("{begun:?}");
    };
    journal.observe(&RunEvent::CheckpointSaved {
        step: 2,
        path: "checkpoint-2".into(),
    });
    drop(journal);
    let appended = &witness.operations()[begun.len()..];
    assert_eq!(appended, [Operation::SyncFile(inside.join("journal"))]);
}

#[test]
fn damaged_checkpoints_are_named_and_passed_over() {
    let site = Site::new();
    let options = [
        "--max-steps",
        "60",
        "--set",
        "save_steps=5",
        "--set",
        "save_total_limit=9",
    ];
    let quiet = site.train("quiet", &options);

    let local = ["--single-node", "--threads", "1"];
    let start = || site.start("out", &[&local[..], &options].concat());
    let mut run = Run::of(&mut start());
    run.until("step 43/").process.kill();
    drop(run);
    let mut saved = checkpoint::list(&site.path("out")).unwrap();
    let mut newest = || saved.pop().unwrap();
    let (truncated, flipped, unnamed) = (newest(), newest(), newest());
    let weights = truncated.1.join("adapter_model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    let optimizer = flipped.1.join("optimizer.safetensors");
    let mut bytes = fs::read(&optimizer).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x20;
    fs::write(&optimizer, bytes).unwrap();
    fs::remove_file(unnamed.1.join("manifest.json")).unwrap();

    let run = Run::of(&mut start()).end();
    assert!(run.status.success(), "{run:?}");
    for ((step, _), reason) in [
        (truncated, "bytes where the manifest says"),
        (flipped, "digest"),
        (unnamed, "manifest.json"),
    ] {
        let name = format!("checkpoint-{step} is passed over");
        let says = |line: &str| line.contains(&name) && line.contains(reason);
        assert!(run.stdout.lines().any(says), "{step}: {run:?}");
    }
    let sound = format!("checkpoint-{}", newest().0);
    assert!(run.stdout.contains(&sound), "{sound}: {run:?}");
    assert_eq!(site.digest("out"), quiet);
    assert_eq!(
        site.steps("out"),
        with_speed_of(&site.steps("quiet"), &site.steps("out"))
    );
}

/// The lines of a run, but for what depends on the machine.
fn with_speed_of(
    lines: &[serde_json::Value],
    other: &[serde_json::Value],
) -> Vec<serde_json::Value> {
    let merged = lines.iter().zip(other).map(|(line, other)| {
        let mut line = line.clone();
        for field in [
            "tokens_per_second",
            "generation",
            "workers",
            "peak_memory_bytes",
            "time",
            "step_seconds",
            "waiting_seconds",
            "by_worker",
        ] {
            line[field] = other[field].clone();
        }
        line
    });
    merged.collect()
}
