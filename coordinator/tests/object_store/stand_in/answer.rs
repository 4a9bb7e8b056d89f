//! What the stand-in says to a request that meets no fault.

use common::hub::sha256_hex;

use super::signature::{self, Refusal};
use super::{Answer, BUCKET, PAGE, REGION, Request, State};

pub fn answer(state: &State, request: &Request) -> Answer {
    match request.header("authorization") {
        None if !state.is_public => return error(403, "AccessDenied"),
        None => {}
        Some(_) => match signature::check(request) {
            Ok(()) => {}
            Err(Refusal::Key) => return error(403, "InvalidAccessKeyId"),
            Err(Refusal::Region) => return region(error(400, "AuthorizationHeaderMalformed")),
            Err(Refusal::Signature) => return error(403, "SignatureDoesNotMatch"),
        },
    }
    let (path, query) = request
        .target
        .split_once('?')
        .unwrap_or((&request.target, ""));
    let path = decoded(path);
    let rest = path.strip_prefix(&format!("/{BUCKET}"));
    match rest.map(|rest| rest.trim_start_matches('/')) {
        None => error(404, "NoSuchBucket"),
        Some("") => list(state, query),
        Some(key) => object(state, key, request),
    }
}

/// An error as S3 words it.
pub fn error(status: u16, code: &str) -> Answer {
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>What {code} means.</Message><RequestId>1</RequestId></Error>"
    );
    Answer {
        status,
        headers: vec![("Content-Type".to_owned(), "application/xml".to_owned())],
        body: body.into_bytes(),
    }
}

fn region(mut answer: Answer) -> Answer {
    let name = "x-amz-bucket-region".to_owned();
    answer.headers.push((name, REGION.to_owned()));
    answer
}

fn object(state: &State, key: &str, request: &Request) -> Answer {
    let Some(content) = state.objects.get(key) else {
        return error(404, "NoSuchKey");
    };
    let tag = tag(content);
    if request
        .header("if-match")
        .is_some_and(|wanted| wanted != tag)
    {
        return error(412, "PreconditionFailed");
    }
    let from = request.header("range").and_then(|range| {
        let range = range.strip_prefix("bytes=")?;
        range.trim_end_matches('-').parse::<usize>().ok()
    });
    let mut headers = vec![
        ("ETag".to_owned(), tag),
        (
            "Last-Modified".to_owned(),
            "Mon, 30 Nov 2026 09:00:00 GMT".to_owned(),
        ),
    ];
    let (status, body) = match from {
        None => (200, content.clone()),
        Some(from) => {
            let range = format!("bytes {from}-{}/{}", content.len() - 1, content.len());
            headers.push(("Content-Range".to_owned(), range));
            (206, content[from..].to_vec())
        }
    };
    Answer {
        status,
        headers,
        body,
    }
}

fn list(state: &State, query: &str) -> Answer {
    let value = |name: &str| {
        let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        let found = pairs.into_iter().find(|(key, _)| *key == name);
        found.map(|(_, value)| decoded(value))
    };
    let prefix = value("prefix").unwrap_or_default();
    let after = value("continuation-token").unwrap_or_default();
    let objects = state.objects.iter();
    let mut left = objects.filter(|(key, _)| key.starts_with(&prefix) && **key > after);
    let mut entries = String::new();
    let mut last = None;
    for (key, content) in left.by_ref().take(PAGE) {
        let escaped = key.replace('&', "&amp;").replace('<', "&lt;");
        entries += &format!(
            "<Contents><Key>{escaped}</Key><LastModified>2026-11-30T09:00:00.000Z</LastModified><ETag>&quot;{}&quot;</ETag><Size>{}</Size></Contents>",
            tag(content).trim_matches('"'),
            content.len()
        );
        last = Some(key);
    }
    let more = match (left.next(), last) {
        (Some(_), Some(last)) => format!(
            "<IsTruncated>true</IsTruncated><NextContinuationToken>{last}</NextContinuationToken>"
        ),
        _ => "<IsTruncated>false</IsTruncated>".to_owned(),
    };
    Answer {
        status: 200,
        headers: vec![("Content-Type".to_owned(), "application/xml".to_owned())],
        body: format!("<ListBucketResult><Name>{BUCKET}</Name>{more}{entries}</ListBucketResult>")
            .into_bytes(),
    }
}

fn tag(content: &[u8]) -> String {
    format!("\"{}\"", &sha256_hex(content)[..32])
}

fn decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut plain, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let hex = text.get(at + 1..at + 3).filter(|_| bytes[at] == b'%');
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                plain.push(byte);
                at += 3;
            }
            None => {
                plain.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}
