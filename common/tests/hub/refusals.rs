//! What the hub refuses, and what is refused of it: one clear line each.

use std::io::{Read, Write};
use std::net::TcpListener;

use common::progress::Progress;

use super::*;
use crate::stand_in::Fault;

#[test]
fn without_a_token_a_private_repository_says_how_to_log_in() {
    let fixture = Fixture::with_model();
    fixture.server.require_token("hf_secret");
    fixture.server.make_private(REPO);
    assert_error(
        fixture.snapshot(&[]),
        &["org/name", "private or gated", "hf auth login", "HF_TOKEN"],
    );
    let withheld = [
        ("HF_TOKEN", "hf_secret"),
        ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"),
    ];
    assert_error(
        fixture.snapshot(&withheld),
        &["HF_HUB_DISABLE_IMPLICIT_TOKEN"],
    );
    fixture.snapshot(&[("HF_TOKEN", "hf_secret")]).unwrap();
}

#[test]
fn a_token_that_is_refused_is_named_by_where_it_is_from() {
    let fixture = Fixture::with_model();
    fixture.server.require_token("hf_secret");
    let result = fixture.snapshot(&[("HF_TOKEN", "hf_other")]);
    let message = result.unwrap_err();
    let shown = format!("{message} {message:?}");
    assert!(shown.contains("refuses the token from HF_TOKEN"), "{shown}");
    assert!(!shown.contains("hf_other"), "{shown}");
    std::fs::write(fixture.home.path().join("token"), "hf_other\n").unwrap();
    assert_error(fixture.snapshot(&[]), &["refuses the token from", "/token"]);
}

#[test]
fn a_gated_repository_says_where_its_conditions_are() {
    let fixture = Fixture::with_model();
    fixture.server.require_token("hf_secret");
    fixture.server.make_gated(REPO);
    let page = format!("{}/org/name", fixture.server.endpoint());
    assert_error(fixture.snapshot(&[]), &["is gated", &page, "hf auth login"]);
    let with_token = fixture.snapshot(&[("HF_TOKEN", "hf_secret")]);
    assert_error(with_token, &["is gated", &page, "account of the token"]);
}

#[test]
fn what_is_not_there_is_named() {
    let fixture = Fixture::with_model();
    let (hub, progress) = (fixture.hub(&[]), Progress::default());
    let result = hub.listing(&model_id("org/nmae"), "main", &progress);
    assert_error(result, &["model org/nmae", "private or misspelled"]);
    let result = hub.listing(&model_id("org/name"), "v9", &progress);
    assert_error(result, &["org/name", "no revision `v9`"]);
    let gone = Fault::Status(404, vec![("X-Error-Code", "EntryNotFound".to_owned())]);
    fixture.server.play("config.json", gone);
    assert_error(fixture.snapshot(&[]), &["org/name has no file config.json"]);
}

#[test]
fn a_file_name_that_leads_elsewhere_is_refused_before_anything_is_fetched() {
    for path in ["../evil.json", "/etc/passwd", "a\\b.json", "nul.json"] {
        let fixture = Fixture::new();
        fixture
            .server
            .commit(REPO, &[(path, b"evil"), ("config.json", b"{}")]);
        let quoted = format!("{path:?}");
        assert_error(
            fixture.snapshot(&[]),
            &["org/name", &quoted, "is not taken"],
        );
        assert!(
            !fixture
                .lines()
                .iter()
                .any(|line| line.contains("/resolve/"))
        );
        let is_config = |path: &str| path == "config.json";
        let (hub, progress) = (fixture.hub(&[]), Progress::default());
        hub.snapshot(&model_id("org/name"), "main", &is_config, &progress)
            .unwrap();
    }
}

#[test]
fn redirects_without_end_end() {
    let fixture = Fixture::with_model();
    let target = "/api/models/org/name/revision/main".to_owned();
    fixture
        .server
        .play_always("/revision/", Fault::Redirect(target));
    assert_error(fixture.snapshot(&[]), &["org/name", "without end"]);
    assert_eq!(fixture.lines().len(), 9);
}

#[test]
fn a_redirect_to_what_is_no_web_address_is_refused() {
    for target in ["", "file:///etc/passwd", "http://"] {
        let fixture = Fixture::with_model();
        fixture
            .server
            .play("/revision/", Fault::Redirect(target.to_owned()));
        assert_error(fixture.snapshot(&[]), &["org/name", "is not followed"]);
    }
}

#[test]
fn a_list_of_files_without_end_ends() {
    let fixture = Fixture::with_model();
    fixture.server.page_files(0);
    assert_error(fixture.snapshot(&[]), &["org/name", "does not end"]);
}

#[test]
fn an_answer_that_is_no_json_or_names_no_commit_is_told_with_its_address() {
    for body in ["<html>", "{}", r#"{"sha": "../../x"}"#] {
        let fixture = Fixture::with_model();
        fixture
            .server
            .play("/revision/", Fault::Body(body.to_owned()));
        assert_error(
            fixture.snapshot(&[]),
            &["org/name", "/revision/main", "cannot be used"],
        );
    }
}

#[test]
fn a_file_without_a_usable_digest_is_refused() {
    let fixture = Fixture::with_model();
    let tree = r#"[{"type": "file", "path": "a", "size": 1, "oid": "../../x"}]"#;
    fixture.server.play("/tree/", Fault::Body(tree.to_owned()));
    assert_error(fixture.snapshot(&[]), &["org/name", "\"a\" has no digest"]);
}

#[test]
fn a_host_that_speaks_no_tls_or_has_no_name_is_told_with_the_variables() {
    let fixture = Fixture::with_model();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let https = format!("https://{}", listener.local_addr().unwrap());
    let plain = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream
            .write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            .unwrap();
        // Until the client hangs up.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let result = fixture.snapshot(&[("HF_ENDPOINT", &https)]);
    assert_error(
        result,
        &["cannot be reached", "HTTPS_PROXY", "SSL_CERT_FILE"],
    );
    plain.join().unwrap();
    let result = fixture.snapshot(&[("HF_ENDPOINT", "http://hub.invalid")]);
    assert_error(result, &["hub.invalid cannot be reached", "HF_ENDPOINT"]);
}

#[test]
fn a_file_without_certificates_is_named() {
    let fixture = Fixture::new();
    let path = fixture.home.path().join("roots.pem");
    std::fs::write(&path, "none").unwrap();
    let environment = fixture.environment(&[("SSL_CERT_FILE", path.to_str().unwrap())]);
    assert_error(
        Hub::new(environment).map(drop),
        &["roots.pem", "no certificates"],
    );
}

#[test]
fn files_for_which_the_disk_has_no_room_are_refused_before_any_is_fetched() {
    let fixture = Fixture::with_model();
    let digest = "0".repeat(40);
    let file = |path, size: u64| {
        format!(r#"{{"type": "file", "path": "{path}", "size": {size}, "oid": "{digest}"}}"#)
    };
    // Together they are more than a number holds.
    let tree = format!("[{}, {}]", file("a", u64::MAX), file("b", u64::MAX));
    fixture.server.play("/tree/", Fault::Body(tree));
    assert_error(
        fixture.snapshot(&[]),
        &["bytes", "make room", "HF_HUB_CACHE"],
    );
    assert!(
        !fixture
            .lines()
            .iter()
            .any(|line| line.contains("/resolve/"))
    );
}
