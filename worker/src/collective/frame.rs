//! The encoding between workers: a fixed header, then a bounded payload, little-endian throughout.
//!
//! Nothing received is trusted: kind, index and length must be the ones that are due, and the checksum must hold (the
//! 16 bits of TCP let one damaged packet in 65,536 pass, and a damaged gradient would poison every replica alike).

/// Sums and weights are sent as they lie in memory.
#[cfg(target_endian = "big")]
compile_error!("the exchange between workers is written for little-endian machines");

pub const HEADER_BYTES: usize = 24;

/// Longest payload of a frame, in bytes.
pub const MAX_PAYLOAD_BYTES: usize = 8 << 20;

/// Scalars of a piece of a state or of an update's mean gradient, each sent in a frame of its own.
pub const PIECE_SCALARS: usize = 64 << 10;

/// What a frame between workers holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// First frame of an exchange: what a worker brings to it.
    Start = 1,
    /// Sums on their way to the owner of their chunk.
    Part = 2,
    /// Finished means on their way from the owner.
    Finished = 3,
    /// Announces weights and optimizer state; their pieces follow.
    StateHeader = 4,
    State = 5,
    /// First frame of a follower: what it has of a feed already.
    FeedRequest = 6,
    /// Announces an update; its mean gradient follows.
    Update = 7,
    Mean = 8,
    /// Says that the follower has all that was sent.
    Taken = 9,
    /// Sign of life: there is nothing new.
    Alive = 10,
    /// Says that the feed has yet to begin.
    Later = 11,
    /// Says that the feed, or the file, is over; the payload says why.
    Ended = 12,
    /// First frame of who asks for a file: its digest, and where to begin.
    FileRequest = 13,
    /// A piece of a file.
    FilePiece = 14,
}

impl FrameKind {
    /// The kind of this number, or None where only a later version might know it.
    pub fn of(kind: u8) -> Option<Self> {
        [
            Self::Start,
            Self::Part,
            Self::Finished,
            Self::StateHeader,
            Self::State,
            Self::FeedRequest,
            Self::Update,
            Self::Mean,
            Self::Taken,
            Self::Alive,
            Self::Later,
            Self::Ended,
            Self::FileRequest,
            Self::FilePiece,
        ]
        .into_iter()
        .find(|known| *known as u8 == kind)
    }
}

/// Header of a frame, which its payload follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Number of a [`FrameKind`].
    pub kind: u8,
    /// Bytes of the payload.
    pub length: u32,
    /// Number of the piece within its transfer, by which the receiver notices that another one came.
    pub index: u64,
    /// Checksum of the payload.
    pub checksum: u64,
}

impl FrameHeader {
    /// Header of a frame with this payload, whose checksum is computed here.
    pub fn of(kind: FrameKind, index: usize, payload: &[u8]) -> Self {
        Self::summed(kind, index, payload, checksum(payload))
    }

    /// Header of a frame with this payload, whose checksum is known.
    pub fn summed(kind: FrameKind, index: usize, payload: &[u8], checksum: u64) -> Self {
        assert!(
            payload.len() <= MAX_PAYLOAD_BYTES,
            "a frame is cut too large"
        );
        Self {
            kind: kind as u8,
            length: payload.len() as u32,
            index: index as u64,
            checksum,
        }
    }

    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.kind;
        bytes[4..8].copy_from_slice(&self.length.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.index.to_le_bytes());
        bytes[16..].copy_from_slice(&self.checksum.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        Self {
            kind: bytes[0],
            length: u32::from_le_bytes(array(&bytes[4..8])),
            index: u64::from_le_bytes(array(&bytes[8..16])),
            checksum: u64::from_le_bytes(array(&bytes[16..])),
        }
    }

    /// Returns why this is not the frame that is due, if it is not. `length` is the only one allowed, or None for any within the
    /// bound.
    pub fn fault(&self, kind: FrameKind, index: usize, length: Option<usize>) -> Option<String> {
        if self.kind != kind as u8 || self.index != index as u64 {
            return Some(format!(
                "sent frame {}.{} where {}.{index} was due",
                self.kind, self.index, kind as u8
            ));
        }
        let sent = self.length as usize;
        match length {
            Some(length) if sent != length => Some(format!(
                "sent a frame of {sent} bytes where {length} were due"
            )),
            _ if sent > MAX_PAYLOAD_BYTES => Some(format!(
                "sent a frame of {sent} bytes, more than {MAX_PAYLOAD_BYTES}"
            )),
            _ => None,
        }
    }
}

/// Checksum of a frame's payload.
///
/// Sums of the words, and sums of those sums (Fletcher, 1982), in lanes that vector instructions add at once. Any one or two
/// damaged 32-bit halves of words of a lane change it: the sums of the upper halves do not wrap round within a frame, and
/// with them those of whole words tell the lower ones.
pub fn checksum(bytes: &[u8]) -> u64 {
    mix(&sum_lanes(bytes.as_chunks().0), bytes)
}

type Group = [u8; 8 * LANES];
/// For each lane of a checksum: the sum of its words, that of their upper halves, and the sums of those sums.
type Lanes = [[u64; LANES]; 4];

fn sum_lanes(groups: &[Group]) -> Lanes {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx512f") {
        // SAFETY: the feature was just detected.
        return unsafe { sum_lanes_avx512(groups) };
    }
    sum_lanes_plain(groups)
}

/// Computes the lanes with AVX-512, a group in one register: compilers do not find this by themselves in every build.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn sum_lanes_avx512(groups: &[Group]) -> Lanes {
    use std::arch::x86_64::*;
    let [mut words, mut uppers, mut sums_of_words, mut sums_of_uppers] =
        [_mm512_setzero_si512(); 4];
    for group in groups {
        // SAFETY: a group is 64 bytes.
        let word = unsafe { _mm512_loadu_si512(group.as_ptr().cast()) };
        words = _mm512_add_epi64(words, word);
        uppers = _mm512_add_epi64(uppers, _mm512_srli_epi64::<32>(word));
        sums_of_words = _mm512_add_epi64(sums_of_words, words);
        sums_of_uppers = _mm512_add_epi64(sums_of_uppers, uppers);
    }
    // SAFETY: any bits are integers, and the sizes are equal.
    unsafe { std::mem::transmute([words, uppers, sums_of_words, sums_of_uppers]) }
}

fn sum_lanes_plain(groups: &[Group]) -> Lanes {
    let [mut words, mut uppers, mut sums_of_words, mut sums_of_uppers] = [[0u64; LANES]; 4];
    for group in groups {
        for (lane, word) in group.as_chunks().0.iter().enumerate() {
            let word = u64::from_le_bytes(*word);
            words[lane] = words[lane].wrapping_add(word);
            uppers[lane] = uppers[lane].wrapping_add(word >> 32);
            sums_of_words[lane] = sums_of_words[lane].wrapping_add(words[lane]);
            sums_of_uppers[lane] = sums_of_uppers[lane].wrapping_add(uppers[lane]);
        }
    }
    [words, uppers, sums_of_words, sums_of_uppers]
}

/// Makes one word of all lanes and of the bytes after the last whole group.
fn mix(lanes: &Lanes, bytes: &[u8]) -> u64 {
    const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
    // Each step is a bijection of what it takes in.
    let take_in =
        |checksum: u64, word: u64| (checksum.rotate_left(17) ^ word).wrapping_mul(MULTIPLIER);
    let (_, rest) = bytes.as_chunks::<{ 8 * LANES }>();
    let rest = rest.iter().map(|byte| u64::from(*byte));
    let lanes = lanes.iter().flatten().copied();
    lanes.chain(rest).fold(bytes.len() as u64, take_in)
}

/// Number of 64-bit lanes of a checksum.
const LANES: usize = 8;

/// `bytes` as an array of the length that the caller has cut it to.
fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(bytes);
    array
}

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
    fn headers_and_hellos_round_trip() {
        let header = FrameHeader::of(FrameKind::Part, 7, &[1, 2, 3]);
        assert_eq!(FrameHeader::decode(&header.encode()), header);
        assert_eq!(header.fault(FrameKind::Part, 7, Some(3)), None);
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

    #[test]
    fn every_damaged_byte_changes_the_checksum() {
        let payload: Vec<u8> = (0..300).map(|i| (i * 37) as u8).collect();
        let whole = checksum(&payload);
        for position in 0..payload.len() {
            let mut damaged = payload.clone();
            damaged[position] ^= 0x10;
            assert_ne!(checksum(&damaged), whole, "byte {position}");
        }
        assert_ne!(checksum(&payload[..299]), whole);
        // The sums of a lane are equal, but not in which order they came.
        let mut swapped = payload.clone();
        swapped[..4].copy_from_slice(&payload[8 * LANES..][..4]);
        swapped[8 * LANES..][..4].copy_from_slice(&payload[..4]);
        assert_ne!(checksum(&swapped), whole);
    }

    #[test]
    fn every_processor_gives_the_same_checksum() {
        let payload: Vec<u8> = (0..20_000u32).map(|i| (i * i / 7) as u8).collect();
        for length in [0, 1, 63, 64, 65, 8192, 8256, 19_999] {
            let bytes = &payload[..length];
            let plain = mix(&sum_lanes_plain(bytes.as_chunks().0), bytes);
            assert_eq!(checksum(bytes), plain, "{length} bytes");
        }
    }
}
