//! What can go wrong with an object store: one line each, after the address, with what to do next. No message holds a key.

use std::time::Duration;

use common::hub::{HubError, SendError};
use common::progress::Cancelled;
use thiserror::Error;

use super::address::Service;

/// Most characters of a text of the server's in a message.
const MAX_TEXT_CHARACTERS: usize = 300;

/// Why one request brought nothing.
#[derive(Clone, Debug, Error)]
pub enum CallError {
    #[error("{host}: {error}")]
    Send { host: String, error: SendError },
    /// The metadata service of a cloud's machines, which tells their credentials: not tried again, since it is next door or not
    /// there at all.
    #[error("the metadata service of this machine: {0}")]
    Metadata(SendError),
    #[error("{}", refusal(*status, code.as_deref(), message.as_deref()))]
    Refused {
        status: u16,
        /// The store's word for what is wrong.
        code: Option<String>,
        message: Option<String>,
        /// The time that it asks to wait.
        after: Option<Duration>,
        /// Where it says that the bucket is.
        region: Option<String>,
    },
    #[error("{host} is asked by http://, which is not allowed")]
    PlainHttp { host: String },
    #[error("an answer has more than {most} bytes")]
    TooLong { most: u64 },
}

impl CallError {
    /// What a store answers that is asked for a version which it has not any more.
    pub fn changed() -> Self {
        Self::Refused {
            status: 412,
            code: None,
            message: None,
            after: None,
            region: None,
        }
    }

    /// The innermost reason of an error of the library, where it is one of ours.
    pub fn of<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(found) = error.downcast_ref() {
                return Some(found);
            }
            next = error.source();
        }
        None
    }

    /// Whether it may go well the next time, and after how long.
    pub fn passes_after(&self) -> Option<Option<Duration>> {
        match self {
            Self::Send { error, .. } => error.is_passing().then_some(None),
            Self::Refused { status, after, .. } => {
                matches!(status, 408 | 429 | 500 | 502..=599).then_some(*after)
            }
            _ => None,
        }
    }
}

/// Why an object or a list of objects cannot be had. The address stands before it.
#[derive(Debug, Error)]
pub enum StoreError {
    #[error("there is no such object and no folder of this name: check bucket, folders and case")]
    NoObject,
    #[error("there are no objects in this folder: check bucket, folders and case")]
    EmptyFolder,
    #[error(
        "there is no such bucket{told}: check its name, and {endpoint} for a store of your own"
    )]
    NoBucket {
        told: String,
        endpoint: &'static str,
    },
    #[error(
        "no credentials were found, and it is not public or not there{told}: set {variables}, and check the name"
    )]
    NoCredentials {
        told: String,
        variables: &'static str,
    },
    #[error("access is denied{told}: check what the credentials may read, and {variables}")]
    Denied {
        told: String,
        variables: &'static str,
    },
    #[error("the credentials cannot be had: {reason}: check {variables}")]
    Credentials {
        reason: String,
        variables: &'static str,
    },
    #[error("{0}")]
    Settings(String),
    #[error("{host} cannot be reached: {reason}: check the network, {variables}")]
    Unreachable {
        host: String,
        reason: String,
        variables: String,
    },
    #[error("the answer of {host} broke off: {reason}: try again")]
    Broken { host: String, reason: String },
    #[error("the store answered {told}: {remedy}")]
    Status { told: String, remedy: &'static str },
    #[error("the bucket is in the region {region}: set AWS_REGION={region}")]
    OtherRegion { region: String },
    #[error("it changes while it is read: try again when nobody writes to it")]
    Changing,
    #[error("it has {found} bytes, and the store lists {expected}: try again")]
    Length { expected: u64, found: u64 },
    #[error("more than {most} objects are in this folder: name a folder in it, or the files")]
    TooMany { most: usize },
    #[error("the answer of the store cannot be used: {0}")]
    Unusable(String),
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}

impl StoreError {
    /// What an error of the library means to the user.
    pub fn of(error: &object_store::Error, service: Service, is_anonymous: bool) -> Self {
        match CallError::of(error) {
            Some(reason) => Self::of_call(reason.clone(), service, is_anonymous),
            None => Self::Unusable(innermost(error)),
        }
    }

    fn of_call(error: CallError, service: Service, is_anonymous: bool) -> Self {
        let variables = credential_variables(service);
        let endpoint = endpoint_variable(service);
        let told = error.to_string();
        match error {
            CallError::Send { host, error } => match error {
                SendError::Unreachable(reason) | SendError::Untrusted(reason) => {
                    Self::Unreachable {
                        host,
                        reason,
                        variables: format!("{endpoint}, HTTPS_PROXY and SSL_CERT_FILE"),
                    }
                }
                SendError::Broken(reason) => Self::Broken { host, reason },
                SendError::Unusable(reason) => Self::Unusable(reason),
            },
            CallError::Refused { status, code, .. } => match (status, code.as_deref()) {
                (404, Some("NoSuchBucket" | "ContainerNotFound")) => Self::NoBucket {
                    told: format!(" ({told})"),
                    endpoint,
                },
                (404, _) => Self::NoObject,
                (412, _) => Self::Changing,
                (401 | 403, _) if is_anonymous => Self::NoCredentials {
                    told: format!(" ({told})"),
                    variables,
                },
                (401 | 403, _) => Self::Denied {
                    told: format!(" ({told})"),
                    variables,
                },
                (408 | 429 | 500.., _) => Self::Status {
                    told,
                    remedy: "it is out of order for the moment, try again later",
                },
                _ => Self::Status {
                    told,
                    remedy: "check the address, and the variables of this store in the environment",
                },
            },
            CallError::PlainHttp { host } => Self::Settings(format!(
                "{host} is named with http://, by which anyone on the way can read along: name it with https://, or set {}=true",
                allow_http_variable(service)
            )),
            CallError::TooLong { .. } | CallError::Metadata(_) => Self::Unusable(told),
        }
    }

    /// Whether nobody was reached, so that what is in the cache may serve.
    pub fn is_unreachable(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
    }
}

/// The variables in which credentials are looked for first.
pub fn credential_variables(service: Service) -> &'static str {
    match service {
        Service::Amazon => "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        Service::Google => "GOOGLE_APPLICATION_CREDENTIALS",
        Service::Azure => {
            "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN"
        }
    }
}

fn endpoint_variable(service: Service) -> &'static str {
    match service {
        Service::Amazon => "AWS_ENDPOINT_URL",
        Service::Google => "GOOGLE_BASE_URL",
        Service::Azure => "AZURE_STORAGE_ENDPOINT",
    }
}

fn allow_http_variable(service: Service) -> &'static str {
    match service {
        Service::Amazon => "AWS_ALLOW_HTTP",
        Service::Google => "GOOGLE_ALLOW_HTTP",
        Service::Azure => "AZURE_ALLOW_HTTP",
    }
}

fn refusal(status: u16, code: Option<&str>, message: Option<&str>) -> String {
    match (code, message) {
        (Some(code), Some(message)) => format!("{status} {code}: {message}"),
        (Some(one), None) | (None, Some(one)) => format!("{status} {one}"),
        (None, None) => status.to_string(),
    }
}

/// The last reason of a chain of errors: those above it may repeat addresses with signatures in them.
pub fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut last = error;
    while let Some(next) = last.source() {
        last = next;
    }
    quoted(&last.to_string())
}

/// A text from elsewhere, in one bounded line and without what a terminal would obey.
pub fn quoted(text: &str) -> String {
    let line = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    let line: String = line.take(MAX_TEXT_CHARACTERS).collect();
    line.trim().trim_end_matches('.').to_owned()
}
