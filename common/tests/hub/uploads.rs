//! What is pushed to a hub.

use common::hub::{CommitInfo, Created, HubError, Source, Upload, sha256_hex};
use common::progress::Progress;

use super::*;
use crate::stand_in::Fault;

const TOKEN: (&str, &str) = ("HF_TOKEN", "hf_secret");

/// A hub with an empty repository into which may be written.
fn with_repo() -> Fixture {
    let fixture = Fixture::new();
    fixture.server.require_token("hf_secret");
    fixture.server.commit(REPO, &[]);
    fixture
}

/// A small file from memory and a large one from the disk.
fn uploads(fixture: &Fixture) -> Vec<Upload> {
    let path = fixture.home.path().join("adapter.safetensors");
    std::fs::write(&path, WEIGHTS).unwrap();
    let upload = |path: &str, source| Upload {
        path_in_repo: path.to_owned(),
        source,
    };
    vec![
        upload("README.md", Source::Bytes(b"# A card, \xc3\xa9\n".to_vec())),
        upload("last/adapter_model.safetensors", Source::File(path)),
        upload("empty.bin", Source::Bytes(Vec::new())),
    ]
}

fn push(fixture: &Fixture) -> Result<CommitInfo, HubError> {
    let (hub, progress) = (fixture.hub(&[TOKEN]), Progress::default());
    hub.commit(
        &model_id("org/name"),
        "main",
        "Add the adapter",
        &uploads(fixture),
        &progress,
    )
}

fn assert_pushed(fixture: &Fixture) {
    let files = fixture.server.files(REPO, "main").unwrap();
    assert_eq!(files.len(), 3);
    assert_eq!(files["README.md"], b"# A card, \xc3\xa9\n");
    assert_eq!(files["last/adapter_model.safetensors"], WEIGHTS);
    assert!(files["empty.bin"].is_empty());
}

#[test]
fn files_come_into_one_commit_the_large_ones_through_the_storage() {
    let fixture = with_repo();
    let info = push(&fixture).unwrap();
    assert!(info.is_new && info.url.ends_with(&info.commit));
    assert_pushed(&fixture);
    let requests = fixture.server.requests();
    let puts: Vec<_> = requests
        .iter()
        .filter(|request| request.method == "PUT")
        .collect();
    assert_eq!(puts.len(), 1);
    assert!(puts[0].is_other_host && puts[0].header("authorization").is_none());
    assert_eq!(puts[0].header("content-length"), Some("5000"));
    assert!(puts[0].header("transfer-encoding").is_none());
    assert_eq!(fixture.server.commit_count(REPO), 2);
    assert!(
        requests
            .iter()
            .any(|request| request.target == "/lfs-verify")
    );
}

#[test]
fn a_file_in_parts_is_put_together() {
    for bytes in [1000, 1024, 4999] {
        let fixture = with_repo();
        fixture.server.part_bytes(bytes);
        push(&fixture).unwrap();
        assert_pushed(&fixture);
        let puts = fixture
            .lines()
            .iter()
            .filter(|line| line.starts_with("PUT"))
            .count();
        assert_eq!(puts, 5000_usize.div_ceil(bytes));
    }
}

#[test]
fn parts_from_memory_are_put_together() {
    let fixture = with_repo();
    fixture.server.part_bytes(999);
    let upload = Upload {
        path_in_repo: "a.bin".to_owned(),
        source: Source::Bytes(WEIGHTS.to_vec()),
    };
    let (hub, progress) = (fixture.hub(&[TOKEN]), Progress::default());
    hub.commit(&model_id("org/name"), "main", "Add", &[upload], &progress)
        .unwrap();
    assert_eq!(
        fixture.server.files(REPO, "main").unwrap()["a.bin"],
        WEIGHTS
    );
    assert_eq!(progress.now().to_string(), "pushing to the hub, 100%");
}

#[test]
fn a_hub_that_wants_no_storage_gets_everything_in_the_commit() {
    let fixture = with_repo();
    fixture.server.want_all_regular();
    push(&fixture).unwrap();
    assert_pushed(&fixture);
    assert!(!fixture.lines().iter().any(|line| line.contains("/lfs/")));
}

#[test]
fn what_the_repository_has_is_not_pushed_again() {
    let fixture = with_repo();
    let first = push(&fixture).unwrap();
    fixture.lines();
    let second = push(&fixture).unwrap();
    assert_eq!(second.commit, first.commit);
    assert!(!second.is_new);
    assert_eq!(fixture.server.commit_count(REPO), 2);
    assert!(!fixture.lines().iter().any(|line| line.contains("/commit/")));
}

#[test]
fn a_commit_whose_answer_is_lost_is_not_made_twice() {
    let fixture = with_repo();
    fixture.server.play("/commit/main", Fault::Cut(0));
    let info = push(&fixture).unwrap();
    assert_pushed(&fixture);
    assert_eq!(fixture.server.commit_count(REPO), 2);
    assert!(!info.is_new);
}

#[test]
fn failures_of_hub_and_storage_pass() {
    for path in [
        "PUT /put/",
        "/preupload/",
        "/objects/batch",
        "/lfs-verify",
        "/commit/main",
    ] {
        let fixture = with_repo();
        fixture.server.play(path, Fault::Status(503, vec![]));
        push(&fixture).unwrap();
        assert_pushed(&fixture);
    }
}

#[test]
fn a_failure_of_the_storage_that_stays_commits_nothing() {
    let fixture = with_repo();
    fixture
        .server
        .play_always("PUT /put/", Fault::Status(500, vec![]));
    assert_error(push(&fixture), &["org/name", "500", "try again later"]);
    assert_eq!(fixture.server.commit_count(REPO), 1);
    let fixture = with_repo();
    fixture
        .server
        .play_always("PUT /put/", Fault::Status(403, vec![]));
    assert_error(push(&fixture), &["org/name", "403"]);
}

#[test]
fn a_repository_is_made_once_and_private_where_asked() {
    let fixture = Fixture::new();
    fixture.server.require_token("hf_secret");
    let (hub, progress) = (fixture.hub(&[TOKEN]), Progress::default());
    let repo = model_id("tester/new");
    assert_eq!(
        hub.create_repo(&repo, true, &progress).unwrap(),
        Created::Created
    );
    assert_eq!(
        hub.create_repo(&repo, true, &progress).unwrap(),
        Created::AlreadyThere
    );
    let result = fixture.hub(&[]).listing(&repo, "main", &progress);
    assert_error(result, &["private"]);
}

#[test]
fn who_may_make_no_repository_may_still_write_into_one_that_is_there() {
    let fixture = with_repo();
    fixture
        .server
        .play_always("/repos/create", Fault::Status(403, vec![]));
    let (hub, progress) = (fixture.hub(&[TOKEN]), Progress::default());
    let created = hub.create_repo(&model_id("org/name"), false, &progress);
    assert_eq!(created.unwrap(), Created::AlreadyThere);
    let created = hub.create_repo(&model_id("org/new"), false, &progress);
    assert_error(created, &["org/new", "forbids", "write access"]);
}

#[test]
fn a_token_tells_its_account() {
    let fixture = with_repo();
    let account = fixture.hub(&[TOKEN]).whoami(&Progress::default());
    assert_eq!(account.unwrap(), "tester");
}

#[test]
fn without_a_token_or_the_network_nothing_is_sent() {
    let fixture = with_repo();
    let (repo, progress) = (model_id("org/name"), Progress::default());
    for (pairs, word) in [
        (vec![], "HF_TOKEN"),
        (vec![TOKEN, ("HF_HUB_OFFLINE", "1")], "HF_HUB_OFFLINE"),
    ] {
        let hub = fixture.hub(&pairs);
        let uploads = uploads(&fixture);
        assert_error(
            hub.commit(&repo, "main", "Add", &uploads, &progress),
            &["org/name", word],
        );
        assert_error(
            hub.create_repo(&repo, false, &progress),
            &["org/name", word],
        );
    }
    assert!(fixture.lines().is_empty());
}

#[test]
fn a_file_that_is_gone_or_a_name_that_leads_elsewhere_is_told() {
    let fixture = with_repo();
    let (hub, progress) = (fixture.hub(&[TOKEN]), Progress::default());
    let push = |path: &str, source| {
        let path_in_repo = path.to_owned();
        let upload = Upload {
            path_in_repo,
            source,
        };
        hub.commit(&model_id("org/name"), "main", "Add", &[upload], &progress)
    };
    let gone = Source::File(fixture.home.path().join("gone.bin"));
    assert_error(push("gone.bin", gone), &["cannot read", "gone.bin"]);
    assert_error(push("../x", Source::Bytes(vec![1])), &["../x", "leads out"]);
    assert_eq!(fixture.server.commit_count(REPO), 1);
}

#[test]
fn what_the_hub_ignores_is_left_out() {
    let fixture = with_repo();
    let (hub, progress) = (fixture.hub(&[TOKEN]), Progress::default());
    let upload = |path: &str| Upload {
        path_in_repo: path.to_owned(),
        source: Source::Bytes(b"text".to_vec()),
    };
    let uploads = [upload("a.ignored"), upload("a.txt")];
    hub.commit(&model_id("org/name"), "main", "Add", &uploads, &progress)
        .unwrap();
    let files = fixture.server.files(REPO, "main").unwrap();
    assert_eq!(files.keys().collect::<Vec<_>>(), ["a.txt"]);
}

#[test]
fn a_file_in_the_storage_already_is_not_sent_again() {
    let fixture = with_repo();
    fixture
        .server
        .commit("models/other/repo", &[("w.bin", WEIGHTS)]);
    push(&fixture).unwrap();
    assert_pushed(&fixture);
    let put = format!("PUT /put/{}", sha256_hex(WEIGHTS));
    assert!(!fixture.lines().contains(&put));
}

#[test]
fn a_push_to_an_id_in_the_wrong_case_reaches_the_right_one() {
    let fixture = with_repo();
    let (hub, progress) = (fixture.hub(&[TOKEN]), Progress::default());
    let repo = model_id("Org/Name");
    hub.commit(&repo, "main", "Add", &uploads(&fixture), &progress)
        .unwrap();
    assert_pushed(&fixture);
}
