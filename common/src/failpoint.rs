//! Places at which a test may kill or stop this process, to prove that the others go on.
//!
//! In: `MUSTER_FAILPOINT=NAME[:NTH][=kill|stop|hold]`, read once by [`arm`]. Out: at the NTH (default 1) time that NAME is
//! reached, SIGKILL or SIGSTOP to this process: nothing is flushed, no destructor runs, as if the power had gone. `hold`
//! holds only the thread that came there, for ever, as a file system does that hangs. Where nothing is armed, a place costs
//! one relaxed load. It never changes what is computed.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use thiserror::Error;

const VARIABLE: &str = "MUSTER_FAILPOINT";

/// The places of a worker, in the order in which a run comes by. A name that is not here, or among the coordinator's, is
/// refused, because a typing error would otherwise pass for a test.
pub const WORKER: &[&str] = &[
    "join",
    "fetch",
    "forward",
    "exchange",
    "optimizer",
    "state-send",
    "state-receive",
    "upload",
];

/// The places of a coordinator.
pub const COORDINATOR: &[&str] = &[
    "pack",
    "journal-write",
    "commit",
    "evaluate",
    "evaluation-recorded",
    "checkpoint-write",
    "result-from-best",
    "result-write",
    "result-recorded",
    "farewell",
];

#[derive(Debug, Error, PartialEq, Eq)]
pub enum FailpointError {
    #[error(
        "{VARIABLE}={value} is not NAME[:NTH][=kill|stop|hold]: {reason}; the names are {}",
        [WORKER, COORDINATOR].concat().join(", ")
    )]
    Malformed { value: String, reason: String },
    #[error("{VARIABLE} works on Unix only; remove it")]
    Unsupported,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    Kill,
    Stop,
    Hold,
}

#[derive(Debug)]
struct Failpoint {
    name: &'static str,
    deed: Deed,
    /// Times still to pass by, this one included.
    left: AtomicU64,
}

static ARMED: AtomicBool = AtomicBool::new(false);
static FAILPOINT: OnceLock<Failpoint> = OnceLock::new();

/// Reads the environment. Gives back what to warn of: a program calls this once, before anything else.
pub fn arm() -> Result<Option<String>, FailpointError> {
    let Some(value) = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()) else {
        return Ok(None);
    };
    if !cfg!(unix) {
        return Err(FailpointError::Unsupported);
    }
    let value = value.to_string_lossy();
    let failpoint = parse(&value).map_err(|reason| FailpointError::Malformed {
        value: value.chars().take(80).collect(),
        reason,
    })?;
    let _ = FAILPOINT.set(failpoint);
    ARMED.store(true, Ordering::Relaxed);
    Ok(Some(format!(
        "{VARIABLE}={value}: this process will fail on purpose"
    )))
}

/// Says that the execution has come to this place. It may be the last thing that the process does.
#[inline]
pub fn reached(name: &str) {
    debug_assert!(known(name).is_some(), "{name} is not among the names");
    if ARMED.load(Ordering::Relaxed) {
        pass(name);
    }
}

#[cold]
fn pass(name: &str) {
    let Some(failpoint) = FAILPOINT.get().filter(|failpoint| failpoint.name == name) else {
        return;
    };
    let counted = failpoint
        .left
        .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
            left.checked_sub(1)
        });
    if counted == Ok(1) {
        fail(failpoint.deed);
    }
}

fn known(name: &str) -> Option<&'static str> {
    let mut names = WORKER.iter().chain(COORDINATOR).copied();
    names.find(|known| *known == name)
}

fn parse(value: &str) -> Result<Failpoint, String> {
    let (place, deed) = value.split_once('=').unwrap_or((value, "kill"));
    let (name, nth) = place.split_once(':').unwrap_or((place, "1"));
    let deed = match deed {
        "kill" => Deed::Kill,
        "stop" => Deed::Stop,
        "hold" => Deed::Hold,
        _ => return Err(format!("{deed:?} is neither kill nor stop nor hold")),
    };
    let name = known(name).ok_or_else(|| format!("there is no place {name:?}"))?;
    let nth: u64 = match nth.parse() {
        Ok(nth) if nth > 0 => nth,
        _ => return Err(format!("{nth:?} is not a number above 0")),
    };
    Ok(Failpoint {
        name,
        deed,
        left: AtomicU64::new(nth),
    })
}

#[cfg(unix)]
fn fail(deed: Deed) {
    let signal = match deed {
        Deed::Kill => libc::SIGKILL,
        Deed::Stop => libc::SIGSTOP,
        Deed::Hold => loop {
            std::thread::park();
        },
    };
    // Sent to the process, it might reach another thread first, and this one would go on for a moment.
    // SAFETY: takes and returns plain integers and touches no memory of this process.
    unsafe { libc::raise(signal) };
}

#[cfg(not(unix))]
fn fail(_: Deed) {}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_place_has_a_number_and_a_deed() {
        for (value, name, nth, deed) in [
            ("join", "join", 1, Deed::Kill),
            ("exchange:7", "exchange", 7, Deed::Kill),
            ("forward=stop", "forward", 1, Deed::Stop),
            ("pack=hold", "pack", 1, Deed::Hold),
            ("checkpoint-write:2=kill", "checkpoint-write", 2, Deed::Kill),
        ] {
            let failpoint = parse(value).unwrap();
            assert_eq!((failpoint.name, failpoint.deed), (name, deed), "{value}");
            assert_eq!(failpoint.left.into_inner(), nth, "{value}");
        }
    }

    #[test]
    fn a_malformed_value_is_refused_by_what_is_wrong_with_it() {
        for (value, expected) in [
            ("jion", "no place \"jion\""),
            ("join:0", "\"0\" is not a number"),
            ("join:many", "\"many\" is not a number"),
            ("join:18446744073709551616", "not a number"),
            ("join=pause", "\"pause\" is neither"),
            ("=kill", "no place \"\""),
        ] {
            let reason = parse(value).unwrap_err();
            assert!(reason.contains(expected), "{value}: {reason}");
        }
    }

    #[test]
    fn a_place_that_is_not_armed_lets_everything_pass() {
        for name in WORKER.iter().chain(COORDINATOR) {
            reached(name);
        }
    }
}
