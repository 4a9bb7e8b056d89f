//! The encoding between workers: a fixed header, then a bounded payload, little-endian throughout.
//!
//! Nothing received is trusted: kind, index and length must be the ones that are due, and the checksum must hold (the
//! 16 bits of TCP let one damaged packet in 65,536 pass, and a damaged gradient would poison every replica alike).

/// Sums and weights are sent as they lie in memory.
#[cfg(target_endian = "big")]
compile_error!("the exchange between workers is written for little-endian machines");

use common::instruction_set::InstructionSet;

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
    match InstructionSet::chosen() {
        InstructionSet::Scalar => {}
        // SAFETY: the processor has the instructions.
        InstructionSet::Avx2 => return unsafe { sum_lanes_avx2(groups) },
        InstructionSet::Avx512 | InstructionSet::Avx512Bf16 => {
            // SAFETY: as above.
            return unsafe { sum_lanes_avx512(groups) };
        }
    }
    sum_lanes_plain(groups)
}

/// Computes the lanes with AVX2, a group in two registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_lanes_avx2(groups: &[Group]) -> Lanes {
    use std::arch::x86_64::*;
    let mut lanes = [[_mm256_setzero_si256(); 2]; 4];
    let [words, uppers, sums_of_words, sums_of_uppers] = &mut lanes;
    for group in groups {
        for half in 0..2 {
            // SAFETY: a group is 64 bytes.
            let word = unsafe { _mm256_loadu_si256(group.as_ptr().add(32 * half).cast()) };
            words[half] = _mm256_add_epi64(words[half], word);
            uppers[half] = _mm256_add_epi64(uppers[half], _mm256_srli_epi64::<32>(word));
            sums_of_words[half] = _mm256_add_epi64(sums_of_words[half], words[half]);
            sums_of_uppers[half] = _mm256_add_epi64(sums_of_uppers[half], uppers[half]);
        }
    }
    // SAFETY: any bits are integers, and the sizes are equal.
    unsafe { std::mem::transmute(lanes) }
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
pub(super) fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(bytes);
    array
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_round_trips() {
        let header = FrameHeader::of(FrameKind::Part, 7, &[1, 2, 3]);
        assert_eq!(FrameHeader::decode(&header.encode()), header);
        assert_eq!(header.fault(FrameKind::Part, 7, Some(3)), None);
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
