//! Files at web addresses: fetched once for each version, continued where they broke off, never taken for whole where they are not.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::mpsc::{Receiver, channel};

use common::hub::WebFile;

use super::*;

const ROWS: &[u8] = b"{\"text\": \"one\"}\n{\"text\": \"two\"}\n";

/// What is done with one request.
#[derive(Clone)]
enum Reply {
    /// The file, or what is asked for of it, as this version; cut off after so many bytes of it.
    File(&'static str, usize),
    /// The whole file, whatever part is asked for, without a word on its version.
    Plain(&'static [u8]),
    Status(u16),
}

/// Answers one request after the other with these, then nobody is there any more. Gives back the address and the ranges asked for.
fn serve(replies: Vec<Reply>) -> (String, Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!(
        "http://{}/a/rows.jsonl?key=secret",
        listener.local_addr().unwrap()
    );
    let (sender, ranges) = channel();
    std::thread::spawn(move || {
        for reply in replies {
            let (mut stream, _) = listener.accept().unwrap();
            let mut range = String::new();
            for line in BufReader::new(stream.try_clone().unwrap()).lines() {
                let line = line.unwrap();
                if let Some(asked) = line.to_lowercase().strip_prefix("range: bytes=") {
                    range = asked.trim_end_matches('-').to_owned();
                }
                assert!(!line.to_lowercase().starts_with("authorization"));
                if line.is_empty() {
                    break;
                }
            }
            let from: usize = range.parse().unwrap_or(0);
            let _ = sender.send(range.clone());
            let (head, body, sent) = match reply {
                Reply::File(tag, sent) => {
                    let body = &ROWS[from..];
                    let part = match range.is_empty() {
                        true => "200 OK".to_owned(),
                        false => format!(
                            "206 Partial\r\nContent-Range: bytes {from}-{}/{}",
                            ROWS.len() - 1,
                            ROWS.len()
                        ),
                    };
                    (format!("{part}\r\nETag: {tag}"), body, sent.min(body.len()))
                }
                Reply::Plain(body) => ("200 OK".to_owned(), body, body.len()),
                Reply::Status(status) => (format!("{status} Sorry"), &b""[..], 0),
            };
            let length = body.len();
            let head =
                format!("HTTP/1.1 {head}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
            // The client may have gone.
            let _ = stream.write_all(head.as_bytes());
            let _ = stream.write_all(&body[..sent]);
        }
    });
    (url, ranges)
}

const ALL: usize = usize::MAX;

fn fetch(fixture: &Fixture, url: &str) -> Result<WebFile, HubError> {
    fixture.hub(&[]).fetch_url(url, None, &Progress::default())
}

#[test]
fn a_version_is_fetched_once_and_a_new_one_anew() {
    let fixture = Fixture::new();
    let (url, _) = serve(vec![
        Reply::File("\"one\"", ALL),
        // The same version: nothing of the body is read.
        Reply::File("\"one\"", 0),
        Reply::File("\"two\"", ALL),
    ]);
    let first = fetch(&fixture, &url).unwrap();
    assert_eq!(std::fs::read(&first.path).unwrap(), ROWS);
    assert!(first.path.ends_with("rows.jsonl"), "{first:?}");
    assert_eq!(fetch(&fixture, &url).unwrap(), first);
    let other = fetch(&fixture, &url).unwrap();
    assert!(other.version != first.version && first.path.is_file());
    // Now nobody is there: the newest will do, and it is told.
    assert!(fetch(&fixture, &url).unwrap().is_stale);
    // A run that goes on takes the version that it began with, and asks nobody.
    let progress = Progress::default();
    let hub = fixture.hub(&[]);
    let pinned = hub.fetch_url(&url, Some(&first.version), &progress);
    assert_eq!(pinned.unwrap(), first);
    let outside = hub.fetch_url(&url, Some("../../../x"), &progress).unwrap();
    assert!(outside.is_stale);
}

#[test]
fn what_breaks_off_goes_on_where_it_broke() {
    let fixture = Fixture::new();
    let (url, ranges) = serve(vec![
        Reply::File("\"one\"", 5),
        Reply::Status(503),
        Reply::File("\"one\"", 7),
        Reply::File("\"one\"", ALL),
    ]);
    let file = fetch(&fixture, &url).unwrap();
    assert_eq!(std::fs::read(&file.path).unwrap(), ROWS);
    assert_eq!(
        ranges.iter().take(4).collect::<Vec<_>>(),
        ["", "5", "5", "12"]
    );
}

#[test]
fn the_rest_of_another_version_is_not_put_behind_the_first() {
    let fixture = Fixture::new();
    let (url, ranges) = serve(vec![
        Reply::File("\"one\"", 5),
        Reply::File("\"two\"", ALL),
        Reply::File("\"two\"", ALL),
    ]);
    let file = fetch(&fixture, &url).unwrap();
    assert_eq!(std::fs::read(&file.path).unwrap(), ROWS);
    assert_eq!(ranges.iter().take(3).collect::<Vec<_>>(), ["", "5", ""]);
}

#[test]
fn an_earlier_run_s_part_is_continued() {
    let fixture = Fixture::new();
    let cut = vec![Reply::File("\"one\"", 9); 1];
    let more = vec![Reply::Status(404), Reply::File("\"one\"", ALL)];
    let (url, ranges) = serve([cut, more].concat());
    // The second try of the first run finds nothing there.
    let error = fetch(&fixture, &url).unwrap_err().to_string();
    assert!(
        error.contains("404") && error.contains("check the address"),
        "{error}"
    );
    assert!(!error.contains("secret"), "{error}");
    let file = fetch(&fixture, &url).unwrap();
    assert_eq!(std::fs::read(&file.path).unwrap(), ROWS);
    assert_eq!(ranges.iter().take(3).collect::<Vec<_>>(), ["", "9", "9"]);
}

#[test]
fn what_has_no_version_is_known_by_its_content() {
    let fixture = Fixture::new();
    let (url, _) = serve(vec![
        Reply::Plain(b"{\"text\": 1}\n"),
        Reply::Plain(b"{\"text\": 2}\n"),
        Reply::Plain(b"{\"text\": 2}\n"),
    ]);
    let versions = [(); 3].map(|()| fetch(&fixture, &url).unwrap());
    assert_ne!(versions[0], versions[1]);
    assert_eq!(versions[1], versions[2]);
    assert_eq!(
        std::fs::read(&versions[0].path).unwrap(),
        b"{\"text\": 1}\n"
    );
}

#[test]
fn a_server_that_is_gone_or_forbidden_is_one_line() {
    let fixture = Fixture::new();
    let (url, _) = serve(Vec::new());
    let error = fetch(&fixture, &url).unwrap_err().to_string();
    assert!(
        error.contains("/a/rows.jsonl") && !error.contains("secret"),
        "{error}"
    );
    let offline = fixture.hub(&[("HF_HUB_OFFLINE", "1")]);
    let error = offline.fetch_url(&url, None, &Progress::default());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("HF_HUB_OFFLINE"), "{error}");
    assert!(error.contains("name a file on this machine"), "{error}");
}
