//! The certificates that a host is trusted by: built in, or those of a file that the environment names.

use std::fs::File;
use std::io::Read;

use ureq::tls::{PemItem, RootCerts, parse_pem};

use super::{Environment, HubError};

const MAX_CERTIFICATE_BYTES: u64 = 16 << 20;

/// Reads the certificates that the environment names.
pub(super) fn read(environment: &Environment) -> Result<RootCerts, HubError> {
    let Some(path) = &environment.certificates else {
        return Ok(RootCerts::WebPki);
    };
    let file = File::open(path).map_err(HubError::io("read the certificates in", path))?;
    let mut bytes = Vec::new();
    file.take(MAX_CERTIFICATE_BYTES)
        .read_to_end(&mut bytes)
        .map_err(HubError::io("read the certificates in", path))?;
    let certificates: Vec<_> = parse_pem(&bytes)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    match certificates.is_empty() {
        false => Ok(RootCerts::new_with_certs(&certificates)),
        true => Err(HubError::InvalidVariable {
            variable: "SSL_CERT_FILE",
            reason: format!("{} holds no certificates", path.display()),
        }),
    }
}
