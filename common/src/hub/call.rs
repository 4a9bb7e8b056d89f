//! One call to the hub, in a form that can be sent several times, and where an answer sends it to.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Take};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ureq::http::{Method, Response, Uri, header};

use super::HubError;
use super::failure::{Failure, Subject};
use crate::progress::Progress;

/// One call, in a form that can be sent several times.
pub(super) struct Call<'a> {
    pub method: Method,
    pub url: String,
    pub headers: Vec<(String, String)>,
    pub payload: Payload<'a>,
    pub subject: Subject,
    /// Most time until the answer begins, where it is not the usual one.
    pub answer_timeout: Option<Duration>,
    /// A hub that cannot be reached is not tried again: the cache will do.
    pub is_dispensable: bool,
}

/// What a call sends.
pub(super) enum Payload<'a> {
    Nothing,
    Bytes(&'a [u8]),
    /// Part of a file.
    Slice {
        path: &'a Path,
        offset: u64,
        size: u64,
        /// How much of it the progress was told already.
        counted: &'a AtomicU64,
    },
}

impl<'a> Call<'a> {
    pub fn new(method: Method, url: String, subject: Subject) -> Self {
        Self {
            method,
            url,
            headers: Vec::new(),
            payload: Payload::Nothing,
            subject,
            answer_timeout: None,
            is_dispensable: false,
        }
    }

    pub fn get(url: String, subject: Subject) -> Self {
        Self::new(Method::GET, url, subject)
    }

    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub fn payload(mut self, payload: Payload<'a>) -> Self {
        self.payload = payload;
        self
    }

    pub fn answer_timeout(mut self, timeout: Duration) -> Self {
        self.answer_timeout = Some(timeout);
        self
    }
}

/// The address without what is behind the `?`, which may be a signature that lets anyone in.
pub(super) fn without_query(url: &str) -> String {
    url.split('?').next().unwrap_or(url).to_owned()
}

/// Scheme, host and port of an address: who it is that is asked.
pub(super) fn origin(url: &Uri) -> (Option<String>, Option<String>, Option<u16>) {
    let scheme = url.scheme_str().map(str::to_ascii_lowercase);
    let usual_port = match scheme.as_deref() {
        Some("https") => Some(443),
        Some("http") => Some(80),
        _ => None,
    };
    let port = url.port_u16().or(usual_port);
    (scheme, url.host().map(str::to_ascii_lowercase), port)
}

/// The address that a redirect leads to.
pub(super) fn redirected<B>(
    call: &Call,
    from: &Uri,
    response: &Response<B>,
) -> Result<Uri, Failure> {
    let location = response.headers().get(header::LOCATION);
    let location = location.and_then(|value| value.to_str().ok()).unwrap_or("");
    let refuse = |reason| {
        Failure::Final(HubError::BadRedirect {
            subject: call.subject.to_string(),
            url: without_query(location),
            reason,
        })
    };
    let status = response.status().as_u16();
    if !matches!(status, 307 | 308) && call.method != Method::GET {
        return Err(refuse("it would lose what is sent"));
    }
    let scheme = from.scheme_str().unwrap_or("https");
    let authority = from.authority().map_or("", |authority| authority.as_str());
    let absolute = if location.is_empty() {
        return Err(refuse("it has no address"));
    } else if has_scheme(location) {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else {
        let folder = from
            .path()
            .rsplit_once('/')
            .map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{location}")
    };
    let url: Uri = absolute.parse().map_err(|_| refuse("it is no address"))?;
    match (scheme, url.scheme_str()) {
        ("https", Some("http")) => Err(refuse("it leads from https to http")),
        (_, Some("https" | "http")) if url.host().is_some() => Ok(url),
        _ => Err(refuse("it is no web address")),
    }
}

/// Whether an address says its scheme; one that is only a path may have `://` in its query.
fn has_scheme(address: &str) -> bool {
    let scheme = address.split_once("://").map(|(scheme, _)| scheme);
    scheme.is_some_and(|scheme| scheme.bytes().all(|byte| byte.is_ascii_alphanumeric()))
}

/// Opens part of a file to be sent; the progress is told of each byte once, however often it is sent.
pub(super) fn open_slice<'a>(
    path: &Path,
    offset: u64,
    size: u64,
    counted: &'a AtomicU64,
    progress: &'a Progress,
) -> Result<impl Read + 'a, HubError> {
    let mut file = File::open(path).map_err(HubError::io("read", path))?;
    file.seek(SeekFrom::Start(offset))
        .map_err(HubError::io("read", path))?;
    Ok(Counting {
        reader: file.take(size),
        sent: 0,
        counted,
        progress,
    })
}

/// A reader that tells the progress what has been sent.
struct Counting<'a> {
    reader: Take<File>,
    sent: u64,
    counted: &'a AtomicU64,
    progress: &'a Progress,
}

impl Read for Counting<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.progress.check()?;
        let count = self.reader.read(buffer)?;
        self.sent += count as u64;
        let before = self.counted.fetch_max(self.sent, Ordering::Relaxed);
        self.progress.advance(self.sent.saturating_sub(before));
        Ok(count)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn target(location: &str) -> Result<String, String> {
        let call = Call::get("https://hub/a/b?c".to_owned(), Subject::default());
        let response = Response::builder().status(302).header("location", location);
        let from = call.url.parse().unwrap();
        match redirected(&call, &from, &response.body(()).unwrap()) {
            Ok(url) => Ok(url.to_string()),
            Err(Failure::Final(error)) => Err(error.to_string()),
            Err(passing) => panic!("{passing:?}"),
        }
    }

    #[test]
    fn a_redirect_may_be_relative_but_never_leads_from_https_to_http() {
        for (location, url) in [
            ("/x?next=http://y", "https://hub/x?next=http://y"),
            ("x", "https://hub/a/x"),
            ("//other/x", "https://other/x"),
            ("https://other/x", "https://other/x"),
        ] {
            assert_eq!(target(location).unwrap(), url);
        }
        let message = target("http://other/x?signature").unwrap_err();
        assert!(message.contains("from https to http"), "{message}");
        assert!(!message.contains("signature"), "{message}");
    }
}
