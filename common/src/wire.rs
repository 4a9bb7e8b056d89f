//! What both ends of the wire must agree on beyond the messages themselves: limits, metadata, and the checks that
//! every message passes before its content is used.

use std::time::Duration;

use proto::v1;
use thiserror::Error;

/// Where the coordinator listens, unless told otherwise.
pub const DEFAULT_PORT: u16 = 7077;
/// Bytes of the largest gRPC message: a chunk, a block, a job or a list of model files with room to spare.
pub const MAX_MESSAGE_BYTES: usize = 16 << 20;
/// Bytes of the largest piece of a file.
pub const CHUNK_BYTES: usize = 1 << 20;
/// Bytes of the smallest file that workers pass on to each other. Smaller ones are sent sooner than it is said who has them.
pub const LEAST_SHARED_BYTES: u64 = 16 << 20;
/// Blocks in one request.
pub const MAX_BLOCKS_PER_FETCH: usize = 4096;
/// Files of a model, a checkpoint or an upload.
pub const MAX_FILES: usize = 4096;
/// Between two signs of life of a worker.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);
/// The metadata key that carries `Bearer <token>` on every call.
pub const TOKEN_KEY: &str = "authorization";
/// The metadata key under which a coordinator that refuses a worker names its job by digest.
pub const JOB_KEY: &str = "muster-job-digest";
/// The metadata key under which a coordinator that has no run yet says what it is at. Whoever hears it comes back.
pub const PREPARING_KEY: &str = "muster-preparing";

#[derive(Debug, Error, PartialEq, Eq)]
pub enum WireError {
    #[error("an empty message")]
    Empty,
    #[error("{field} is missing")]
    Missing { field: &'static str },
    #[error("{field} is {found:?}, which is not valid")]
    Invalid { field: &'static str, found: String },
}

/// What a slot is computed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PlanKind {
    Train,
    /// Forward only, no exchange.
    Eval,
}

impl PlanKind {
    pub fn to_wire(self) -> i32 {
        match self {
            Self::Train => v1::PlanKind::Train as i32,
            Self::Eval => v1::PlanKind::Eval as i32,
        }
    }

    pub fn from_wire(kind: i32) -> Result<Self, WireError> {
        match v1::PlanKind::try_from(kind) {
            Ok(v1::PlanKind::Train) => Ok(Self::Train),
            Ok(v1::PlanKind::Eval) => Ok(Self::Eval),
            _ => Err(WireError::Invalid {
                field: "kind",
                found: kind.to_string(),
            }),
        }
    }
}

/// A message up, wrapped.
pub fn up(message: v1::worker_message::Message) -> v1::WorkerMessage {
    v1::WorkerMessage {
        message: Some(message),
    }
}

/// A message down, wrapped.
pub fn down(message: v1::coordinator_message::Message) -> v1::CoordinatorMessage {
    v1::CoordinatorMessage {
        message: Some(message),
    }
}

/// The value of [`TOKEN_KEY`].
pub fn bearer(token: &str) -> String {
    format!("Bearer {token}")
}

/// Compares a presented [`TOKEN_KEY`] value with the expected token in time that does not depend on either.
pub fn token_matches(presented: &[u8], expected: &str) -> bool {
    // Equality of BLAKE3 hashes is constant-time, and hashing first hides the length.
    blake3::hash(presented) == blake3::hash(bearer(expected).as_bytes())
}

/// A digest as it appears on the wire and in manifests: 64 lower-case hexadecimal digits.
pub fn check_digest(field: &'static str, digest: &str) -> Result<(), WireError> {
    let valid = digest.len() == 64
        && digest
            .bytes()
            .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    if valid {
        Ok(())
    } else {
        Err(WireError::Invalid {
            field,
            found: digest.chars().take(80).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_token_matches() {
        assert!(token_matches(b"Bearer secret", "secret"));
        for presented in [&b"Bearer secre"[..], b"secret", b"", b"Bearer secret "] {
            assert!(!token_matches(presented, "secret"));
        }
    }

    #[test]
    fn an_unspecified_kind_is_refused() {
        for kind in [PlanKind::Train, PlanKind::Eval] {
            assert_eq!(PlanKind::from_wire(kind.to_wire()), Ok(kind));
        }
        assert!(PlanKind::from_wire(0).is_err());
        assert!(PlanKind::from_wire(3).is_err());
    }

    #[test]
    fn a_digest_is_64_hexadecimal_digits() {
        let digest = blake3::hash(b"x").to_hex().to_string();
        assert_eq!(check_digest("digest", &digest), Ok(()));
        for wrong in ["", "abc", &digest.to_uppercase(), "../../etc/passwd"] {
            assert!(check_digest("digest", wrong).is_err());
        }
    }
}
