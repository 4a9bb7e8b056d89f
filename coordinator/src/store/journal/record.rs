//! The journal's records and their encoding. Pure: bytes in, records out.
//!
//! A file is eight bytes of magic, then frames: length, checksum, record as JSON. Each checksum covers the one before it,
//! so that a frame is only good where everything before it is.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::store::output::Line;

/// First bytes of a journal, which name its format.
pub const MAGIC: &[u8; 8] = b"MUSTERJ1";
/// Largest encoded record, far above any real one.
pub const MAX_RECORD_BYTES: usize = 256 << 10;
const LENGTH_BYTES: usize = 4;
const CHECKSUM_BYTES: usize = 16;

/// Something that a coordinator must not forget.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum Record {
    /// A coordinator took the run over.
    Term(Term),
    /// A generation began. `workers` of its members live in processes of their own.
    Generation {
        number: u64,
        workers: usize,
        numerics_class: String,
    },
    /// A step was committed.
    Step(Step),
    /// The weights after `step` updates were evaluated.
    Evaluated {
        step: u64,
        line: Line,
    },
    Checkpoint {
        step: u64,
        path: PathBuf,
    },
    /// The coordinator stopped. `resumable`: its workers were told to wait for the next one.
    Ended {
        resumable: bool,
    },
}

/// One life of a coordinator: its number, and which run it is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Term {
    pub term: u64,
    pub identity: Identity,
    /// Random identifier of the run, drawn when it began.
    pub run: String,
    /// Muster's version.
    pub version: String,
}

/// The job, model and data of a run, by digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub job_digest: String,
    pub base_model_digest: String,
    /// Digest of the block file.
    pub data_digest: String,
}

/// A committed step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// Number of updates after this one.
    pub step: u64,
    pub weights_digest: Option<String>,
    /// Number of consecutive skipped steps, including this one.
    pub skipped_in_a_row: u64,
    /// Its line in `metrics.jsonl`.
    pub line: Line,
}

/// The checksum that the next frame continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chain([u8; CHECKSUM_BYTES]);

impl Chain {
    /// The checksum before the first frame.
    pub fn start() -> Self {
        Self([0; CHECKSUM_BYTES])
    }

    fn next(self, payload: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.0);
        hasher.update(&(payload.len() as u64).to_le_bytes());
        hasher.update(payload);
        let mut checksum = [0; CHECKSUM_BYTES];
        checksum.copy_from_slice(&hasher.finalize().as_bytes()[..CHECKSUM_BYTES]);
        Self(checksum)
    }

    /// Appends a record's frame.
    pub fn append(&mut self, record: &Record, bytes: &mut Vec<u8>) {
        let payload = serde_json::to_vec(record).unwrap_or_default();
        *self = self.next(&payload);
        bytes.extend((payload.len() as u32).to_le_bytes());
        bytes.extend(self.0);
        bytes.extend(payload);
    }
}

/// A file's content up to the first frame that is cut off or damaged.
#[derive(Debug, PartialEq)]
pub struct Decoded {
    pub records: Vec<Record>,
    /// Bytes behind the good frames that are cut off or damaged.
    pub torn_bytes: usize,
}

/// Decodes a file up to the first frame that is damaged. None where this is no journal of this format.
pub fn decode(bytes: &[u8]) -> Option<Decoded> {
    let mut rest = bytes.strip_prefix(MAGIC)?;
    let mut chain = Chain::start();
    let mut records = Vec::new();
    while let Some((record, next, after)) = decode_frame(chain, rest) {
        records.push(record);
        (chain, rest) = (next, after);
    }
    let torn_bytes = rest.len();
    Some(Decoded {
        records,
        torn_bytes,
    })
}

fn decode_frame(chain: Chain, bytes: &[u8]) -> Option<(Record, Chain, &[u8])> {
    let (length, bytes) = bytes.split_first_chunk::<LENGTH_BYTES>()?;
    let (checksum, bytes) = bytes.split_first_chunk::<CHECKSUM_BYTES>()?;
    let length = u32::from_le_bytes(*length) as usize;
    if length > MAX_RECORD_BYTES || length > bytes.len() {
        return None;
    }
    let (payload, after) = bytes.split_at(length);
    let next = chain.next(payload);
    if next.0 != *checksum {
        return None;
    }
    let record = serde_json::from_slice(payload).ok()?;
    Some((record, next, after))
}

/// Encodes a whole file: magic and frames.
pub fn encode<'a>(records: impl IntoIterator<Item = &'a Record>) -> (Vec<u8>, Chain) {
    let mut bytes = MAGIC.to_vec();
    let mut chain = Chain::start();
    for record in records {
        chain.append(record, &mut bytes);
    }
    (bytes, chain)
}
