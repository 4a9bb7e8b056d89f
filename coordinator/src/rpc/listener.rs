//! Where a run is entered: the port for workers, the address that those of this process tell others, the token, and the lock of the
//! output folder. Nothing here knows of training.

use std::fs::File;
#[cfg(feature = "single-node")]
use std::net::SocketAddr;
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use common::files::FileError;
use common::files::lock::{self, Attempt};

use crate::cli::start::StartError;
use crate::prepare::WORK_FOLDER;
#[cfg(feature = "single-node")]
use crate::rpc::addresses::resolvable_host_name;

/// A coordinator that is told to stop saves a checkpoint first; its replacement may be there already.
pub const LOCK_PATIENCE: Duration = Duration::from_secs(10);
const LOCK_RETRY: Duration = Duration::from_millis(200);

pub fn listen(address: &str) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => StartError::PortInUse {
            address: address.to_owned(),
        },
        _ => StartError::Listen {
            address: address.to_owned(),
            reason: error.to_string(),
        },
    })
}

pub fn read_token(path: Option<&Path>) -> Result<Option<String>, StartError> {
    let Some(path) = path else {
        return Ok(None);
    };
    let wrong = |reason: String| StartError::Token {
        path: path.to_owned(),
        reason,
    };
    let token = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    match token.trim() {
        "" => Err(wrong("it is empty".to_owned())),
        token => Ok(Some(token.to_owned())),
    }
}

/// An output folder that only this process writes into. Held until the process ends, however it ends.
pub struct Lock {
    _file: File,
    /// Another held it first, and may have changed what is in the folder.
    pub waited: bool,
}

/// Waits `patience` for another coordinator to leave the folder; says so once.
pub fn lock(
    output_dir: &Path,
    patience: Duration,
    say: &mut dyn FnMut(&str),
) -> Result<Lock, StartError> {
    lock_by(lock::attempt, output_dir, patience, say)
}

fn lock_by(
    attempt: impl Fn(&File) -> std::io::Result<Attempt>,
    output_dir: &Path,
    patience: Duration,
    say: &mut dyn FnMut(&str),
) -> Result<Lock, StartError> {
    let path = output_dir.join(WORK_FOLDER).join("lock");
    let failed = |error| StartError::Lock(FileError::io("lock", &path)(error));
    let file = lock::open(&path).map_err(failed)?;
    let began = Instant::now();
    let mut waited = false;
    loop {
        match attempt(&file).map_err(failed)? {
            Attempt::Held => break,
            Attempt::Unsupported(error) => {
                say(&format!(
                    "the file system of output_dir {} has no locks ({error}): see to it that no second coordinator is at \
                     work in it",
                    output_dir.display()
                ));
                break;
            }
            Attempt::Taken if began.elapsed() >= patience => {
                return Err(StartError::InUse {
                    dir: output_dir.to_owned(),
                });
            }
            Attempt::Taken => {}
        }
        if !waited {
            say(&format!(
                "another coordinator is at work in output_dir {}: waiting up to {} s for it to end",
                output_dir.display(),
                patience.as_secs()
            ));
        }
        waited = true;
        std::thread::sleep(LOCK_RETRY.min(patience));
    }
    Ok(Lock {
        _file: file,
        waited,
    })
}

/// What workers inside this process tell workers on other machines. None where only this machine can join.
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

/// Of the interface that the default route takes. Nothing is sent.
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

    #[test]
    fn a_locked_folder_is_waited_for_and_then_refused() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join(WORK_FOLDER)).unwrap();
        let mut said = Vec::new();
        let mut take = |patience: u64| {
            let patience = Duration::from_millis(patience);
            lock(folder.path(), patience, &mut |line| {
                said.push(line.to_owned())
            })
        };
        let first = take(0).unwrap();
        assert!(!first.waited);
        assert!(matches!(take(50), Err(StartError::InUse { .. })));
        let leaving = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            drop(first);
        });
        assert!(take(10_000).unwrap().waited);
        leaving.join().unwrap();
        assert_eq!(said.len(), 2, "once each time: {said:?}");
    }

    #[test]
    fn a_folder_without_locks_is_used_with_a_word_about_it() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join(WORK_FOLDER)).unwrap();
        let mut said = Vec::new();
        let unsupported =
            |_: &File| Ok(Attempt::Unsupported(std::io::ErrorKind::Unsupported.into()));
        let mut say = |line: &str| said.push(line.to_owned());
        lock_by(unsupported, folder.path(), LOCK_PATIENCE, &mut say).unwrap();
        let names = |line: &String| {
            line.contains("has no locks") && line.contains(&folder.path().display().to_string())
        };
        assert!(said.len() == 1 && names(&said[0]), "{said:?}");
        let broken = |_: &File| Err(std::io::ErrorKind::Other.into());
        let error = lock_by(broken, folder.path(), LOCK_PATIENCE, &mut |_| ())
            .err()
            .unwrap();
        assert!(error.to_string().contains("lock"), "{error}");
    }

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
