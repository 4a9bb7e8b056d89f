//! Transfers that break off or bring the wrong bytes.

use std::fs;

use common::hub::sha256_hex;
use common::progress::Progress;

use super::*;
use crate::stand_in::Fault;

/// The part of the large file that a download which broke off left behind.
fn part(fixture: &Fixture) -> PathBuf {
    let name = format!("{}.incomplete", sha256_hex(WEIGHTS));
    fixture.folder().join("blobs").join(name)
}

fn leave_part(fixture: &Fixture, bytes: &[u8]) {
    fs::create_dir_all(part(fixture).parent().unwrap()).unwrap();
    fs::write(part(fixture), bytes).unwrap();
}

/// Ranges that were asked of the host of large files.
fn ranges(fixture: &Fixture) -> Vec<Option<String>> {
    let requests = fixture.server.requests();
    let other = requests.iter().filter(|request| request.is_other_host);
    other
        .map(|request| request.header("range").map(str::to_owned))
        .collect()
}

fn assert_whole(snapshot: Snapshot) {
    assert_eq!(
        fs::read(snapshot.folder.join("model.safetensors")).unwrap(),
        WEIGHTS
    );
}

#[test]
fn a_download_that_breaks_off_goes_on_where_it_was() {
    let fixture = Fixture::with_model();
    fixture.server.play("GET /lfs/", Fault::Cut(1000));
    fixture.server.play("GET /lfs/", Fault::Cut(700));
    assert_whole(fixture.snapshot(&[]).unwrap());
    let [first, second, third] = [None, Some("bytes=1000-"), Some("bytes=1700-")];
    assert_eq!(
        ranges(&fixture),
        [first, second, third].map(|range| range.map(str::to_owned))
    );
    assert!(!part(&fixture).exists());
}

#[test]
fn a_part_of_an_earlier_process_is_continued() {
    let fixture = Fixture::with_model();
    leave_part(&fixture, &WEIGHTS[..4000]);
    let progress = Progress::default();
    let hub = fixture.hub(&[]);
    assert_whole(
        hub.snapshot(&model_id("org/name"), "main", &|_| true, &progress)
            .unwrap(),
    );
    assert_eq!(ranges(&fixture), [Some("bytes=4000-".to_owned())]);
    assert_eq!(progress.now().percent, Some(100));
}

#[test]
fn a_part_that_is_whole_already_is_checked_and_taken() {
    let fixture = Fixture::with_model();
    leave_part(&fixture, WEIGHTS);
    assert_whole(fixture.snapshot(&[]).unwrap());
    assert!(ranges(&fixture).is_empty());
}

#[test]
fn a_part_with_wrong_bytes_is_found_out_and_the_file_fetched_anew() {
    for bad in [vec![7; 4000], vec![7; 9000]] {
        let fixture = Fixture::with_model();
        leave_part(&fixture, &bad);
        assert_whole(fixture.snapshot(&[]).unwrap());
        assert_eq!(ranges(&fixture).last(), Some(&None));
    }
}

#[test]
fn a_server_that_gives_no_parts_gives_the_whole_file() {
    let fixture = Fixture::with_model();
    leave_part(&fixture, &WEIGHTS[..4000]);
    fixture.server.play_always("GET /lfs/", Fault::IgnoreRange);
    assert_whole(fixture.snapshot(&[]).unwrap());
}

#[test]
fn a_short_answer_is_made_up_for() {
    let fixture = Fixture::with_model();
    fixture.server.play("GET /lfs/", Fault::Short(10));
    assert_whole(fixture.snapshot(&[]).unwrap());
}

#[test]
fn an_answer_that_stays_short_is_an_error_of_its_length() {
    let fixture = Fixture::with_model();
    fixture.server.play_always("config.json", Fault::Short(0));
    assert_error(fixture.snapshot(&[]), &["config.json", "length"]);
}

#[test]
fn wrong_bytes_leave_nothing_behind() {
    for (path, fault, what) in [
        ("GET /lfs/", Fault::OtherBytes, "sha256"),
        ("config.json", Fault::OtherBytes, "git digest"),
        ("GET /lfs/", Fault::TooLong, "length"),
        ("model.safetensors", Fault::Etag("0".repeat(64)), "etag"),
        ("config.json", Fault::Etag("0".repeat(40)), "etag"),
    ] {
        let fixture = Fixture::with_model();
        fixture.server.play(path, fault);
        assert_error(
            fixture.snapshot(&[]),
            &["org/name", what, "is removed", "try again"],
        );
        let blobs = fs::read_dir(fixture.folder().join("blobs")).unwrap();
        let names = blobs.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let names: Vec<_> = names.filter(|name| name.len() == 64).collect();
        assert!(
            names.is_empty() || path == "config.json",
            "{what}: {names:?}"
        );
        assert!(!part(&fixture).exists() || path == "config.json");
        assert!(!fixture.folder().join("refs/main").exists());
        assert_whole(fixture.snapshot(&[]).unwrap());
    }
}

#[test]
fn a_failure_of_the_server_passes() {
    for path in ["/revision/main", "/tree/", "config.json", "GET /lfs/"] {
        let fixture = Fixture::with_model();
        fixture.server.play(path, Fault::Status(500, vec![]));
        fixture.server.play(path, Fault::Status(503, vec![]));
        assert_whole(fixture.snapshot(&[]).unwrap());
        assert_eq!(fixture.waited_seconds(), 1.5, "{path}");
    }
}

#[test]
fn a_failure_that_stays_ends_after_five_tries() {
    let fixture = Fixture::with_model();
    fixture
        .server
        .play_always("/revision/main", Fault::Status(502, vec![]));
    assert_error(
        fixture.snapshot(&[]),
        &["org/name", "502", "try again later"],
    );
    assert_eq!(fixture.lines().len(), 5);
    fixture.server.stop_playing();
    assert_whole(fixture.snapshot(&[]).unwrap());
}

#[test]
fn a_connection_that_is_cut_in_an_answer_is_tried_again() {
    for path in ["/revision/main", "/tree/"] {
        let fixture = Fixture::with_model();
        fixture.server.play(path, Fault::Cut(5));
        assert_whole(fixture.snapshot(&[]).unwrap());
    }
}

#[test]
fn a_limit_of_requests_is_waited_for_as_long_as_the_hub_asks() {
    let fixture = Fixture::with_model();
    let header = |name, value: &str| vec![(name, value.to_owned())];
    fixture.server.play(
        "/revision/",
        Fault::Status(429, header("Retry-After", "42")),
    );
    fixture.server.play(
        "/tree/",
        Fault::Status(429, header("RateLimit", "\"api\";r=0;t=55")),
    );
    assert_whole(fixture.snapshot(&[]).unwrap());
    assert_eq!(fixture.waited_seconds().round(), 97.0);
}

#[test]
fn a_limit_of_requests_that_lasts_too_long_is_an_error() {
    let fixture = Fixture::with_model();
    let headers = vec![("Retry-After", "3600".to_owned())];
    fixture
        .server
        .play("/revision/", Fault::Status(429, headers));
    assert_error(
        fixture.snapshot(&[]),
        &["too many requests", "3600 s", "hf auth login"],
    );
    assert_eq!(fixture.waited_seconds(), 0.0);
}

#[test]
fn an_answer_that_does_not_begin_is_asked_for_again() {
    let fixture = Fixture::with_model();
    fixture.server.play("/revision/", Fault::Stall);
    let pairs = [
        ("HF_HUB_ETAG_TIMEOUT", "1"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "1"),
    ];
    assert_whole(fixture.snapshot(&pairs).unwrap());
}
