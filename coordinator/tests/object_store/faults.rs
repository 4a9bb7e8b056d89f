//! What goes wrong: tried again where it passes, and else one line that says what to do.

use super::stand_in::Fault;
use super::*;

#[test]
fn what_passes_is_tried_again_and_what_breaks_off_goes_on_where_it_broke() {
    let fixture = Fixture::new();
    fixture.store.put("a.jsonl", rows("Ahoy", 9));
    fixture.store.fault("HEAD", Fault::Status(503, "SlowDown"));
    fixture.store.fault("GET /data/a.jsonl", Fault::Cut(40));
    let dataset = json!([{"path": "s3://data/a.jsonl"}]);
    let told = fixture.run("check", &dataset, &["--show", "0", "--log-level", "debug"]);
    assert_eq!(told.code, Some(0), "{}", told.stderr);
    assert_has(&told.stdout, &["9 rows"]);
    assert_has(
        &told.stderr,
        &[
            "503",
            "the answer of 127.0.0.1 broke off",
            "trying again in",
        ],
    );
    assert_eq!(
        fixture.store.gets(),
        ["GET /data/a.jsonl", "GET /data/a.jsonl bytes=40-"]
    );
}

#[test]
fn a_store_that_stays_out_of_order_is_told_after_some_tries() {
    let fixture = Fixture::new();
    fixture.store.put("a.jsonl", rows("Ahoy", 9));
    for _ in 0..5 {
        fixture.store.fault("HEAD", Fault::Status(503, "SlowDown"));
    }
    let line = fixture.refusal(&json!({"path": "s3://data/a.jsonl"}));
    assert_has(
        &line,
        &[
            "s3://data/a.jsonl: the store answered 503",
            "try again later",
        ],
    );
    assert_eq!(fixture.store.requests().len(), 5);
}

#[test]
fn an_object_that_changes_while_it_is_read_is_read_anew() {
    let fixture = Fixture::new();
    fixture.store.put("a.jsonl", rows("Ahoy", 9));
    fixture.store.fault("GET /data/a.jsonl", Fault::Cut(40));
    let other = rows("Hello", 5).into_bytes();
    fixture
        .store
        .fault("bytes=40-", Fault::Replace("a.jsonl", other));
    let text = fixture.check(&json!({"path": "s3://data/a.jsonl"}));
    assert_has(&text, &["5 rows"]);
    assert_eq!(fixture.store.gets().len(), 3);
}

#[test]
fn what_is_not_there_is_one_line_with_its_address() {
    let fixture = Fixture::new();
    fixture.store.put("set/a.jsonl", rows("Ahoy", 9));
    fixture.store.put("notes/b.md", "no rows");
    for (path, words) in [
        (
            "s3://data/set/b.jsonl",
            "there is no such object and no folder of this name",
        ),
        ("s3://data/empty/", "there are no objects in this folder"),
        (
            "s3://data/empty/*.jsonl",
            "there are no objects in this folder",
        ),
        (
            "s3://data/set/*.csv",
            "is a pattern that no data file matches",
        ),
        ("s3://data/notes", "is a folder that has no data files"),
        ("s3://other/a.jsonl", "there is no such bucket"),
        ("s3:///a.jsonl", "the address names no bucket"),
        ("s3://data/a//b.jsonl", "empty parts"),
    ] {
        let line = fixture.refusal(&json!({"path": path}));
        assert_has(&line, &[path, words]);
    }
}

#[test]
fn fields_of_a_folder_beside_one_object_or_a_pattern_are_refused() {
    let fixture = Fixture::new();
    fixture.store.put("a.jsonl", rows("Ahoy", 9));
    for (dataset, words) in [
        (
            json!({"path": "s3://data/a.jsonl", "data_files": "b.jsonl"}),
            "is one object, and no folder that has data_files in it",
        ),
        (
            json!({"path": "s3://data/*.jsonl", "name": "x"}),
            "is a pattern, and no folder that has name in it",
        ),
        (
            json!({"path": "s3://data/a.jsonl", "split": "test"}),
            "split test is not there",
        ),
    ] {
        assert_has(&fixture.refusal(&dataset), &["s3://data/", words]);
    }
}

#[test]
fn who_may_not_read_is_told_by_which_variables_that_is_decided() {
    let fixture = Fixture::new();
    fixture.store.put("a.jsonl", rows("Ahoy", 9));
    let dataset = json!({"path": "s3://data/a.jsonl"});
    let line = {
        let mut fixture = fixture;
        fixture
            .variables
            .push(("AWS_ACCESS_KEY_ID", "AKIAOTHER".to_owned()));
        let line = fixture.refusal(&json!({"path": "s3://data/*.jsonl"}));
        assert_has(
            &line,
            &[
                "access is denied (403 InvalidAccessKeyId",
                "AWS_ACCESS_KEY_ID",
            ],
        );
        fixture.variables.push(("AWS_ACCESS_KEY_ID", String::new()));
        let half = fixture.refusal(&dataset);
        assert_has(&half, &["the environment does not say how to reach it"]);
        fixture
            .variables
            .push(("AWS_SECRET_ACCESS_KEY", String::new()));
        fixture.refusal(&dataset)
    };
    assert_has(
        &line,
        &[
            "s3://data/a.jsonl: no credentials were found",
            "AWS_SECRET_ACCESS_KEY",
        ],
    );
}

#[test]
fn a_store_that_is_not_there_or_not_to_be_trusted_is_one_line() {
    let dataset = json!({"path": "s3://data/a.jsonl"});
    for (name, value, words) in [
        ("AWS_ALLOW_HTTP", "", "set AWS_ALLOW_HTTP=true"),
        (
            "AWS_ENDPOINT_URL",
            "127.0.0.1:9000",
            "environment variable AWS_ENDPOINT_URL: it is not the http:// or https:// address",
        ),
        ("HF_HUB_OFFLINE", "1", "HF_HUB_OFFLINE is set"),
        ("AWS_PROFILE", "nobody", "3 rows"),
    ] {
        let fixture = Fixture::new().with(name, value);
        fixture.store.put("a.jsonl", rows("Ahoy", 3));
        // Keys of the environment count before a profile.
        match words.ends_with("rows") {
            true => assert_has(&fixture.check(&dataset), &[words]),
            false => assert_has(&fixture.refusal(&dataset), &[words]),
        }
    }
    let fixture = Fixture::new().with("AWS_ENDPOINT_URL", "http://127.0.0.1:1");
    let line = fixture.refusal(&dataset);
    assert_has(&line, &["127.0.0.1 cannot be reached", "AWS_ENDPOINT_URL"]);
}

#[test]
fn what_is_in_the_cache_serves_where_the_store_cannot_be_asked() {
    let fixture = Fixture::new();
    fixture.store.put("a.jsonl", rows("Ahoy", 3));
    let dataset = json!({"path": "s3://data/a.jsonl"});
    fixture.check(&dataset);
    let fixture = fixture.with("HF_HUB_OFFLINE", "1");
    let text = fixture.check(&dataset);
    assert_has(&text, &["3 rows", "its store could not be asked"]);
}

#[test]
fn azure_without_an_account_says_how_to_name_it() {
    let fixture = Fixture::new();
    let line = fixture.refusal(&json!({"path": "az://box/a.jsonl"}));
    assert_has(&line, &["az://box/a.jsonl: ", "AZURE_STORAGE_ACCOUNT_NAME"]);
}
