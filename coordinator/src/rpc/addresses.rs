//! The addresses by which other machines reach this one, for people who start workers there.
//!
//! In: what the coordinator listens on. Out: every `HOST:PORT` that may work elsewhere, the likeliest first. A name is among
//! them only if this machine can resolve it, which may not take long.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::sync::mpsc::channel;
use std::time::Duration;

use common::host::host_name;

/// How long to wait for a name server.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(1);
/// Most addresses that are listed: a machine that runs containers has many interfaces.
const MAX_ADDRESSES: usize = 8;

/// The command that joins a coordinator which listens there, with every address that may work.
pub fn join_command(listening: SocketAddr, has_token: bool) -> String {
    let addresses = join_addresses(listening);
    let option = if has_token { " --token-file FILE" } else { "" };
    match addresses.as_slice() {
        // No network yet, or a system that does not tell.
        [] => format!("worker join HOST:{}{option}", listening.port()),
        [only] => format!("worker join {only}{option}"),
        [first, others @ ..] => format!("worker join {first}{option} (or {})", others.join(", ")),
    }
}

/// What to tell a user who waits for workers that do not come.
pub fn how_to_join(listening: SocketAddr, has_token: bool) -> String {
    let here = join_command(listening, has_token);
    if !listening.ip().is_loopback() {
        return format!(
            "no worker has joined yet: start some with {here}; or train in this process with --single-node"
        );
    }
    let everywhere = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), listening.port());
    let elsewhere = join_command(everywhere, has_token);
    format!(
        "no worker has joined yet: train in this process with --single-node; or start workers on this machine with {here}; or \
         listen with --listen {everywhere} and start them anywhere with {elsewhere}"
    )
}

/// Where workers join a coordinator that listens here, if it is known.
fn join_addresses(listening: SocketAddr) -> Vec<String> {
    if !listening.ip().is_unspecified() {
        return vec![listening.to_string()];
    }
    let usable = |ip: &IpAddr| is_reachable(ip) && (listening.is_ipv6() || ip.is_ipv4());
    let mut found: Vec<IpAddr> = interface_addresses().into_iter().filter(usable).collect();
    found.sort_by_key(IpAddr::is_ipv6);
    found.dedup();
    found.truncate(MAX_ADDRESSES);
    let port = listening.port();
    let addresses = found
        .into_iter()
        .map(|ip| SocketAddr::new(ip, port).to_string());
    let name = resolvable_host_name().map(|host| format!("{host}:{port}"));
    addresses.chain(name).collect()
}

/// Whether another machine may reach this address, as far as the address itself tells.
fn is_reachable(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_unspecified() && !ip.is_link_local(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unspecified() && !ip.is_unicast_link_local(),
    }
}

/// The name of this machine, if it leads to an address that others may reach.
pub fn resolvable_host_name() -> Option<String> {
    let host = host_name().filter(|host| !host.is_empty())?;
    let (answer, answered) = channel();
    let asked = host.clone();
    // The system's resolver cannot be interrupted: where it hangs, so does its thread, and nobody else.
    std::thread::spawn(move || {
        let found = (asked.as_str(), 0).to_socket_addrs();
        let reachable = found.is_ok_and(|mut found| found.any(|found| is_reachable(&found.ip())));
        let _ = answer.send(reachable);
    });
    let reachable = answered.recv_timeout(RESOLVE_TIMEOUT).unwrap_or(false);
    reachable.then_some(host)
}

/// Addresses of all interfaces that are up; empty where the system does not tell.
#[cfg(unix)]
fn interface_addresses() -> Vec<IpAddr> {
    let mut first = std::ptr::null_mut();
    // SAFETY: `getifaddrs` sets the pointer to a list of its own, or fails.
    if unsafe { libc::getifaddrs(&mut first) } != 0 {
        return Vec::new();
    }
    let mut found = Vec::new();
    let mut next = first;
    while !next.is_null() {
        // SAFETY: an entry of the list, which is not freed before the end of this function.
        let entry = unsafe { &*next };
        let is_up = entry.ifa_flags & libc::IFF_UP as libc::c_uint != 0;
        if is_up && !entry.ifa_addr.is_null() {
            // SAFETY: not null, and as long as its family says.
            found.extend(unsafe { ip_of(entry.ifa_addr) });
        }
        next = entry.ifa_next;
    }
    // SAFETY: the list that `getifaddrs` made, once.
    unsafe { libc::freeifaddrs(first) };
    found
}

/// # Safety
///
/// `address` points to a socket address that is as long as its family says.
#[cfg(unix)]
unsafe fn ip_of(address: *const libc::sockaddr) -> Option<IpAddr> {
    // SAFETY: every socket address begins with its family, and is what that says (see above).
    unsafe {
        match i32::from((*address).sa_family) {
            libc::AF_INET => {
                let address = address.cast::<libc::sockaddr_in>().read_unaligned();
                Some(IpAddr::from(address.sin_addr.s_addr.to_ne_bytes()))
            }
            libc::AF_INET6 => {
                let address = address.cast::<libc::sockaddr_in6>().read_unaligned();
                Some(IpAddr::from(address.sin6_addr.s6_addr))
            }
            _ => None,
        }
    }
}

#[cfg(not(unix))]
fn interface_addresses() -> Vec<IpAddr> {
    Vec::new()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn one_address_is_told_as_it_is() {
        let told = |address: &str| join_addresses(address.parse().unwrap());
        assert_eq!(told("192.0.2.5:7077"), ["192.0.2.5:7077"]);
        assert_eq!(told("[2001:db8::1]:7077"), ["[2001:db8::1]:7077"]);
    }

    #[test]
    fn of_all_interfaces_only_what_others_may_reach_is_told() {
        for everywhere in ["0.0.0.0:7077", "[::]:7077"] {
            let told = join_addresses(everywhere.parse().unwrap());
            for address in told {
                if let Ok(address) = address.parse::<SocketAddr>() {
                    assert!(is_reachable(&address.ip()), "{address}");
                }
                assert!(address.ends_with(":7077"), "{address}");
            }
        }
    }

    #[test]
    fn the_command_to_join_is_complete() {
        let address = "192.0.2.5:7077".parse().unwrap();
        let command = "worker join 192.0.2.5:7077 --token-file FILE";
        assert_eq!(join_command(address, true), command);
        assert!(how_to_join(address, true).contains(command));
        let told = how_to_join("127.0.0.1:7077".parse().unwrap(), false);
        for part in [
            "--single-node",
            "worker join 127.0.0.1:7077",
            "--listen 0.0.0.0:7077",
        ] {
            assert!(told.contains(part), "{part}: {told}");
        }
        assert_eq!(told.matches("worker join").count(), 2, "{told}");
    }

    #[cfg(unix)]
    #[test]
    fn the_loopback_is_among_the_interfaces() {
        let found = interface_addresses();
        assert!(found.iter().any(IpAddr::is_loopback), "{found:?}");
    }
}
