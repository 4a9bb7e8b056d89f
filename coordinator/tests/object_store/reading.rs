//! What is read: a file, a folder, a pattern, and the same again without asking for it twice.

use super::*;

#[test]
fn an_object_is_fetched_once_for_each_version() {
    let fixture = Fixture::new();
    fixture.store.put("chats/train.jsonl", rows("Ahoy", 7));
    let dataset = json!({"path": "s3://data/chats/train.jsonl"});
    assert_has(&fixture.check(&dataset), &["7 rows"]);
    assert_eq!(fixture.store.gets(), ["GET /data/chats/train.jsonl"]);
    assert_has(&fixture.check(&dataset), &["7 rows"]);
    assert!(fixture.store.gets().is_empty());
    // As many bytes, but other ones.
    fixture.store.put("chats/train.jsonl", rows("Ohoy", 7));
    fixture.check(&dataset);
    assert_eq!(fixture.store.gets(), ["GET /data/chats/train.jsonl"]);
}

#[test]
fn a_folder_is_its_data_files_by_split() {
    let fixture = Fixture::new();
    for (key, count) in [
        ("set/train-1.jsonl", 3),
        ("set/in/train-2.jsonl", 4),
        ("set/test.jsonl", 2),
        ("settled/train.jsonl", 50),
    ] {
        fixture.store.put(key, rows("Ahoy", count));
    }
    fixture.store.put("set/", "");
    fixture.store.put("set/notes.md", "no rows");
    for path in ["s3://data/set", "s3://data/set/", "s3a://data/set"] {
        let text = fixture.check(&json!({"path": path, "split": "train"}));
        assert_has(&text, &["7 rows"]);
    }
    // What is not read is not fetched.
    let gets = fixture.store.gets();
    assert!(
        !gets
            .iter()
            .any(|line| line.contains("test.jsonl") || line.contains("notes"))
    );
    let text = fixture.check(&json!({"path": "s3://data/set", "split": "test"}));
    assert_has(&text, &["2 rows"]);
    let text = fixture.check(&json!({"path": "s3://data/set", "data_files": "in/*.jsonl"}));
    assert_has(&text, &["4 rows"]);
    let text = fixture.check(&json!({"path": "s3://data/set", "data_dir": "in"}));
    assert_has(&text, &["4 rows"]);
}

#[test]
fn a_folder_with_a_card_has_its_configurations() {
    let fixture = Fixture::new();
    let card = "---\nconfigs:\n- config_name: pirates\n  data_files: a.jsonl\n- config_name: sailors\n  data_files: b.jsonl\n---\n";
    fixture.store.put("set/README.md", card);
    fixture.store.put("set/a.jsonl", rows("Ahoy", 3));
    fixture.store.put("set/b.jsonl", rows("Hello", 5));
    let text = fixture.check(&json!({"path": "s3://data/set", "name": "sailors"}));
    assert_has(&text, &["5 rows"]);
}

#[test]
fn a_pattern_is_the_objects_that_it_matches_also_compressed_and_with_odd_names() {
    let fixture = Fixture::new();
    let mut packed = Vec::new();
    let source = fixture.path("rows.jsonl");
    fs::write(&source, rows("Ahoy", 6)).unwrap();
    let status = Command::new("gzip").arg("-k").arg(&source).status();
    assert!(status.unwrap().success());
    std::io::Read::read_to_end(
        &mut fs::File::open(fixture.path("rows.jsonl.gz")).unwrap(),
        &mut packed,
    )
    .unwrap();
    fixture.store.put("in/a b+ü#1.jsonl.gz", packed);
    fixture.store.put("in/part-1.jsonl", rows("Ahoy", 2));
    fixture.store.put("in/part-2.jsonl", rows("Ahoy", 3));
    fixture
        .store
        .put("in/deeper/part-3.jsonl", rows("Ahoy", 40));
    for (pattern, expected) in [
        ("in/*", "11 rows"),
        ("in/*.gz", "6 rows"),
        ("in/part-?.jsonl", "5 rows"),
        ("**/part-[23].jsonl", "43 rows"),
        ("in/a b+ü#1.jsonl.gz", "6 rows"),
    ] {
        let text = fixture.check(&json!({"path": format!("s3://data/{pattern}")}));
        assert_has(&text, &[expected]);
    }
    let named = json!({"data_files": ["s3://data/in/part-1.jsonl", "s3://data/in/*.gz"]});
    let path = fixture.check(&json!({"path": "json", "data_files": named["data_files"]}));
    assert_has(&path, &["8 rows"]);
}

#[cfg(feature = "single-node")]
#[test]
fn a_run_that_goes_on_reads_what_it_began_with_and_asks_nobody() {
    let fixture = Fixture::new();
    fixture.store.put("set/a.jsonl", rows("Ahoy", 30));
    fixture.store.put("set/b.jsonl", rows("Ahoy", 30));
    let datasets = json!([{"path": "s3://data/set"}]);
    let options = ["--max-steps", "1", "--sequence-len", "64"];
    let start = [&options[..], &["--single-node"]].concat();
    let told = fixture.run("start", &datasets, &start);
    assert_eq!(told.code, Some(0), "{}{}", told.stdout, told.stderr);
    fixture.store.put("set/a.jsonl", rows("Other", 1));
    fixture.store.put("set/c.jsonl", rows("Ahoy", 5));
    fixture.store.requests();
    let check = |more: &[&str]| {
        let told = fixture.run(
            "check",
            &datasets,
            &[&options[..], &["--show", "0"], more].concat(),
        );
        assert_eq!(told.code, Some(0), "{}", told.stderr);
        told.stdout
    };
    assert_has(&check(&[]), &["60 rows"]);
    assert_eq!(fixture.store.requests().len(), 0);
    assert_has(&check(&["--output-dir", "other"]), &["36 rows"]);
}

#[cfg(feature = "single-node")]
#[test]
fn a_run_goes_on_where_its_card_names_splits_that_it_does_not_read() {
    let fixture = Fixture::new();
    let card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a.jsonl\n  - split: test\n    path: b.jsonl\n---\n";
    fixture.store.put("set/README.md", card);
    fixture.store.put("set/a.jsonl", rows("Ahoy", 30));
    fixture.store.put("set/b.jsonl", rows("Ahoy", 7));
    let datasets = json!([{"path": "s3://data/set", "split": "train"}]);
    let options = ["--max-steps", "1", "--sequence-len", "64", "--single-node"];
    for _ in 0..2 {
        let told = fixture.run("start", &datasets, &options);
        assert_eq!(told.code, Some(0), "{}{}", told.stdout, told.stderr);
    }
    fixture.store.requests();
    let told = fixture.run("check", &datasets, &options[..4]);
    assert_has(&told.stdout, &["30 rows"]);
    assert_eq!(fixture.store.requests().len(), 0);
}

#[test]
fn what_only_the_hub_has_is_passed_over_by_name() {
    let fixture = Fixture::new();
    fixture.store.put("a.jsonl", rows("Ahoy", 3));
    let dataset = json!({"path": "s3://data/a.jsonl", "revision": "v1", "name": "pirates"});
    let text = fixture.check(&dataset);
    assert_has(&text, &["asks for nothing: revision v1, name pirates"]);
}

#[test]
fn a_public_bucket_needs_no_credentials() {
    let fixture = Fixture::new()
        .with("AWS_ACCESS_KEY_ID", "")
        .with("AWS_SECRET_ACCESS_KEY", "");
    fixture.store.make_public();
    fixture.store.put("a.jsonl", rows("Ahoy", 3));
    let told = fixture.run("check", &json!(["s3://data/a.jsonl"]), &["--show", "0"]);
    assert_has(&told.stdout, &["3 rows"]);
    // That there are none is found out at once.
    assert!(!told.stderr.contains("trying again"), "{}", told.stderr);
    let requests = fixture.store.requests();
    assert!(
        requests
            .iter()
            .all(|request| request.header("authorization").is_none())
    );
}

#[test]
fn a_bucket_is_asked_in_the_region_where_it_is() {
    let fixture = Fixture::new().with("AWS_REGION", "us-west-2");
    fixture.store.put("a.jsonl", rows("Ahoy", 3));
    assert_has(
        &fixture.check(&json!({"path": "s3://data/a.jsonl"})),
        &["3 rows"],
    );
}

#[test]
fn a_profile_has_the_credentials_where_the_environment_has_none() {
    let fixture = Fixture::new()
        .with("AWS_ACCESS_KEY_ID", "")
        .with("AWS_SECRET_ACCESS_KEY", "")
        .with("AWS_REGION", "");
    fs::create_dir(fixture.path(".aws")).unwrap();
    let text = format!(
        "[default]\naws_access_key_id = {KEY_ID}\naws_secret_access_key = {SECRET}\nregion = {REGION}\n"
    );
    fs::write(fixture.path(".aws/credentials"), text).unwrap();
    fixture.store.put("a.jsonl", rows("Ahoy", 3));
    assert_has(
        &fixture.check(&json!({"path": "s3://data/a.jsonl"})),
        &["3 rows"],
    );
}

#[test]
fn google_s_store_is_read_by_the_same_words() {
    let fixture = Fixture::new().with("GOOGLE_ALLOW_HTTP", "true");
    let endpoint = fixture.store.endpoint();
    let fixture = fixture
        .with("GOOGLE_BASE_URL", &endpoint)
        .with("GOOGLE_SKIP_SIGNATURE", "true");
    fixture.store.make_public();
    fixture.store.put("set/train.jsonl", rows("Ahoy", 3));
    fixture.store.put("set/more.jsonl", rows("Ahoy", 4));
    for (path, expected) in [
        ("gs://data/set/train.jsonl", "3 rows"),
        ("gcs://data/set/*.jsonl", "7 rows"),
    ] {
        assert_has(&fixture.check(&json!({"path": path})), &[expected]);
    }
}
