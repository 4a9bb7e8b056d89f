//! The requests of the library `object_store`, carried by the hub's client: the same proxies, certificates and time limits.
//!
//! In: a signed request. Out: its answer, or a [`CallError`]: an answer that is no success is one, too, so that nothing is lost
//! of what the store says. Nothing is tried again here. Every answer but an object has a bound.
//!
//! A call blocks its thread: each runs on one of its own.

use std::fmt;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use common::hub::{AnswerBody, Hub};
use futures::future::{self, BoxFuture};
use http_body::{Body, Frame};
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
    HttpResponseBody, HttpService,
};
use object_store::{ClientConfigKey, ClientOptions, HeaderMap};

use super::error::{CallError, quoted};

/// Largest answer that is no object: a page of a list, a token.
const MAX_ANSWER_BYTES: u64 = 64 << 20;
const MAX_ERROR_BYTES: usize = 64 << 10;
const READ_BYTES: usize = 256 << 10;
/// Most time for a metadata service, which is next door or not there at all.
const METADATA_TIMEOUT: Duration = Duration::from_secs(2);

/// Marks a request whose answer is an object, of any size.
#[derive(Clone, Copy)]
pub struct AnswerIsObject;

/// Makes the library's connections.
#[derive(Clone)]
pub struct Connector {
    pub hub: Hub,
    /// Whether a metadata service was asked, as the library does where the environment has no credentials.
    pub asked_metadata: Arc<AtomicBool>,
}

/// The connections to one service.
struct Connection {
    hub: Hub,
    allows_http: bool,
    /// Where it leads to the metadata service of a cloud's machines, which tells their credentials: to be set when that is asked.
    asked_metadata: Option<Arc<AtomicBool>>,
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let value = |key| options.get_config_value(&key);
        let usual = ClientOptions::default().get_config_value(&ClientConfigKey::ConnectTimeout);
        Ok(HttpClient::new(Connection {
            hub: self.hub.clone(),
            allows_http: value(ClientConfigKey::AllowHttp).as_deref() == Some("true"),
            // The library asks metadata services alone in a hurry.
            asked_metadata: (value(ClientConfigKey::ConnectTimeout) != usual)
                .then(|| self.asked_metadata.clone()),
        }))
    }
}

impl HttpService for Connection {
    fn call<'a, 'b>(
        &'a self,
        request: HttpRequest,
    ) -> BoxFuture<'b, Result<HttpResponse, HttpError>>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(future::ready(self.exchange(request)))
    }
}

impl Connection {
    fn exchange(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let url = request.uri();
        let host = url.authority().map(|it| it.host().to_owned());
        let host = host.unwrap_or_default();
        if url.scheme_str() != Some("https") && !self.allows_http {
            return Err(wrapped(CallError::PlainHttp { host }));
        }
        let is_object = request.extensions().get::<AnswerIsObject>().is_some();
        let request =
            request.map(|body| body.as_bytes().map_or(Vec::new(), |bytes| bytes.to_vec()));
        let answer = match &self.asked_metadata {
            Some(asked) => {
                asked.store(true, Ordering::Relaxed);
                let answer = self.hub.send_directly(request, METADATA_TIMEOUT);
                answer.map_err(CallError::Metadata)
            }
            // What tells a container its credentials is no business of a proxy.
            None if is_link_local(&host) => {
                let answer = self.hub.send_directly(request, METADATA_TIMEOUT);
                answer.map_err(CallError::Metadata)
            }
            None => self.hub.send(request).map_err(|error| CallError::Send {
                host: host.clone(),
                error,
            }),
        };
        let answer = answer.map_err(wrapped)?;
        let (parts, body) = answer.into_parts();
        // What a metadata service refuses, the library may ask for in another way.
        if !parts.status.is_success() && self.asked_metadata.is_none() {
            let status = parts.status.as_u16();
            return Err(wrapped(refused(status, &parts.headers, body)));
        }
        let body = Incoming {
            body: Mutex::new(body),
            host,
            left: (!is_object).then_some(MAX_ANSWER_BYTES),
        };
        Ok(HttpResponse::from_parts(parts, HttpResponseBody::new(body)))
    }
}

/// Whether a host is an address that leads no further than this machine's own network, where clouds tell credentials.
fn is_link_local(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    match host.parse::<std::net::IpAddr>() {
        Ok(std::net::IpAddr::V4(address)) => address.is_link_local(),
        Ok(std::net::IpAddr::V6(address)) => address.segments()[0] == 0xfd00,
        Err(_) => false,
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connector")
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connection")
    }
}

/// The body of an answer, piece by piece.
struct Incoming {
    /// Only for the library, which wants to share it between threads.
    body: Mutex<AnswerBody>,
    host: String,
    /// How much of it may still come, where that has a bound.
    left: Option<u64>,
}

impl Incoming {
    fn next(&mut self) -> Result<Option<Bytes>, CallError> {
        let mut buffer = vec![0; READ_BYTES];
        let body = match self.body.get_mut() {
            Ok(body) => body,
            Err(poisoned) => poisoned.into_inner(),
        };
        let count = body.read(&mut buffer).map_err(|error| CallError::Send {
            host: self.host.clone(),
            error,
        })?;
        if count == 0 {
            return Ok(None);
        }
        if let Some(left) = &mut self.left {
            *left = left.checked_sub(count as u64).ok_or(CallError::TooLong {
                most: MAX_ANSWER_BYTES,
            })?;
        }
        buffer.truncate(count);
        Ok(Some(buffer.into()))
    }
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        let next = self.next().map_err(wrapped).transpose();
        Poll::Ready(next.map(|piece| piece.map(Frame::data)))
    }
}

/// An error that the library hands on and does not try again.
fn wrapped(error: CallError) -> HttpError {
    HttpError::new(HttpErrorKind::Unknown, error)
}

/// What an answer says that is no success.
fn refused(status: u16, headers: &HeaderMap, mut body: AnswerBody) -> CallError {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let mut bytes = Vec::new();
    let mut buffer = vec![0; MAX_ERROR_BYTES];
    // What cannot be read of it says no more than the status.
    while let Ok(count @ 1..) = body.read(&mut buffer) {
        bytes.extend_from_slice(&buffer[..count]);
        if bytes.len() >= MAX_ERROR_BYTES {
            break;
        }
    }
    let text = String::from_utf8_lossy(&bytes);
    let code = element(&text, "Code").or_else(|| header("x-ms-error-code").map(quoted));
    CallError::Refused {
        status,
        code,
        message: element(&text, "Message").map(first_sentence),
        after: header("retry-after")
            .and_then(|value| value.parse().ok())
            .map(Duration::from_secs),
        // It becomes a part of a host's name.
        region: header("x-amz-bucket-region")
            .filter(|region| {
                let is_fine = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
                !region.is_empty() && region.chars().all(is_fine)
            })
            .map(quoted),
    }
}

/// The text of an element of a store's XML.
fn element(text: &str, name: &str) -> Option<String> {
    let (_, rest) = text.split_once(&format!("<{name}>"))?;
    let (inner, _) = rest.split_once("</")?;
    let plain = [
        ("&lt;", "<"),
        ("&gt;", ">"),
        ("&quot;", "\""),
        ("&amp;", "&"),
    ];
    let inner = plain
        .iter()
        .fold(inner.to_owned(), |text, (from, to)| text.replace(from, to));
    Some(quoted(&inner)).filter(|text| !text.is_empty())
}

/// Azure puts the number and the time of the request behind it.
fn first_sentence(message: String) -> String {
    let end = message.find(" RequestId:").unwrap_or(message.len());
    quoted(&message[..end])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_a_store_says_is_read_from_its_xml_and_nothing_else_of_it() {
        let text = "<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code><Message>Access &quot;Denied&quot;.</Message><AWSAccessKeyId>AKIA</AWSAccessKeyId></Error>";
        assert_eq!(element(text, "Code").unwrap(), "AccessDenied");
        assert_eq!(element(text, "Message").unwrap(), "Access \"Denied\"");
        assert_eq!(element("<Code></Code>", "Code"), None);
        assert_eq!(element("<html>", "Code"), None);
        let azure = "Server failed to authenticate the request. RequestId:1-2 Time:2026";
        assert_eq!(
            first_sentence(azure.to_owned()),
            "Server failed to authenticate the request"
        );
    }
}
