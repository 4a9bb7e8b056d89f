//! A token of the hub: it can be sent, but neither printed nor logged.

use std::fmt;

use super::HubError;

const MAX_TOKEN_BYTES: usize = 4096;

/// A token, and where it is from.
#[derive(Clone)]
pub(super) struct Token {
    secret: String,
    /// `HF_TOKEN`, or the path of a file.
    pub origin: String,
}

impl Token {
    /// Reads a token, without the white space around it; None where nothing is left.
    pub fn new(
        secret: &str,
        variable: &'static str,
        origin: String,
    ) -> Result<Option<Self>, HubError> {
        let secret = secret.trim();
        if secret.is_empty() {
            return Ok(None);
        }
        // Else it would end the header that it stands in.
        if secret.len() > MAX_TOKEN_BYTES || !secret.bytes().all(|byte| byte.is_ascii_graphic()) {
            let reason = format!("the token from {origin} has characters that no token has");
            return Err(HubError::InvalidVariable { variable, reason });
        }
        Ok(Some(Self {
            secret: secret.to_owned(),
            origin,
        }))
    }

    /// The value of the header that shows it.
    pub fn header(&self) -> String {
        format!("Bearer {}", self.secret)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token(from {})", self.origin)
    }
}
