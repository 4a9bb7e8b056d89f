//! Addresses that a user gives: where the coordinator listens, and where other workers reach this one.
//!
//! In: the words as they were typed. Out: `HOST:PORT` or `HOST`, or why that cannot be one. Nothing is looked up.

use std::net::{IpAddr, Ipv6Addr};

use common::wire::DEFAULT_PORT;
use thiserror::Error;

/// The longest host name that there can be, in bytes (RFC 1035, 2.3.4).
pub const MAX_HOST_BYTES: usize = 253;

/// Why an address that a user gave cannot be one.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum AddressError {
    #[error(
        "{text:?} is not HOST or HOST:PORT ({reason}); a host is a name, an IPv4 address or an IPv6 address, as in \
         [::1]:{DEFAULT_PORT}"
    )]
    Coordinator { text: String, reason: &'static str },
    #[error(
        "--exchange-host takes a host without a port, not {text:?}: use --exchange-host {host} --exchange-port {port}"
    )]
    HostWithPort {
        text: String,
        host: String,
        port: u16,
    },
    #[error(
        "--exchange-host {text:?} cannot be where other workers reach this one ({reason}); name an address of this machine"
    )]
    ExchangeHost { text: String, reason: &'static str },
}

/// Parses where the coordinator listens, to `HOST:PORT`. Without a port it is the default one.
pub fn coordinator(text: &str) -> Result<String, AddressError> {
    let wrong = |reason| AddressError::Coordinator {
        text: text.to_owned(),
        reason,
    };
    if text.contains("://") {
        return Err(wrong("leave out what comes before the host"));
    }
    let (host, port) = split(text).map_err(wrong)?;
    Ok(joined(&host, port.unwrap_or(DEFAULT_PORT)))
}

/// Parses where other workers reach this one, to `HOST`.
pub fn exchange_host(text: &str) -> Result<String, AddressError> {
    let wrong = |reason| AddressError::ExchangeHost {
        text: text.to_owned(),
        reason,
    };
    let (host, port) = split(text).map_err(wrong)?;
    if let Some(port) = port {
        let text = text.to_owned();
        return Err(AddressError::HostWithPort { text, host, port });
    }
    match host.parse::<IpAddr>() {
        Ok(ip) if ip.is_unspecified() => Err(wrong("it stands for all addresses")),
        Ok(ip) if ip.is_multicast() => Err(wrong("it is an address of many")),
        _ => Ok(host),
    }
}

/// Joins a host and a port, with brackets where the host is an IPv6 address.
fn joined(host: &str, port: u16) -> String {
    match host.parse::<Ipv6Addr>() {
        Ok(ip) => format!("[{ip}]:{port}"),
        Err(_) => format!("{host}:{port}"),
    }
}

/// Splits an address into its host and its port, if it has one. An IPv6 address comes without its brackets.
fn split(text: &str) -> Result<(String, Option<u16>), &'static str> {
    if let Ok(ip) = text.parse::<Ipv6Addr>() {
        return Ok((ip.to_string(), None));
    }
    if let Some(rest) = text.strip_prefix('[') {
        let (ip, port) = rest.split_once(']').ok_or("a bracket is not closed")?;
        let ip: Ipv6Addr = ip
            .parse()
            .map_err(|_| "there is no IPv6 address in the brackets")?;
        let port = match port {
            "" => None,
            port => Some(number(
                port.strip_prefix(':').ok_or("the port is missing")?,
            )?),
        };
        return Ok((ip.to_string(), port));
    }
    let (host, port) = match text.split_once(':') {
        Some((host, port)) => (host, Some(number(port)?)),
        None => (text, None),
    };
    check_name(host)?;
    Ok((host.to_owned(), port))
}

fn number(port: &str) -> Result<u16, &'static str> {
    let port = port.parse::<u16>().ok().filter(|port| *port > 0);
    port.ok_or("a port is a number from 1 to 65535")
}

/// Checks what may be a host name or an IPv4 address. Underscores are in names that container engines make.
fn check_name(host: &str) -> Result<(), &'static str> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    match host {
        "" => Err("the host is missing"),
        host if host.len() > MAX_HOST_BYTES => Err("no name is so long"),
        host if !host.bytes().all(fits) => Err("no name has such characters"),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_coordinator_without_a_port_is_at_the_default_one() {
        for (text, address) in [
            ("machine1", "machine1:7077"),
            ("machine1:9", "machine1:9"),
            ("10.0.0.5", "10.0.0.5:7077"),
            ("::1", "[::1]:7077"),
            ("[::1]", "[::1]:7077"),
            ("[fd00::2]:9", "[fd00::2]:9"),
            ("job_coordinator.internal", "job_coordinator.internal:7077"),
        ] {
            assert_eq!(coordinator(text).as_deref(), Ok(address));
        }
    }

    #[test]
    fn what_is_no_address_is_refused_with_the_reason() {
        for (text, reason) in [
            ("", "host is missing"),
            (":7077", "host is missing"),
            ("host:port", "number from 1 to 65535"),
            ("host:0", "number from 1 to 65535"),
            ("host:70000", "number from 1 to 65535"),
            ("host:1:2", "number from 1 to 65535"),
            ("http://host:7077", "leave out what comes before"),
            ("host/path", "no name has such characters"),
            ("a host", "no name has such characters"),
            ("[::1", "not closed"),
            ("[host]:7077", "no IPv6 address"),
            ("[::1]7077", "port is missing"),
        ] {
            let error = coordinator(text).unwrap_err().to_string();
            assert!(error.contains(reason), "{text:?}: {error}");
        }
    }

    #[test]
    fn an_exchange_host_has_no_port_and_is_one_machine() {
        for (text, host) in [
            ("10.77.3.2", "10.77.3.2"),
            ("gpu-7.lan", "gpu-7.lan"),
            ("fd00::2", "fd00::2"),
            ("[fd00::2]", "fd00::2"),
        ] {
            assert_eq!(exchange_host(text).as_deref(), Ok(host));
        }
        let error = exchange_host("10.77.3.2:9000").unwrap_err().to_string();
        assert!(
            error.contains("--exchange-host 10.77.3.2 --exchange-port 9000"),
            "{error}"
        );
        for wrong in [
            "0.0.0.0",
            "::",
            "[::]:9",
            "224.0.0.1",
            "",
            "a b",
            "http://a",
        ] {
            assert!(exchange_host(wrong).is_err(), "{wrong}");
        }
    }
}
