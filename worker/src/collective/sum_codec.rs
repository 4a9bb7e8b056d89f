//! Encoding of sums in as few bytes as hold them: a group of scalars is as wide as its widest, to the byte.
//!
//! In: 64-bit sums. Out: the same sums. In units of 2^-48 a mean gradient of 1e-3 takes 39 bits and its sign, so that
//! five bytes go over the wire where eight lie in memory. What arrives is not trusted.
//!
//! ```text
//! width of each group, one byte each | group 0: scalars, two's complement, little-endian, each `width` bytes | group 1 ...
//! ```

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod groups;

use self::groups::{GROUP, decode_with, encode_with, finish_each, read_plain, write_plain};
use common::instruction_set::InstructionSet;

/// Scalars that are encoded or decoded at a time: as sums, they stay within a core's first cache.
pub const BLOCK: usize = 8 * GROUP;

/// Most bytes that `scalars` encoded sums take.
pub fn encoded_limit(scalars: usize) -> usize {
    scalars.div_ceil(GROUP) + scalars * size_of::<i64>()
}

/// Encodes sums into `bytes`, which are as many as [`encoded_limit`] says. `read` fills a block with those from a place on.
/// Returns how many bytes they took.
pub fn encode(scalars: usize, mut read: impl FnMut(usize, &mut [i64]), bytes: &mut [u8]) -> usize {
    let (widths, data) = bytes.split_at_mut(scalars.div_ceil(GROUP));
    let (mut block, mut length) = ([0; BLOCK], 0);
    for (index, widths) in widths.chunks_mut(BLOCK / GROUP).enumerate() {
        let start = index * BLOCK;
        let sums = &mut block[..BLOCK.min(scalars - start)];
        read(start, sums);
        length += encode_block(sums, widths, &mut data[length..]);
    }
    widths.len() + length
}

/// Encoded sums, which are read block by block.
pub struct Encoded<'a> {
    widths: &'a [u8],
    data: &'a [u8],
}

impl<'a> Encoded<'a> {
    /// Checks the encoding of so many sums, and says what is wrong with it.
    pub fn open(bytes: &'a [u8], scalars: usize) -> Result<Self, String> {
        let fault = || format!("sent {} bytes that are no sums", bytes.len());
        let groups = scalars.div_ceil(GROUP);
        let (widths, data) = bytes.split_at_checked(groups).ok_or_else(fault)?;
        match encoded_length(widths, scalars) == Some(data.len()) {
            true => Ok(Self { widths, data }),
            false => Err(fault()),
        }
    }

    /// Reads the next sums: whole groups, and in the end what is left.
    pub fn next(&mut self, sums: &mut [i64]) {
        let (widths, rest) = self.widths.split_at(sums.len().div_ceil(GROUP));
        self.data = decode_block(widths, self.data, sums);
        self.widths = rest;
    }
}

/// Bytes of so many scalars in groups of these widths; None where one is no width.
fn encoded_length(widths: &[u8], scalars: usize) -> Option<usize> {
    let Some((last, whole)) = widths.split_last() else {
        return Some(0);
    };
    let sum: usize = whole.iter().map(|width| usize::from(*width)).sum();
    let length = sum * GROUP + usize::from(*last) * (scalars - whole.len() * GROUP);
    (widths.iter().max() <= Some(&8)).then_some(length)
}

/// What moves the bytes. Either way gives the same bits.
#[derive(Clone, Copy, Debug)]
enum Mover {
    Plain,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Mover {
    fn chosen() -> Self {
        #[cfg(target_arch = "x86_64")]
        match InstructionSet::chosen() {
            InstructionSet::Scalar => {}
            InstructionSet::Avx2 => return Self::Avx2,
            InstructionSet::Avx512 | InstructionSet::Avx512Bf16 => {
                return match std::arch::is_x86_feature_detected!("avx512vbmi") {
                    true => Self::Avx512,
                    false => Self::Avx2,
                };
            }
        }
        Self::Plain
    }

    fn finish(self, sums: &[i64], means: &mut [f32]) {
        match self {
            Self::Plain => finish_each(sums, means),
            // SAFETY: the processor has the instructions.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2::finish(sums, means) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512::finish(sums, means) },
        }
    }

    fn encode(self, sums: &[i64], widths: &mut [u8], data: &mut [u8]) -> usize {
        match self {
            Self::Plain => encode_with(sums, widths, data, write_plain),
            // SAFETY: the processor has the instructions.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2::encode(sums, widths, data) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512::encode(sums, widths, data) },
        }
    }

    fn decode<'a>(self, widths: &[u8], data: &'a [u8], sums: &mut [i64]) -> &'a [u8] {
        match self {
            Self::Plain => decode_with(widths, data, sums, read_plain),
            // SAFETY: the processor has the instructions.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2::decode(widths, data, sums) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512::decode(widths, data, sums) },
        }
    }
}

/// Turns finished sums into mean gradients.
pub fn finish(sums: &[i64], means: &mut [f32]) {
    Mover::chosen().finish(sums, means);
}

/// Writes the width of each group and then, from the start of `data`, the groups; returns their bytes.
fn encode_block(sums: &[i64], widths: &mut [u8], data: &mut [u8]) -> usize {
    Mover::chosen().encode(sums, widths, data)
}

/// Reads groups whose widths fit to `data`; returns what is left of it.
fn decode_block<'a>(widths: &[u8], data: &'a [u8], sums: &mut [i64]) -> &'a [u8] {
    Mover::chosen().decode(widths, data, sums)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use common::rng::CounterRng;
    use proptest::prelude::*;

    use super::*;

    fn encoded(sums: &[i64]) -> Vec<u8> {
        let mut bytes = vec![9; encoded_limit(sums.len())];
        let read = |start: usize, block: &mut [i64]| {
            block.copy_from_slice(&sums[start..start + block.len()]);
        };
        let length = encode(sums.len(), read, &mut bytes);
        bytes.truncate(length);
        bytes
    }

    fn decoded(bytes: &[u8], scalars: usize) -> Result<Vec<i64>, String> {
        let mut encoded = Encoded::open(bytes, scalars)?;
        let mut sums = vec![7; scalars];
        for block in sums.chunks_mut(BLOCK) {
            encoded.next(block);
        }
        assert!(encoded.data.is_empty() && encoded.widths.is_empty());
        Ok(sums)
    }

    fn round_trip(sums: &[i64]) -> Vec<u8> {
        let bytes = encoded(sums);
        assert_eq!(decoded(&bytes, sums.len()).unwrap(), sums);
        bytes
    }

    /// As every other processor has it.
    fn check_others(sums: &[i64], expected: &[u8]) {
        let movers = [
            Some(Mover::Plain),
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx2.is_there().then_some(Mover::Avx2),
        ];
        for mover in movers.into_iter().flatten() {
            let groups = sums.len().div_ceil(GROUP);
            let mut bytes = vec![9; encoded_limit(sums.len())];
            let (widths, data) = bytes.split_at_mut(groups);
            let length = mover.encode(sums, widths, data);
            bytes.truncate(groups + length);
            assert_eq!(bytes, expected, "{mover:?}");
            let (widths, data) = bytes.split_at(groups);
            let mut back = vec![7; sums.len()];
            assert!(mover.decode(widths, data, &mut back).is_empty());
            assert_eq!(back, sums, "{mover:?}");
        }
    }

    #[test]
    fn every_value_comes_back() {
        assert!(round_trip(&[]).is_empty());
        for bits in 0..64 {
            let power = 1i64 << bits;
            for value in [power, power.wrapping_sub(1), !power, power.wrapping_neg()] {
                round_trip(&[value]);
                round_trip(&[value, 0, -1]);
                round_trip(&[value; BLOCK + 9]);
            }
        }
    }

    #[test]
    fn groups_are_as_wide_as_their_widest() {
        let mut sums = vec![0i64; 3 * GROUP + 5];
        sums[GROUP] = 127;
        sums[GROUP + 1] = -128;
        sums[2 * GROUP] = 128;
        sums[3 * GROUP] = i64::MIN;
        let bytes = round_trip(&sums);
        assert_eq!(bytes[..4], [0, 1, 2, 8]);
        assert_eq!(bytes.len(), 4 + GROUP + 2 * GROUP + 8 * 5);
    }

    #[test]
    fn every_processor_gives_the_same_bytes() {
        let mut rng = CounterRng::new(4, &[]);
        for length in [1, 7, 8, 131, 999, BLOCK, 2 * BLOCK + 77] {
            for shift in 0..64 {
                let sums: Vec<i64> = (0..length)
                    .map(|_| rng.next_u64() as i64 >> shift)
                    .collect();
                check_others(&sums, &round_trip(&sums));
            }
        }
    }

    /// Groups of any widths beside each other, of which the last may be cut short.
    fn mixtures() -> impl Strategy<Value = Vec<i64>> {
        let group = (0u32..=64, prop::collection::vec(any::<i64>(), GROUP)).prop_map(
            |(unused, group)| -> Vec<i64> {
                let narrowed = group.iter().map(|sum| sum.checked_shr(unused).unwrap_or(0));
                narrowed.collect()
            },
        );
        (prop::collection::vec(group, 1..20), 0..GROUP).prop_map(|(groups, cut)| {
            let mut sums = groups.concat();
            sums.truncate(sums.len() - cut);
            sums
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_mixture_comes_back(sums in mixtures()) {
            check_others(&sums, &round_trip(&sums));
        }

        /// Of any bytes, whatever widths they claim: either they are refused, or they are as many as the sums need.
        #[test]
        fn arbitrary_bytes_are_sums_or_refused(
            mut bytes in prop::collection::vec(any::<u8>(), 0..3000),
            scalars in 0usize..700,
            width in 0u8..=9,
        ) {
            let groups = scalars.div_ceil(GROUP).min(bytes.len());
            bytes[..groups].fill(width);
            let due = scalars.div_ceil(GROUP) + scalars * usize::from(width);
            let fits = bytes.len() == due && (width <= 8 || scalars == 0);
            prop_assert_eq!(decoded(&bytes, scalars).is_ok(), fits);
            bytes.resize(due, 5);
            bytes[..scalars.div_ceil(GROUP)].fill(width);
            prop_assert_eq!(decoded(&bytes, scalars).is_ok(), width <= 8 || scalars == 0);
        }
    }

    #[test]
    fn what_is_no_encoding_is_refused() {
        let mut bytes = encoded(&[300; 200]);
        assert_eq!(decoded(&bytes, 200).unwrap(), [300; 200]);
        for wrong in [&bytes[..0], &bytes[..1], &bytes[..bytes.len() - 1]] {
            assert_eq!(
                decoded(wrong, 200),
                Err(format!("sent {} bytes that are no sums", wrong.len()))
            );
        }
        bytes.push(0);
        assert!(decoded(&bytes, 200).is_err());
        let too_wide = [vec![9, 0], vec![0; 9 * 128]].concat();
        assert!(decoded(&too_wide, 200).is_err());
    }
}
