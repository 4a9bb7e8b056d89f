//! Calls to the hub: redirects followed by hand, the token shown to the hub alone, failures that pass tried again.
//!
//! In: a call. Out: an answer of status 2xx, or an error that says what to do. Every wait, answer and number of tries has a
//! bound; a wait ends early when the work is cancelled.

use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use ureq::http::{HeaderMap, Method, Request, Response, Uri, header};
use ureq::tls::TlsConfig;
use ureq::{Agent, Body, SendBody};

use super::call::{Call, Payload, open_slice, origin, redirected, without_query};
use super::certificates;
use super::failure::{Failure, Subject};
use super::retries::Retries;
use super::{Environment, HubError, RepoId};
use crate::progress::{Cancelled, Progress};

const MAX_REDIRECTS: usize = 8;
const MAX_JSON_BYTES: u64 = 64 << 20;
/// Longest sleep between two looks at whether the work is cancelled.
const SLEEP_SLICE: Duration = Duration::from_millis(100);
/// Most time for one write of an upload to leave this machine.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// How a wait is done: tests pass one that returns at once.
pub(super) type Sleep = Arc<dyn Fn(Duration) + Send + Sync>;

/// An answer of status 2xx, or 416 to a call for a part.
pub(super) struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Body,
    /// What the hub itself says of the content, not a host that it sent us to.
    pub etag: Option<String>,
    pub url: String,
}

pub(super) struct Client {
    agent: Agent,
    environment: Environment,
    endpoint: Uri,
    sleep: Sleep,
}

impl Client {
    pub fn new(environment: Environment, sleep: Sleep) -> Result<Self, HubError> {
        let tls = TlsConfig::builder().root_certs(certificates::read(&environment)?);
        let config = Agent::config_builder()
            .tls_config(tls.build())
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None)
            .user_agent(concat!("muster/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(environment.answer_timeout))
            .timeout_per_write(Some(WRITE_TIMEOUT))
            .build();
        let endpoint = environment
            .endpoint
            .parse()
            .map_err(|_| HubError::InvalidVariable {
                variable: "HF_ENDPOINT",
                reason: "it is no web address".to_owned(),
            })?;
        Ok(Self {
            agent: config.new_agent(),
            environment,
            endpoint,
            sleep,
        })
    }

    pub fn environment(&self) -> &Environment {
        &self.environment
    }

    /// The address of a call on the hub.
    pub fn url(&self, path: &str) -> String {
        format!("{}/{path}", self.environment.endpoint)
    }

    /// The page of a repository.
    pub fn page(&self, repo: &RepoId) -> String {
        self.url(&repo.web_path())
    }

    /// Refuses where the environment forbids the network.
    pub fn check_online(&self, subject: &Subject, remedy: &str) -> Result<(), HubError> {
        match self.environment.offline {
            None => Ok(()),
            Some(variable) => Err(HubError::Offline {
                subject: subject.to_string(),
                variable,
                remedy: remedy.to_owned(),
            }),
        }
    }

    /// Sends a call until it succeeds or a failure stays, and reads the JSON of the answer.
    pub fn json<T: DeserializeOwned>(
        &self,
        call: &Call,
        progress: &Progress,
    ) -> Result<(T, HeaderMap), HubError> {
        let retries = Retries::of_call(call.is_dispensable);
        let (answer, bytes) = self.retried(retries, progress, || {
            let mut answer = self.exchange(call, progress)?;
            let bytes = self.read(call, &mut answer)?;
            Ok((answer, bytes))
        })?;
        let value = serde_json::from_slice(&bytes).map_err(|error| HubError::Malformed {
            subject: call.subject.to_string(),
            url: without_query(&answer.url),
            reason: error.to_string(),
        })?;
        Ok((value, answer.headers))
    }

    /// Sends a call until it succeeds or a failure stays; what the answer says is left.
    pub fn done(&self, call: &Call, progress: &Progress) -> Result<HeaderMap, HubError> {
        self.retried(Retries::of_call(call.is_dispensable), progress, || {
            let mut answer = self.exchange(call, progress)?;
            self.read(call, &mut answer)?;
            Ok(answer.headers)
        })
    }

    /// Repeats the attempt while its failures are of the kind that passes.
    pub fn retried<T>(
        &self,
        mut retries: Retries,
        progress: &Progress,
        mut attempt: impl FnMut() -> Result<T, Failure>,
    ) -> Result<T, HubError> {
        loop {
            progress.check()?;
            match attempt() {
                Ok(value) => return Ok(value),
                Err(failure) => self.wait(&mut retries, failure, progress)?,
            }
        }
    }

    /// Waits before the next try, or gives the failure back where there is none.
    pub fn wait(
        &self,
        retries: &mut Retries,
        failure: Failure,
        progress: &Progress,
    ) -> Result<(), HubError> {
        let (time, error) = retries.next(failure)?;
        let seconds = time.as_secs_f64();
        tracing::warn!("{error}; trying again in {seconds:.1} s");
        Ok(self.pause(time, progress)?)
    }

    /// Waits, unless the work is cancelled meanwhile.
    pub fn pause(&self, time: Duration, progress: &Progress) -> Result<(), Cancelled> {
        let mut left = time;
        while !left.is_zero() {
            progress.check()?;
            let slice = left.min(SLEEP_SLICE);
            (self.sleep)(slice);
            left -= slice;
        }
        Ok(())
    }

    /// Waits a moment for another process.
    pub fn sleep_a_moment(&self, progress: &Progress) -> Result<Duration, HubError> {
        progress.check()?;
        (self.sleep)(SLEEP_SLICE);
        Ok(SLEEP_SLICE)
    }

    /// Sends a call once, wherever the hub sends it to.
    pub fn exchange(&self, call: &Call, progress: &Progress) -> Result<Answer, Failure> {
        let mut url: Uri = call
            .url
            .parse()
            .map_err(|_| self.malformed(call, "it is no address"))?;
        let mut etag = None;
        for _ in 0..=MAX_REDIRECTS {
            let is_own = self.is_own(&url);
            let response = self.send(call, &url, is_own, progress)?;
            if is_own {
                etag = etag.or_else(|| content_etag(response.headers()));
            }
            let status = response.status().as_u16();
            if matches!(status, 301 | 302 | 303 | 307 | 308) {
                url = redirected(call, &url, &response)?;
                continue;
            }
            let (parts, body) = response.into_parts();
            let answer = Answer {
                status,
                headers: parts.headers,
                body,
                etag,
                url: url.to_string(),
            };
            return match status {
                200..=299 | 416 => Ok(answer),
                _ => Err(Failure::of_status(self, call, answer, is_own)),
            };
        }
        Err(Failure::Final(HubError::TooManyRedirects {
            subject: call.subject.to_string(),
            url: without_query(&call.url),
        }))
    }

    /// Reads an answer of bounded size.
    pub fn read(&self, call: &Call, answer: &mut Answer) -> Result<Vec<u8>, Failure> {
        let body = answer.body.with_config().limit(MAX_JSON_BYTES);
        body.read_to_vec().map_err(|error| match error {
            ureq::Error::BodyExceedsLimit(limit) => {
                self.malformed(call, &format!("it has more than {limit} bytes"))
            }
            error => Failure::of_transport(self, call, &answer.url, error),
        })
    }

    pub fn has_token(&self) -> bool {
        self.environment.token.is_some()
    }

    fn malformed(&self, call: &Call, reason: &str) -> Failure {
        Failure::Final(HubError::Malformed {
            subject: call.subject.to_string(),
            url: without_query(&call.url),
            reason: reason.to_owned(),
        })
    }

    /// Whether the address is the hub's own, which alone sees the token.
    fn is_own(&self, url: &Uri) -> bool {
        origin(url) == origin(&self.endpoint)
    }

    fn send(
        &self,
        call: &Call,
        url: &Uri,
        is_own: bool,
        progress: &Progress,
    ) -> Result<Response<Body>, Failure> {
        let mut request = Request::builder()
            .method(call.method.clone())
            .uri(url.clone());
        let is_secret = |name: &str| name.eq_ignore_ascii_case("authorization");
        // What a storage asks to be shown is for it alone.
        let is_first = call
            .url
            .parse()
            .is_ok_and(|first| origin(&first) == origin(url));
        for (name, value) in &call.headers {
            if is_first || !is_secret(name) {
                request = request.header(name, value);
            }
        }
        let has_own = call.headers.iter().any(|(name, _)| is_secret(name));
        if let Some(token) = self
            .environment
            .token
            .as_ref()
            .filter(|_| is_own && !has_own)
        {
            request = request.header(header::AUTHORIZATION, token.header());
        }
        let fail = |error| Failure::of_transport(self, call, &url.to_string(), error);
        match &call.payload {
            Payload::Nothing if call.method == Method::GET => {
                let request = request.body(()).map_err(|error| fail(error.into()))?;
                self.run(call, url, request).map_err(fail)
            }
            Payload::Nothing => {
                let request = request.body(&[][..]).map_err(|error| fail(error.into()))?;
                self.run(call, url, request).map_err(fail)
            }
            Payload::Bytes(bytes) => {
                let request = request.body(*bytes).map_err(|error| fail(error.into()))?;
                self.run(call, url, request).map_err(fail)
            }
            Payload::Slice {
                path,
                offset,
                size,
                counted,
            } => {
                let mut reader = open_slice(path, *offset, *size, counted, progress)?;
                let request = request
                    .header(header::CONTENT_LENGTH, *size)
                    .body(SendBody::from_reader(&mut reader))
                    .map_err(|error| fail(error.into()))?;
                self.run(call, url, request).map_err(fail)
            }
        }
    }

    fn run<S: ureq::AsSendBody>(
        &self,
        call: &Call,
        url: &Uri,
        request: Request<S>,
    ) -> Result<Response<Body>, ureq::Error> {
        let usual = &self.environment;
        let answer_timeout = call.answer_timeout.unwrap_or(usual.answer_timeout);
        let read_timeout = call.answer_timeout.unwrap_or(usual.download_timeout);
        self.run_within(request, url, answer_timeout, read_timeout)
    }

    /// Sends a request by the proxy of its host. The times are the most until the answer begins, and between two pieces of it.
    pub fn run_within<S: ureq::AsSendBody>(
        &self,
        request: Request<S>,
        url: &Uri,
        answer_timeout: Duration,
        read_timeout: Duration,
    ) -> Result<Response<Body>, ureq::Error> {
        let request = self
            .agent
            .configure_request(request)
            .proxy(self.environment.proxies.of(url))
            .timeout_recv_response(Some(answer_timeout))
            .timeout_per_read(Some(read_timeout.max(answer_timeout)))
            .build();
        self.agent.run(request)
    }

    /// Sends a request without any proxy, which is given up after so long in all.
    pub fn run_directly<S: ureq::AsSendBody>(
        &self,
        request: Request<S>,
        most: Duration,
    ) -> Result<Response<Body>, ureq::Error> {
        let request = self.agent.configure_request(request);
        let request = request.proxy(None).timeout_global(Some(most));
        self.agent.run(request.build())
    }
}

/// The digest that the hub gives the content, without quotes.
fn content_etag(headers: &HeaderMap) -> Option<String> {
    let value = headers.get("x-linked-etag").or(headers.get(header::ETAG))?;
    let value = value.to_str().ok()?;
    Some(value.trim_start_matches("W/").trim_matches('"').to_owned())
}
