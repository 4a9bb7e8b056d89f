//! Requests to hosts that are no hub, by the hub's way out of this machine: its proxies, certificates and time limits.
//!
//! In: a request as another client made it. Out: the answer, whatever its status is, or why there is none. The token is not
//! sent, no redirect is followed, and nothing is tried twice.

use std::io::{self, Read};
use std::time::Duration;

use thiserror::Error;
use ureq::Body;
use ureq::http::{Method, Request, Response, Uri};

use super::Hub;
use super::failure::Trouble;
use crate::progress::{Cancelled, Progress};

/// Why a request has no answer, or no whole one.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SendError {
    /// The host is not the one that it should be, or speaks no TLS.
    #[error("{0}")]
    Untrusted(String),
    /// Nobody was reached who could answer.
    #[error("{0}")]
    Unreachable(String),
    #[error("the answer broke off: {0}")]
    Broken(String),
    #[error("the answer cannot be used: {0}")]
    Unusable(String),
}

impl SendError {
    /// Whether it may go well the next time.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Unreachable(_) | Self::Broken(_))
    }
}

/// The body of an answer, as it comes.
pub struct AnswerBody {
    reader: Box<dyn Read + Send>,
    answer_seconds: u64,
}

impl Hub {
    /// Sends a request to any host.
    pub fn send(&self, request: Request<Vec<u8>>) -> Result<Response<AnswerBody>, SendError> {
        let (url, limits) = (request.uri().clone(), self.environment());
        let (answer, read) = (limits.answer_timeout, limits.download_timeout);
        self.sent(request, &url, |request| match request {
            Sendable::Plain(request) => self.0.run_within(request, &url, answer, read),
            Sendable::WithBody(request) => self.0.run_within(request, &url, answer, read),
        })
    }

    /// Sends a request to a host of this network, by no proxy, and gives up after so long in all.
    pub fn send_directly(
        &self,
        request: Request<Vec<u8>>,
        most: Duration,
    ) -> Result<Response<AnswerBody>, SendError> {
        let url = request.uri().clone();
        self.sent(request, &url, |request| match request {
            Sendable::Plain(request) => self.0.run_directly(request, most),
            Sendable::WithBody(request) => self.0.run_directly(request, most),
        })
    }

    /// Waits, unless the work is cancelled meanwhile.
    pub fn pause(&self, time: Duration, progress: &Progress) -> Result<(), Cancelled> {
        self.0.pause(time, progress)
    }

    fn sent(
        &self,
        request: Request<Vec<u8>>,
        url: &Uri,
        run: impl FnOnce(Sendable) -> Result<Response<Body>, ureq::Error>,
    ) -> Result<Response<AnswerBody>, SendError> {
        let seconds = self.environment().answer_timeout.as_secs();
        if url.host().is_none_or(str::is_empty) {
            return Err(SendError::Unusable("its address names no host".to_owned()));
        }
        let is_plain = matches!(*request.method(), Method::GET | Method::HEAD);
        let sendable = match is_plain {
            true => Sendable::Plain(request.map(drop)),
            false => Sendable::WithBody(request),
        };
        let response = run(sendable).map_err(|error| SendError::of(error, seconds))?;
        Ok(response.map(|body| AnswerBody {
            reader: Box::new(body.into_reader()),
            answer_seconds: seconds,
        }))
    }
}

/// A request in one of the two forms that the client tells apart.
enum Sendable {
    Plain(Request<()>),
    WithBody(Request<Vec<u8>>),
}

impl AnswerBody {
    /// Reads what has come of the body, at least a byte; 0 at its end.
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<usize, SendError> {
        let failed = |error: io::Error| SendError::of(error.into(), self.answer_seconds);
        self.reader.read(buffer).map_err(failed)
    }
}

impl SendError {
    fn of(error: ureq::Error, answer_seconds: u64) -> Self {
        match Trouble::of(error, answer_seconds) {
            Trouble::Untrusted(reason) => Self::Untrusted(reason),
            Trouble::Unreachable(reason) => Self::Unreachable(reason),
            Trouble::Broken(reason) => Self::Broken(reason),
            Trouble::Unusable(reason) => Self::Unusable(reason),
            Trouble::Cancelled => Self::Broken(Cancelled.to_string()),
        }
    }
}
