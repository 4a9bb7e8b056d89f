//! The first bytes of a connection between workers: who calls, what for, and of which run. Little-endian throughout.

use super::frame::array;

/// Greeting of a mesh connection, in both directions: who calls, and in which generation of which run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    pub run_id: [u8; 32],
    pub generation: u64,
    /// Rank of the caller in the generation.
    pub from: u32,
    /// Rank of the member that is called.
    pub to: u32,
}

/// Greeting of a feed: which worker follows, and by which order of the coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FeedHello {
    pub run_id: [u8; 32],
    pub worker: u64,
    pub attempt: u64,
}

/// Greeting of a probe: asks which worker is there. The answer is the same message, in the name of the worker asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeHello {
    pub run_id: [u8; 32],
    /// Number of the worker that asks.
    pub from: u64,
    /// Number of the worker that is asked.
    pub to: u64,
}

/// Greeting of who asks for a file: by the numbers of both workers. The file's request follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileHello {
    pub run_id: [u8; 32],
    /// Number of the worker that asks.
    pub from: u64,
    /// Number of the worker that is asked.
    pub to: u64,
}

const MAGIC: [u8; 8] = *b"MUSTERXC";
const FEED_MAGIC: [u8; 8] = *b"MUSTERFD";
const PROBE_MAGIC: [u8; 8] = *b"MUSTERPB";
const FILE_MAGIC: [u8; 8] = *b"MUSTERFL";
const VERSION: u32 = 4;
pub const HELLO_BYTES: usize = 60;

/// Bytes of a greeting: its kind, this version, the run, and what only that kind knows.
fn greeting(magic: [u8; 8], run_id: &[u8; 32], rest: [u8; 16]) -> [u8; HELLO_BYTES] {
    let mut bytes = [0; HELLO_BYTES];
    bytes[..8].copy_from_slice(&magic);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..44].copy_from_slice(run_id);
    bytes[44..].copy_from_slice(&rest);
    bytes
}

/// The run and the rest of a greeting; None where the bytes are none of this kind and version.
fn greeted(magic: [u8; 8], bytes: &[u8; HELLO_BYTES]) -> Option<([u8; 32], [u8; 16])> {
    let is_it = bytes[..8] == magic && bytes[8..12] == VERSION.to_le_bytes();
    is_it.then(|| (array(&bytes[12..44]), array(&bytes[44..])))
}

/// Two numbers, as greetings have them at their end.
fn pair(first: u64, second: u64) -> [u8; 16] {
    (u128::from(first) | u128::from(second) << 64).to_le_bytes()
}

/// The numbers of a [`pair`].
fn of_pair(bytes: [u8; 16]) -> (u64, u64) {
    let both = u128::from_le_bytes(bytes);
    (both as u64, (both >> 64) as u64)
}

impl Hello {
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let ranks = u64::from(self.from) | u64::from(self.to) << 32;
        greeting(MAGIC, &self.run_id, pair(self.generation, ranks))
    }

    /// Reads a Hello; None where the bytes are none of this version.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Option<Self> {
        let (run_id, rest) = greeted(MAGIC, bytes)?;
        let (generation, ranks) = of_pair(rest);
        Some(Self {
            run_id,
            generation,
            from: ranks as u32,
            to: (ranks >> 32) as u32,
        })
    }
}

impl FeedHello {
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        greeting(FEED_MAGIC, &self.run_id, pair(self.worker, self.attempt))
    }

    /// Reads the greeting of a feed; None where the bytes are none of this version.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Option<Self> {
        let (run_id, rest) = greeted(FEED_MAGIC, bytes)?;
        let (worker, attempt) = of_pair(rest);
        Some(Self {
            run_id,
            worker,
            attempt,
        })
    }
}

impl FileHello {
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        greeting(FILE_MAGIC, &self.run_id, pair(self.from, self.to))
    }

    /// Reads the greeting of who asks for a file; None where the bytes are none of this version.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Option<Self> {
        let (run_id, rest) = greeted(FILE_MAGIC, bytes)?;
        let (from, to) = of_pair(rest);
        Some(Self { run_id, from, to })
    }
}

impl ProbeHello {
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        greeting(PROBE_MAGIC, &self.run_id, pair(self.from, self.to))
    }

    /// Reads the greeting of a probe; None where the bytes are none of this version.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Option<Self> {
        let (run_id, rest) = greeted(PROBE_MAGIC, bytes)?;
        let (from, to) = of_pair(rest);
        Some(Self { run_id, from, to })
    }

    /// The answer of worker `own` to this probe.
    pub fn answered_by(&self, own: u64) -> Self {
        Self {
            from: own,
            to: self.from,
            ..*self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greetings_round_trip_and_none_is_taken_for_another() {
        let hello = Hello {
            run_id: [7; 32],
            generation: 3,
            from: 2,
            to: 1,
        };
        assert_eq!(Hello::decode(&hello.encode()), Some(hello));
        let feed = FeedHello {
            run_id: [7; 32],
            worker: 3,
            attempt: 1,
        };
        assert_eq!(FeedHello::decode(&feed.encode()), Some(feed));
        let probe = ProbeHello {
            run_id: [7; 32],
            from: 3,
            to: 1,
        };
        assert_eq!(ProbeHello::decode(&probe.encode()), Some(probe));
        let file = FileHello {
            run_id: [7; 32],
            from: 3,
            to: 1 << 40,
        };
        assert_eq!(FileHello::decode(&file.encode()), Some(file));
        assert_eq!(FileHello::decode(&probe.encode()), None);
        assert_eq!(ProbeHello::decode(&feed.encode()), None);
        assert_eq!(FeedHello::decode(&hello.encode()), None);
        assert_eq!(Hello::decode(&feed.encode()), None);
        let mut foreign = hello.encode();
        foreign[8] = 1;
        assert_eq!(Hello::decode(&foreign), None);
    }
}
