//! What is read of a hub without faults.

use common::hub::{Digest, RepoId, RepoKind, git_hex, sha256_hex};
use common::progress::Progress;

use super::*;
use crate::stand_in::Fault;

#[test]
fn a_listing_names_the_commit_and_every_file_with_size_and_digest() {
    let fixture = Fixture::new();
    let commit = fixture.server.commit(REPO, &model());
    let listing = fixture
        .hub(&[])
        .listing(&model_id("org/name"), "main", &Progress::default());
    let listing = listing.unwrap();
    assert_eq!(listing.commit, commit);
    let found: Vec<_> = listing
        .files
        .iter()
        .map(|file| (file.path.as_str(), file.size, file.digest.clone().unwrap()))
        .collect();
    let [config, weights, onnx] = model();
    let git = |bytes| Digest::GitSha1(git_hex(bytes));
    let expected = [
        (config.0, config.1.len() as u64, git(config.1)),
        (weights.0, 5000, Digest::Sha256(sha256_hex(WEIGHTS))),
        (onnx.0, 2, git(onnx.1)),
    ];
    assert_eq!(found, expected);
}

#[test]
fn a_list_of_several_pages_is_read_to_its_end() {
    let fixture = Fixture::with_model();
    fixture.server.page_files(1);
    let listing = fixture
        .hub(&[])
        .listing(&model_id("org/name"), "main", &Progress::default());
    assert_eq!(listing.unwrap().files.len(), 3);
    let pages = fixture
        .lines()
        .iter()
        .filter(|line| line.contains("/tree/"))
        .count();
    assert_eq!(pages, 3);
}

#[test]
fn a_snapshot_holds_what_is_wanted_and_nothing_else() {
    let fixture = Fixture::with_model();
    let is_wanted = |path: &str| path.ends_with(".json");
    let hub = fixture.hub(&[]);
    let progress = Progress::default();
    let snapshot = hub
        .snapshot(&model_id("org/name"), "main", &is_wanted, &progress)
        .unwrap();
    let paths: Vec<&str> = snapshot
        .files
        .iter()
        .map(|file| file.path.as_str())
        .collect();
    assert_eq!(paths, ["config.json", "onnx/a b.json"]);
    assert_eq!(
        std::fs::read(snapshot.folder.join("onnx/a b.json")).unwrap(),
        b"{}"
    );
    assert!(!snapshot.folder.join("model.safetensors").exists());
    assert_eq!(progress.now().to_string(), "downloading from the hub, 100%");
}

#[test]
fn data_sets_and_old_ids_of_one_word_have_addresses_of_their_own() {
    let fixture = Fixture::new();
    fixture
        .server
        .commit("datasets/org/data", &[("a.jsonl", b"{}\n")]);
    fixture
        .server
        .commit("models/gpt2", &[("config.json", b"{}")]);
    let hub = fixture.hub(&[]);
    for (kind, id, folder) in [
        (RepoKind::Dataset, "org/data", "datasets--org--data"),
        (RepoKind::Model, "gpt2", "models--gpt2"),
    ] {
        let id = RepoId::parse(kind, id).unwrap();
        let snapshot = hub
            .snapshot(&id, "main", &|_| true, &Progress::default())
            .unwrap();
        assert!(
            snapshot
                .folder
                .starts_with(fixture.home.path().join("hub").join(folder))
        );
        assert!(snapshot.folder.join(&snapshot.files[0].path).is_file());
    }
}

#[test]
fn all_files_are_of_the_commit_that_the_first_answer_named() {
    let fixture = Fixture::new();
    let first = fixture
        .server
        .commit(REPO, &[("a.json", b"old"), ("b.json", b"old")]);
    let moved = [("a.json", "new"), ("b.json", "new")]
        .map(|(path, text)| (path.to_owned(), text.as_bytes().to_vec()));
    fixture
        .server
        .play("/revision/main", Fault::Commit(REPO, moved.into()));
    let snapshot = fixture.snapshot(&[]).unwrap();
    assert_eq!(snapshot.commit, first);
    for name in ["a.json", "b.json"] {
        assert_eq!(std::fs::read(snapshot.folder.join(name)).unwrap(), b"old");
    }
    let again = fixture.snapshot(&[]).unwrap();
    assert_eq!(std::fs::read(again.folder.join("a.json")).unwrap(), b"new");
}

#[test]
fn a_small_file_is_read_through_the_cache_and_a_large_one_is_refused() {
    let fixture = Fixture::with_model();
    let hub = fixture.hub(&[]);
    let progress = Progress::default();
    let listing = hub
        .listing(&model_id("org/name"), "main", &progress)
        .unwrap();
    assert_eq!(
        hub.read(&listing, "onnx/a b.json", 100, &progress).unwrap(),
        b"{}"
    );
    fixture.lines();
    assert_eq!(
        hub.read(&listing, "onnx/a b.json", 100, &progress).unwrap(),
        b"{}"
    );
    assert!(fixture.lines().is_empty());
    assert_error(
        hub.read(&listing, "model.safetensors", 100, &progress),
        &["5000 bytes", "100"],
    );
    assert_error(
        hub.read(&listing, "README.md", 100, &progress),
        &["no file README.md"],
    );
    assert_error(
        hub.read(&listing, "../x", 100, &progress),
        &["../x", "leads out"],
    );
}

#[test]
fn the_token_is_shown_to_the_hub_and_to_no_other_host() {
    let fixture = Fixture::with_model();
    fixture.server.require_token("hf_secret");
    fixture.server.make_private(REPO);
    let config = format!(
        "{}/lfs/{}",
        fixture.server.other_host(),
        sha256_hex(WEIGHTS)
    );
    // The hub sends even a call of its API to another host.
    fixture.server.play("/tree/", Fault::Redirect(config));
    fixture.snapshot(&[("HF_TOKEN", "hf_secret")]).unwrap_err();
    fixture.snapshot(&[("HF_TOKEN", "hf_secret")]).unwrap();
    let requests = fixture.server.requests();
    let (other, own): (Vec<_>, Vec<_>) = requests.iter().partition(|request| request.is_other_host);
    assert_eq!(other.len(), 2);
    assert!(
        other
            .iter()
            .all(|request| request.header("authorization").is_none())
    );
    assert!(
        own.iter()
            .all(|request| request.header("authorization") == Some("Bearer hf_secret"))
    );
}

#[test]
fn a_wrong_case_of_the_id_leads_to_the_right_one() {
    let fixture = Fixture::with_model();
    let asked = model_id("Org/NAME");
    let hub = fixture.hub(&[]);
    let snapshot = hub
        .snapshot(&asked, "main", &|_| true, &Progress::default())
        .unwrap();
    assert!(snapshot.folder.join("config.json").is_file());
    let listing = hub.listing(&asked, "main", &Progress::default()).unwrap();
    assert_eq!(listing.canonical.id(), "org/name");
}

#[test]
fn a_proxy_is_used_for_every_host_but_those_in_no_proxy() {
    let fixture = Fixture::with_model();
    let proxy = fixture.server.endpoint();
    let pairs = [
        ("HF_ENDPOINT", "http://hub.example"),
        ("HTTP_PROXY", &proxy),
    ];
    let hub = fixture.hub(&pairs);
    hub.listing(&model_id("org/name"), "main", &Progress::default())
        .unwrap();
    assert!(
        fixture
            .lines()
            .contains(&"CONNECT hub.example:80".to_owned())
    );
}

#[test]
fn work_that_is_cancelled_ends_and_keeps_what_came() {
    let fixture = Fixture::with_model();
    fixture.server.play("GET /lfs/", Fault::Cut(1000));
    let progress = Progress::default();
    let waiting = progress.clone();
    let environment = fixture.environment(&[]);
    // The wait after the cut is where it is cancelled.
    let hub = common::hub::Hub::with_sleep(environment, move |_| waiting.cancel()).unwrap();
    let result = hub.snapshot(&model_id("org/name"), "main", &|_| true, &progress);
    assert_error(result, &["stopped"]);
    let part = format!("{}.incomplete", sha256_hex(WEIGHTS));
    let part = fixture.folder().join("blobs").join(part);
    assert_eq!(std::fs::read(part).unwrap(), &WEIGHTS[..1000]);
}
