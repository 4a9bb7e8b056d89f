//! The listening socket for workers, the token that they must show, and the address that workers of this process tell others.

#[cfg(feature = "single-node")]
use std::net::SocketAddr;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use common::files::token;
use thiserror::Error;

#[cfg(feature = "single-node")]
use crate::rpc::addresses::resolvable_host_name;

/// Why the coordinator cannot listen.
#[derive(Debug, Error)]
pub enum ListenError {
    #[error("cannot listen on {address}: {reason}")]
    Listen { address: String, reason: String },
    #[error("cannot listen on {address}: the port is in use; name another with --listen HOST:PORT")]
    PortInUse { address: String },
}

/// Why the token file cannot be used.
#[derive(Debug, Error)]
#[error("cannot read the token file {path}: {reason}")]
pub struct TokenError {
    path: PathBuf,
    reason: String,
}

/// Opens the listening socket for workers at `address` (`HOST:PORT`).
pub fn listen(address: &str) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address).map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => ListenError::PortInUse {
            address: address.to_owned(),
        },
        _ => ListenError::Listen {
            address: address.to_owned(),
            reason: error.to_string(),
        },
    })
}

/// The token that workers must bring, where one is asked for.
pub fn read_token(path: Option<&Path>) -> Result<Option<String>, TokenError> {
    let Some(path) = path else {
        return Ok(None);
    };
    let wrong = |reason: String| TokenError {
        path: path.to_owned(),
        reason,
    };
    match token::read_token(path) {
        Ok(Some(token)) => Ok(Some(token)),
        Ok(None) => Err(wrong("it is empty".to_owned())),
        Err(error) => Err(wrong(error.to_string())),
    }
}

/// The host at which workers on other machines reach the exchange of workers inside this process. None where only this machine
/// can join.
///
/// With all interfaces open it is the one that leads outside, because not every network knows its host names.
#[cfg(feature = "single-node")]
pub fn exchange_host(listener: SocketAddr) -> Option<String> {
    let ip = listener.ip();
    if ip.is_loopback() {
        return None;
    }
    if !ip.is_unspecified() {
        return Some(ip.to_string());
    }
    outward_address()
        .map(|ip| ip.to_string())
        // One that this machine does not know itself would keep even the workers inside this process apart.
        .or_else(resolvable_host_name)
}

/// Address of the interface that the default route takes. Nothing is sent.
#[cfg(feature = "single-node")]
fn outward_address() -> Option<std::net::IpAddr> {
    // The far ends are of the ranges that are kept for documentation.
    let routes = [("0.0.0.0:0", "192.0.2.1:9"), ("[::]:0", "[2001:db8::1]:9")];
    routes.into_iter().find_map(|(near, far)| {
        let socket = std::net::UdpSocket::bind(near).ok()?;
        socket.connect(far).ok()?;
        let ip = socket.local_addr().ok()?.ip();
        (!ip.is_unspecified() && !ip.is_loopback()).then_some(ip)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[cfg(feature = "single-node")]
    #[test]
    fn others_are_told_an_address_that_they_can_reach() {
        let host = |address: &str| exchange_host(address.parse().unwrap());
        assert_eq!(host("127.0.0.1:7077"), None);
        assert_eq!(host("192.168.1.5:7077").as_deref(), Some("192.168.1.5"));
        for everywhere in ["0.0.0.0:7077", "[::]:7077"] {
            if let Some(host) = host(everywhere) {
                let ip = host.parse::<std::net::IpAddr>();
                assert!(
                    !ip.is_ok_and(|ip| ip.is_loopback() || ip.is_unspecified()),
                    "{host}"
                );
            }
        }
    }
}
