//! Tries whether other workers' exchanges can be reached, before an exchange depends on it.
//!
//! In: addresses. Out: those that were not reached, each with the reason. A peer answers with its number, so that another
//! program, or another worker, at the same address is not taken for it.

use std::io::{ErrorKind, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::greeting::ProbeHello;
use super::listener::read_greeting;
use super::{PeerAddress, link};

/// Peers tried at a time, each on a thread of its own.
pub const MAX_PEERS: usize = 64;
/// How long one peer may take, with all that is tried again: it may be about to learn its own number.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
const PROBE_RETRY: Duration = Duration::from_millis(200);

/// A worker to be tried: its number and where it should be.
#[derive(Clone, Debug)]
pub struct Target {
    pub worker: u64,
    pub peer: PeerAddress,
}

/// Tries all targets at once. Returns those that were not reached, with the reason; takes no longer than a few seconds.
pub fn probe(run_id: [u8; 32], from: u64, targets: &[Target]) -> Vec<(u64, String)> {
    probe_within(run_id, from, targets, PROBE_TIMEOUT)
}

fn probe_within(
    run_id: [u8; 32],
    from: u64,
    targets: &[Target],
    limit: Duration,
) -> Vec<(u64, String)> {
    let reason = |target: &Target| {
        let hello = ProbeHello {
            run_id,
            from,
            to: target.worker,
        };
        reach(&target.peer.address, &hello, limit).err()
    };
    std::thread::scope(|scope| {
        let trying: Vec<_> = targets
            .iter()
            .take(MAX_PEERS)
            .map(|target| (target.worker, scope.spawn(move || reason(target))))
            .collect();
        let failed =
            |(worker, thread): (u64, std::thread::ScopedJoinHandle<'_, Option<String>>)| {
                let reason = thread.join().unwrap_or_default()?;
                Some((worker, reason))
            };
        trying.into_iter().filter_map(failed).collect()
    })
}

fn reach(address: &str, hello: &ProbeHello, limit: Duration) -> Result<(), String> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let reason = match link::connect(address, left) {
            Ok(stream) => match greet(&stream, hello, deadline) {
                Ok(()) => return Ok(()),
                Err(reason) => reason,
            },
            Err(error) => named(&error),
        };
        if Instant::now() + PROBE_RETRY >= deadline {
            return Err(reason);
        }
        std::thread::sleep(PROBE_RETRY);
    }
}

fn greet(mut stream: &TcpStream, hello: &ProbeHello, deadline: Instant) -> Result<(), String> {
    let silent = |error: std::io::Error| match error.kind() {
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset => {
            "something answers there that is no worker of this run".to_owned()
        }
        ErrorKind::TimedOut | ErrorKind::WouldBlock => {
            "something accepts connections there and says nothing".to_owned()
        }
        _ => named(&error),
    };
    stream.write_all(&hello.encode()).map_err(silent)?;
    let answer = read_greeting(stream, deadline).map_err(silent)?;
    match ProbeHello::decode(&answer) {
        Some(answer) if answer == hello.answered_by(hello.to) => Ok(()),
        Some(_) => Err("another worker answers there".to_owned()),
        None => Err("something answers there that is no worker of this run".to_owned()),
    }
}

/// Describes an error without the system's number for it.
fn named(error: &std::io::Error) -> String {
    match error.raw_os_error() {
        Some(_) => error.kind().to_string(),
        None => error.to_string(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, TcpListener};

    use super::super::Collective;
    use super::*;

    const RUN: [u8; 32] = [7; 32];
    const HOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
    const SOON: Duration = Duration::from_millis(300);

    fn target(worker: u64, port: u16) -> Target {
        let peer = PeerAddress {
            name: format!("w{worker}"),
            address: format!("{HOST}:{port}"),
        };
        Target { worker, peer }
    }

    #[test]
    fn a_worker_is_reached_where_it_is_and_no_other_is_taken_for_it() {
        let collective = Collective::bind(HOST).unwrap();
        collective.identify(RUN, 2);
        let try_once = |run, worker| {
            let targets = [target(worker, collective.port())];
            probe_within(run, 1, &targets, SOON)
        };
        assert_eq!(try_once(RUN, 2), []);
        for (run, worker) in [(RUN, 3), ([8; 32], 2)] {
            let failed = try_once(run, worker);
            assert_eq!(failed[0].0, worker);
            assert!(failed[0].1.contains("another worker"), "{failed:?}");
        }
    }

    #[test]
    fn every_target_that_is_not_reached_comes_with_a_reason() {
        let vacant = TcpListener::bind((HOST, 0)).unwrap();
        let port = vacant.local_addr().unwrap().port();
        drop(vacant);
        let silent = TcpListener::bind((HOST, 0)).unwrap();
        let silent_port = silent.local_addr().unwrap().port();
        let targets = [target(2, port), target(3, silent_port)];
        let failed = probe_within(RUN, 1, &targets, SOON);
        assert_eq!(failed[0], (2, "connection refused".to_owned()));
        assert_eq!(failed[1].0, 3);
        assert!(failed[1].1.contains("says nothing"), "{failed:?}");
    }
}
