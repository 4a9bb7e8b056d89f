//! Resolves names to addresses, within a bound.
//!
//! The system's own look-up has no deadline that a program could set: with a name server that never answers it takes the
//! better part of a minute. It runs on a thread of its own here, which is abandoned when the time is up.

use std::io::{Error, ErrorKind, Result};
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

/// Most look-ups that may be under way at a time, most of them abandoned.
const MAX_LOOKUPS: usize = 64;

static LOOKUPS: AtomicUsize = AtomicUsize::new(0);

/// Looks up the addresses of `HOST:PORT`.
///
/// # Errors
///
/// Where the name has none, or none was heard of within `limit`.
pub fn resolve(address: &str, limit: Duration) -> Result<Vec<SocketAddr>> {
    if let Ok(address) = address.parse() {
        return Ok(vec![address]);
    }
    let name = address.to_owned();
    resolve_with(move || Ok(name.to_socket_addrs()?.collect()), limit)
        .map_err(|error| Error::new(error.kind(), unresolved(address, &error)))
}

fn unresolved(address: &str, error: &Error) -> String {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    format!("the name {host} does not resolve: {error}")
}

/// Looks up the addresses of `HOST:PORT` as [`resolve`] does, without blocking the thread.
pub async fn resolve_async(address: String, limit: Duration) -> Result<Vec<SocketAddr>> {
    let resolved = tokio::task::spawn_blocking(move || resolve(&address, limit)).await;
    resolved.unwrap_or_else(|error| Err(Error::other(error)))
}

fn resolve_with(
    look_up: impl FnOnce() -> Result<Vec<SocketAddr>> + Send + 'static,
    limit: Duration,
) -> Result<Vec<SocketAddr>> {
    if LOOKUPS.fetch_add(1, Ordering::SeqCst) >= MAX_LOOKUPS {
        LOOKUPS.fetch_sub(1, Ordering::SeqCst);
        return Err(Error::other(
            "too many look-ups before it have no answer yet",
        ));
    }
    let (sender, answer) = mpsc::sync_channel(1);
    let thread = std::thread::Builder::new().name("resolve".to_owned());
    let spawned = thread.spawn(move || {
        let found = look_up();
        LOOKUPS.fetch_sub(1, Ordering::SeqCst);
        // Nobody waits any more where the time is up.
        let _ = sender.send(found);
    });
    if let Err(error) = spawned {
        LOOKUPS.fetch_sub(1, Ordering::SeqCst);
        return Err(error);
    }
    match answer.recv_timeout(limit) {
        Ok(Ok(found)) if found.is_empty() => {
            Err(Error::new(ErrorKind::NotFound, "it has no address"))
        }
        Ok(found) => found,
        Err(_) => Err(Error::new(ErrorKind::TimedOut, "no answer in time")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_name_server_that_never_answers_is_not_waited_for() {
        let (hold, held) = mpsc::channel::<()>();
        let hangs = move || {
            let _ = held.recv();
            Ok(Vec::new())
        };
        let error = resolve_with(hangs, Duration::from_millis(20)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        drop(hold);
    }

    #[test]
    fn addresses_are_not_looked_up_and_names_without_one_are_named() {
        let limit = Duration::ZERO;
        assert_eq!(
            resolve("[::1]:7", limit).unwrap(),
            ["[::1]:7".parse().unwrap()]
        );
        let none = resolve_with(|| Ok(Vec::new()), Duration::from_secs(60)).unwrap_err();
        let said = unresolved("nowhere.invalid:7", &none);
        assert_eq!(
            said,
            "the name nowhere.invalid does not resolve: it has no address"
        );
    }
}
