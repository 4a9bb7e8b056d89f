//! What an answer that is no success means, and whether it passes.
//!
//! In: a status with its headers, or an error of the transport. Out: the error, and how long to wait before the next try.

use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use ureq::http::HeaderMap;

use super::call::{Call, without_query};
use super::client::{Answer, Client};
use super::error::quoted;
use super::{HubError, RepoId};
use crate::progress::Cancelled;

const MAX_ERROR_BYTES: u64 = 64 << 10;

/// Whom and what a call is about, for messages.
#[derive(Clone, Debug, Default)]
pub(super) struct Subject {
    pub repo: Option<RepoId>,
    pub revision: Option<String>,
    pub path: Option<String>,
}

impl Subject {
    pub fn of(repo: &RepoId) -> Self {
        Self {
            repo: Some(repo.clone()),
            ..Self::default()
        }
    }

    pub fn revision(mut self, revision: &str) -> Self {
        self.revision = Some(revision.to_owned());
        self
    }

    pub fn path(mut self, path: &str) -> Self {
        self.path = Some(path.to_owned());
        self
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.repo, &self.path) {
            (Some(repo), Some(path)) => write!(f, "{repo}: {path}"),
            (Some(repo), None) => write!(f, "{repo}"),
            // A file at an address that is on no hub.
            (None, Some(address)) => f.write_str(address),
            (None, None) => f.write_str("the hub"),
        }
    }
}

/// Why one try did not succeed.
#[derive(Debug)]
pub(super) enum Failure {
    /// It would not succeed the next time either.
    Final(HubError),
    /// It may pass, after the time that the hub names.
    Passing {
        error: Box<HubError>,
        after: Option<Duration>,
    },
}

impl From<HubError> for Failure {
    fn from(error: HubError) -> Self {
        Self::Final(error)
    }
}

impl From<Cancelled> for Failure {
    fn from(cancelled: Cancelled) -> Self {
        Self::Final(cancelled.into())
    }
}

#[derive(Deserialize)]
struct ErrorBody {
    error: String,
}

impl Failure {
    /// What a status that is no success means.
    pub fn of_status(client: &Client, call: &Call, mut answer: Answer, is_own: bool) -> Self {
        let text = |name| header_text(&answer.headers, name);
        let (code, told) = (text("x-error-code"), text("x-error-message"));
        let told = told.or_else(|| {
            let body = answer.body.with_config().limit(MAX_ERROR_BYTES);
            let body: ErrorBody = serde_json::from_slice(&body.read_to_vec().ok()?).ok()?;
            Some(quoted(&body.error))
        });
        let subject = call.subject.to_string();
        let message = told
            .as_ref()
            .map_or(String::new(), |told| format!(" ({told})"));
        match answer.status {
            429 => {
                let after = retry_after(&answer.headers);
                let seconds = after.map_or(0, |after| after.as_secs());
                return Self::Passing {
                    error: Box::new(HubError::RateLimited { subject, seconds }),
                    after,
                };
            }
            status @ (408 | 500 | 502..=599) => {
                let remedy = "it is out of order for the moment, try again later";
                return Self::Passing {
                    error: Box::new(HubError::Status {
                        subject,
                        status,
                        message,
                        remedy,
                    }),
                    after: retry_after(&answer.headers),
                };
            }
            _ => {}
        }
        let is_elsewhere = call.subject.repo.is_none() && call.subject.path.is_some();
        if is_elsewhere && !is_own {
            return Self::Final(HubError::Status {
                subject,
                status: answer.status,
                message,
                remedy: "check the address, or download the file and name it",
            });
        }
        let refused = is_own.then(|| refusal(client, call, answer.status, code, told));
        Self::Final(refused.flatten().unwrap_or(HubError::Status {
            subject: format!("{subject} at {}", without_query(&answer.url)),
            status: answer.status,
            message,
            remedy: "check what is asked for, and HF_ENDPOINT",
        }))
    }

    /// What an error below the answer means.
    pub fn of_transport(client: &Client, call: &Call, url: &str, error: ureq::Error) -> Self {
        let (subject, host) = (call.subject.to_string(), host(url));
        let proxy = match url.starts_with("https") {
            true => "HTTPS_PROXY",
            false => "HTTP_PROXY",
        };
        let seconds = client.environment().answer_timeout.as_secs();
        let unreachable = |subject, reason, also| HubError::Unreachable {
            subject,
            host: host.clone(),
            reason,
            variables: format!("HF_ENDPOINT, {proxy} and NO_PROXY{also}"),
        };
        let error = match Trouble::of(error, seconds) {
            Trouble::Cancelled => return Self::Final(Cancelled.into()),
            Trouble::Untrusted(reason) => return Self::Final(unreachable(subject, reason, TRUST)),
            Trouble::Unusable(reason) => {
                return Self::Final(HubError::Malformed {
                    subject,
                    url: without_query(url),
                    reason,
                });
            }
            Trouble::Unreachable(reason) => unreachable(subject, reason, ""),
            Trouble::Broken(reason) => HubError::Broken {
                subject,
                host,
                reason,
            },
        };
        Self::Passing {
            error: Box::new(error),
            after: None,
        }
    }
}

/// The kinds of errors below the answer, with their reasons.
#[derive(Debug)]
pub(super) enum Trouble {
    Cancelled,
    /// The host is not the one that it should be, or speaks no TLS.
    Untrusted(String),
    /// Nobody was reached who could answer.
    Unreachable(String),
    /// The answer broke off.
    Broken(String),
    /// The answer is none.
    Unusable(String),
}

impl Trouble {
    /// `seconds`: most time until an answer begins.
    pub fn of(error: ureq::Error, seconds: u64) -> Self {
        let text = quoted(&error.to_string());
        match error {
            ureq::Error::Io(error) => Self::of_system(&error),
            ureq::Error::Timeout(ureq::Timeout::PerRead | ureq::Timeout::PerWrite) => {
                Self::Broken("nothing moved for too long (HF_HUB_DOWNLOAD_TIMEOUT)".to_owned())
            }
            ureq::Error::Timeout(_) => Self::Unreachable(format!(
                "no answer within {seconds} s (HF_HUB_ETAG_TIMEOUT)"
            )),
            ureq::Error::HostNotFound => {
                Self::Unreachable("no host of this name is found".to_owned())
            }
            ureq::Error::ConnectionFailed | ureq::Error::ConnectProxyFailed(_) => {
                Self::Unreachable(text)
            }
            ureq::Error::Tls(_) | ureq::Error::Rustls(_) | ureq::Error::Pem(_) => {
                Self::Untrusted(text)
            }
            ureq::Error::Protocol(_) | ureq::Error::BodyStalled => Self::Broken(text),
            _ => Self::Unusable(text),
        }
    }

    fn of_system(error: &std::io::Error) -> Self {
        use std::io::ErrorKind::*;
        let inner = error.get_ref();
        if inner.is_some_and(|inner| inner.is::<Cancelled>()) {
            return Self::Cancelled;
        }
        let text = quoted(&error.to_string());
        match error.kind() {
            // What a certificate that is not trusted comes as.
            InvalidData => Self::Untrusted(text),
            UnexpectedEof | ConnectionReset | ConnectionAborted | BrokenPipe => Self::Broken(text),
            // Refused, no route, or a name that is not found, which has no kind of its own.
            _ => Self::Unreachable(text),
        }
    }
}

const TRUST: &str = ", and SSL_CERT_FILE where this network has certificates of its own";

/// What a refusal by the hub itself means, where it is one of the known ones.
fn refusal(
    client: &Client,
    call: &Call,
    status: u16,
    code: Option<String>,
    told: Option<String>,
) -> Option<HubError> {
    let message = told
        .as_ref()
        .map_or(String::new(), |told| format!(" ({told})"));
    let subject = call.subject.to_string();
    let repo = call.subject.repo.clone();
    let revision = call.subject.revision.clone();
    let not_found = |repo: RepoId| HubError::RepoNotFound {
        kind: match repo.kind() {
            super::RepoKind::Model => "model",
            super::RepoKind::Dataset => "data set",
        },
        url: client.page(&repo),
        repo,
    };
    Some(match (status, code.as_deref(), repo) {
        (401 | 403, Some("GatedRepo"), Some(repo)) => HubError::Gated {
            url: client.page(&repo),
            repo,
            account: match client.has_token() {
                true => "with the account of the token",
                false => "then log in with `hf auth login` or set HF_TOKEN",
            },
            message,
        },
        (401, Some("RepoNotFound"), Some(repo)) if client.has_token() => not_found(repo),
        (401, _, _) => match &client.environment().token {
            Some(token) => HubError::TokenRefused {
                origin: token.origin.clone(),
                endpoint: client.environment().endpoint.clone(),
            },
            None => HubError::NoToken {
                subject,
                withheld: match client.environment().is_token_withheld {
                    true => " (there is a token, but HF_HUB_DISABLE_IMPLICIT_TOKEN is set)",
                    false => "",
                },
            },
        },
        (403, _, _) => HubError::Forbidden { subject, message },
        (404, Some("RevisionNotFound"), Some(repo)) => HubError::RevisionNotFound {
            revision: revision.unwrap_or_default(),
            url: client.page(&repo),
            repo,
        },
        (404, Some("EntryNotFound") | None, Some(repo)) if call.subject.path.is_some() => {
            HubError::EntryNotFound {
                path: call.subject.path.clone().unwrap_or_default(),
                revision: revision.unwrap_or_default(),
                repo,
            }
        }
        (404, _, Some(repo)) => not_found(repo),
        _ => return None,
    })
}

fn header_text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers
        .get(name)
        .and_then(|value| value.to_str().ok())
        .map(quoted)
}

/// The time that the hub asks to wait: `Retry-After` in seconds, or the end of the window that `RateLimit` names.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = match header_text(headers, "retry-after") {
        Some(value) => value.parse().ok(),
        None => header_text(headers, "ratelimit")?
            .split(';')
            .find_map(|part| part.trim().strip_prefix("t=")?.parse().ok()),
    };
    seconds.map(Duration::from_secs)
}

fn host(url: &str) -> String {
    let uri = url.parse::<ureq::http::Uri>().ok();
    let authority = uri.as_ref().and_then(|uri| uri.authority());
    authority.map_or_else(|| "the hub".to_owned(), ToString::to_string)
}
