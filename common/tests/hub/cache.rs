//! The cache on disk, as Python's `huggingface_hub` lays it out and reads it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use common::hub::{git_hex, sha256_hex};
use common::progress::Progress;

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A cache as Python leaves it behind; the list of files is kept since version 2.
fn lay_out_as_python(folder: &Path, has_tree: bool) {
    let (config, weights) = (model()[0].1, WEIGHTS);
    let blobs = [(git_hex(config), config), (sha256_hex(weights), weights)];
    let snapshot = folder.join("snapshots").join(COMMIT);
    for made in [
        &snapshot,
        &folder.join("blobs"),
        &folder.join("refs"),
        &folder.join("trees"),
    ] {
        fs::create_dir_all(made).unwrap();
    }
    for ((digest, bytes), name) in blobs.iter().zip(["config.json", "model.safetensors"]) {
        fs::write(folder.join("blobs").join(digest), bytes).unwrap();
        symlink(format!("../../blobs/{digest}"), snapshot.join(name)).unwrap();
    }
    fs::write(folder.join("refs/main"), COMMIT).unwrap();
    if has_tree {
        let tree = format!(
            r#"{{"format_version": 1, "files": {{
                "config.json": {{"size": {}, "blob_id": "{}"}},
                "model.safetensors": {{"size": 5000, "blob_id": "{COMMIT}", "lfs_sha256": "{}", "lfs_size": 5000}},
                "other.bin": {{"size": 7, "blob_id": "{COMMIT}"}}}}}}"#,
            config.len(),
            blobs[0].0,
            blobs[1].0
        );
        fs::write(folder.join("trees").join(format!("{COMMIT}.json")), tree).unwrap();
    }
}

fn is_no_bin(path: &str) -> bool {
    !path.ends_with(".bin")
}

#[test]
fn a_snapshot_has_pythons_layout() {
    let fixture = Fixture::with_model();
    let snapshot = fixture.snapshot(&[]).unwrap();
    let folder = fixture.folder();
    assert_eq!(
        snapshot.folder,
        folder.join("snapshots").join(&snapshot.commit)
    );
    assert_eq!(
        fs::read_to_string(folder.join("refs/main")).unwrap(),
        snapshot.commit
    );
    for (path, bytes, up) in [
        ("config.json", model()[0].1, "../.."),
        ("model.safetensors", WEIGHTS, "../.."),
        ("onnx/a b.json", b"{}", "../../.."),
    ] {
        let digest = match path.ends_with(".safetensors") {
            true => sha256_hex(bytes),
            false => git_hex(bytes),
        };
        assert_eq!(fs::read(folder.join("blobs").join(&digest)).unwrap(), bytes);
        let target = fs::read_link(snapshot.folder.join(path)).unwrap();
        assert_eq!(target, Path::new(&format!("{up}/blobs/{digest}")));
        let lock = format!("hub/.locks/models--org--name/{digest}.lock");
        assert!(fixture.home.path().join(lock).is_file());
    }
    let names = |folder: &Path| fs::read_dir(folder).unwrap().count();
    assert_eq!(names(&folder.join("blobs")), 3);
    assert_eq!(names(&snapshot.folder), 3);
    assert!(
        folder
            .join("trees")
            .join(format!("{}.json", snapshot.commit))
            .is_file()
    );
}

#[test]
fn what_python_has_fetched_is_used_without_a_request() {
    let fixture = Fixture::new();
    lay_out_as_python(&fixture.folder(), true);
    let progress = Progress::default();
    let repo = model_id("org/name");
    let snapshot = fixture
        .hub(&[])
        .snapshot(&repo, COMMIT, &is_no_bin, &progress)
        .unwrap();
    assert_eq!(snapshot.files.len(), 2);
    for has_tree in [true, false] {
        fs::remove_dir_all(fixture.folder()).unwrap();
        lay_out_as_python(&fixture.folder(), has_tree);
        let hub = fixture.hub(&[("HF_HUB_OFFLINE", "1")]);
        for revision in ["main", COMMIT] {
            let snapshot = hub
                .snapshot(&repo, revision, &is_no_bin, &progress)
                .unwrap();
            assert_eq!(
                (snapshot.commit.as_str(), snapshot.files.len()),
                (COMMIT, 2)
            );
            assert_eq!(
                fs::read(snapshot.folder.join("model.safetensors")).unwrap(),
                WEIGHTS
            );
        }
    }
    assert!(fixture.lines().is_empty());
}

#[test]
fn what_is_there_is_not_fetched_again() {
    let fixture = Fixture::with_model();
    let first = fixture.snapshot(&[]).unwrap();
    fixture.lines();
    fixture.snapshot(&[]).unwrap();
    assert_eq!(fixture.lines(), ["GET /api/models/org/name/revision/main"]);
    let (hub, progress) = (fixture.hub(&[]), Progress::default());
    hub.snapshot(&model_id("org/name"), &first.commit, &|_| true, &progress)
        .unwrap();
    assert!(fixture.lines().is_empty());
}

#[test]
fn a_content_that_another_commit_has_too_is_not_fetched_again() {
    let fixture = Fixture::with_model();
    fixture.snapshot(&[]).unwrap();
    let [config, weights, _] = model();
    fixture.server.commit(
        REPO,
        &[("renamed.json", config.1), weights, ("new.json", b"new")],
    );
    fixture.lines();
    let snapshot = fixture.snapshot(&[]).unwrap();
    let fetched = fixture.lines();
    let fetched: Vec<_> = fetched
        .iter()
        .filter(|line| line.contains("/resolve/"))
        .collect();
    assert_eq!(fetched.len(), 1, "{fetched:?}");
    assert_eq!(
        fs::read(snapshot.folder.join("renamed.json")).unwrap(),
        config.1
    );
}

#[test]
fn a_blob_of_the_wrong_length_is_fetched_again() {
    let fixture = Fixture::with_model();
    let snapshot = fixture.snapshot(&[]).unwrap();
    let blob = fixture.folder().join("blobs").join(sha256_hex(WEIGHTS));
    fs::write(&blob, &WEIGHTS[..10]).unwrap();
    fixture.snapshot(&[]).unwrap();
    assert_eq!(
        fs::read(snapshot.folder.join("model.safetensors")).unwrap(),
        WEIGHTS
    );
}

#[test]
fn several_at_once_fetch_every_file_once() {
    let fixture = Fixture::with_model();
    std::thread::scope(|scope| {
        for _ in 0..6 {
            // They really wait for each other.
            let hub = Hub::new(fixture.environment(&[])).unwrap();
            scope.spawn(move || {
                let progress = Progress::default();
                hub.snapshot(&model_id("org/name"), "main", &|_| true, &progress)
                    .unwrap()
            });
        }
    });
    let lines = fixture.lines();
    let fetched = lines
        .iter()
        .filter(|line| line.contains("/resolve/"))
        .count();
    assert_eq!(fetched, 3, "{lines:?}");
}

#[test]
fn a_held_lock_is_waited_for_and_given_up_when_nothing_moves() {
    let fixture = Fixture::with_model();
    let digest = sha256_hex(WEIGHTS);
    let locks = fixture.home.path().join("hub/.locks/models--org--name");
    fs::create_dir_all(&locks).unwrap();
    let path = locks.join(format!("{digest}.lock"));
    let lock = fs::File::create(&path).unwrap();
    lock.lock().unwrap();
    assert_error(
        fixture.snapshot(&[]),
        &[path.to_str().unwrap(), "another process"],
    );
    assert!(fixture.waited_seconds() >= 600.0);
    drop(lock);
    fixture.snapshot(&[]).unwrap();
}

#[test]
fn offline_the_cache_serves_and_what_it_lacks_is_named() {
    let fixture = Fixture::with_model();
    let is_config = |path: &str| path == "config.json";
    let (repo, progress) = (model_id("org/name"), Progress::default());
    fixture
        .hub(&[])
        .snapshot(&repo, "main", &is_config, &progress)
        .unwrap();
    fixture.lines();
    let hub = fixture.hub(&[("TRANSFORMERS_OFFLINE", "1")]);
    hub.snapshot(&repo, "main", &is_config, &progress).unwrap();
    let words = [
        "org/name: model.safetensors",
        "TRANSFORMERS_OFFLINE",
        "unset it",
    ];
    assert_error(hub.snapshot(&repo, "main", &|_| true, &progress), &words);
    let words = ["org/other", "TRANSFORMERS_OFFLINE", "hf download org/other"];
    assert_error(
        hub.snapshot(&model_id("org/other"), "main", &|_| true, &progress),
        &words,
    );
    assert!(fixture.lines().is_empty());
}

#[test]
fn where_the_hub_cannot_be_reached_the_cache_serves() {
    let fixture = Fixture::with_model();
    let first = fixture.snapshot(&[]).unwrap();
    // Nothing listens on this port of ours.
    let pairs = [("HF_ENDPOINT", "http://127.0.0.1:1")];
    assert_eq!(fixture.snapshot(&pairs).unwrap().commit, first.commit);
    assert_eq!(fixture.waited_seconds(), 0.0);
    let (hub, progress) = (fixture.hub(&pairs), Progress::default());
    let result = hub.snapshot(&model_id("org/other"), "main", &|_| true, &progress);
    assert_error(
        result,
        &["127.0.0.1:1 cannot be reached", "HF_ENDPOINT", "HTTP_PROXY"],
    );
}

#[test]
fn a_list_of_files_in_the_cache_is_not_trusted_to_name_blobs_or_paths() {
    let fixture = Fixture::new();
    let trees = fixture.folder().join("trees");
    fs::create_dir_all(&trees).unwrap();
    let tree = trees.join(format!("{COMMIT}.json"));
    let hub = fixture.hub(&[("HF_HUB_OFFLINE", "1")]);
    let fetch = || {
        hub.snapshot(
            &model_id("org/name"),
            COMMIT,
            &|_| true,
            &Progress::default(),
        )
    };
    let bad_path = format!(r#"{{"../../x": {{"size": 1, "blob_id": "{COMMIT}"}}}}"#);
    for (files, word) in [
        (bad_path.as_str(), "leads out"),
        (
            r#"{"x": {"size": 1, "blob_id": "../../../x"}}"#,
            "HF_HUB_OFFLINE",
        ),
        ("not JSON", "HF_HUB_OFFLINE"),
    ] {
        fs::write(
            &tree,
            format!(r#"{{"format_version": 1, "files": {files}}}"#),
        )
        .unwrap();
        assert_error(fetch(), &[word]);
    }
}
