//! Sums on their way, in as few bytes as hold them: a group of scalars is as wide as its widest, to the byte.
//!
//! In: 64-bit sums. Out: the same sums. In units of 2^-48 a mean gradient of 1e-3 takes 39 bits and its sign, so that
//! five bytes go over the wire where eight lie in memory. What arrives is not trusted.
//!
//! ```text
//! width of each group, one byte each | group 0: scalars, two's complement, little-endian, each `width` bytes | group 1 ...
//! ```

use common::exact::dequantize;

/// Scalars that share a width.
const GROUP: usize = 128;

/// Bytes that `scalars` take at most.
pub fn encoded_limit(scalars: usize) -> usize {
    scalars.div_ceil(GROUP) + scalars * size_of::<i64>()
}

/// The encoding of `sums`, in place of what was in `bytes`.
pub fn encode(sums: &[i64], bytes: &mut Vec<u8>) {
    bytes.resize(encoded_limit(sums.len()), 0);
    #[cfg(target_arch = "x86_64")]
    if has_vectors() {
        // SAFETY: the features were just detected.
        let length = unsafe { avx512::encode(sums, bytes) };
        return bytes.truncate(length);
    }
    let length = encode_with(sums, bytes, write_plain);
    bytes.truncate(length);
}

/// Fills `sums` from its encoding, or says what is wrong with it.
pub fn decode(bytes: &[u8], sums: &mut [i64]) -> Result<(), String> {
    let groups = sums.len().div_ceil(GROUP);
    let fault = || format!("sent {} bytes that are no sums", bytes.len());
    let (widths, data) = bytes.split_at_checked(groups).ok_or_else(fault)?;
    let lengths = widths.iter().zip(sums.chunks(GROUP));
    let length: usize = lengths
        .map(|(width, group)| usize::from(*width) * group.len())
        .sum();
    if length != data.len() || widths.iter().any(|width| usize::from(*width) > 8) {
        return Err(fault());
    }
    #[cfg(target_arch = "x86_64")]
    if has_vectors() {
        // SAFETY: the features were just detected.
        unsafe { avx512::decode(widths, data, sums) };
        return Ok(());
    }
    decode_with(widths, data, sums, read_plain);
    Ok(())
}

/// The mean gradients of finished sums.
pub fn finish(sums: &[i64], means: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if has_vectors() {
        // SAFETY: the features were just detected.
        return unsafe { avx512::finish(sums, means) };
    }
    finish_each(sums, means);
}

/// Which way of moving bytes this machine has. All give the same bits.
fn has_vectors() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        let long = has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl");
        long && has!("avx512vbmi")
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Needs `bytes` as long as [`encoded_limit`] says; returns how many of them it used.
#[inline(always)]
fn encode_with(
    sums: &[i64],
    bytes: &mut [u8],
    mut write: impl FnMut(&[i64], usize, &mut [u8]),
) -> usize {
    let (widths, data) = bytes.split_at_mut(sums.len().div_ceil(GROUP));
    let mut length = 0;
    for (group, width_byte) in sums.chunks(GROUP).zip(&mut *widths) {
        let width = width_of(group);
        *width_byte = width as u8;
        write(group, width, &mut data[length..][..width * group.len()]);
        length += width * group.len();
    }
    widths.len() + length
}

/// The widths have been checked against the length of `data`.
#[inline(always)]
fn decode_with(
    widths: &[u8],
    mut data: &[u8],
    sums: &mut [i64],
    mut read: impl FnMut(&[u8], usize, &mut [i64]),
) {
    for (group, width) in sums.chunks_mut(GROUP).zip(widths) {
        let (bytes, rest) = data.split_at(usize::from(*width) * group.len());
        data = rest;
        read(bytes, usize::from(*width), group);
    }
}

fn write_plain(group: &[i64], width: usize, place: &mut [u8]) {
    for (sum, bytes) in group.iter().zip(place.chunks_exact_mut(width.max(1))) {
        bytes.copy_from_slice(&sum.to_le_bytes()[..width]);
    }
}

fn read_plain(bytes: &[u8], width: usize, group: &mut [i64]) {
    if width == 0 {
        return group.fill(0);
    }
    for (sum, bytes) in group.iter_mut().zip(bytes.chunks_exact(width)) {
        let mut word = [0; 8];
        word[8 - width..].copy_from_slice(bytes);
        *sum = i64::from_le_bytes(word) >> (64 - 8 * width);
    }
}

#[inline(always)]
fn finish_each(sums: &[i64], means: &mut [f32]) {
    for (mean, sum) in means.iter_mut().zip(sums) {
        *mean = dequantize(*sum);
    }
}

/// Bytes that hold each of `group` with its sign.
#[inline(always)]
fn width_of(group: &[i64]) -> usize {
    // Flipping the bits of negative ones leaves only those that count.
    let used = group.iter().fold(0, |used, sum| used | (sum ^ (sum >> 63)));
    match used {
        0 if group.iter().all(|sum| *sum == 0) => 0,
        _ => (65 - used.leading_zeros() as usize).div_ceil(8),
    }
}

/// Eight sums at a time, their bytes moved by one permutation.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{decode_with, encode_with, finish_each};

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
    pub fn encode(sums: &[i64], bytes: &mut [u8]) -> usize {
        encode_with(sums, bytes, |group, width, place| {
            let order = load(&NARROW[width]);
            let groups = group.chunks(8).zip(place.chunks_mut((8 * width).max(1)));
            for (sums, place) in groups {
                // SAFETY: the features as above; the masks keep both within their slices.
                unsafe {
                    let wide = _mm512_maskz_loadu_epi64(low_bits(sums.len()) as u8, sums.as_ptr());
                    let narrow = _mm512_permutexvar_epi8(order, wide);
                    _mm512_mask_storeu_epi8(
                        place.as_mut_ptr().cast(),
                        low_bits(place.len()),
                        narrow,
                    );
                }
            }
        })
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
    pub fn decode(widths: &[u8], data: &[u8], sums: &mut [i64]) {
        decode_with(widths, data, sums, |bytes, width, group| {
            if width == 0 {
                return group.fill(0);
            }
            // To the upper end of each word; a shift brings them down with their sign.
            let (order, used) = (load(&WIDE[width]), upper_bytes(width));
            let shift = _mm512_set1_epi64(8 * (8 - width as i64));
            for (sums, bytes) in group.chunks_mut(8).zip(bytes.chunks(8 * width)) {
                // SAFETY: the features as above; the masks keep both within their slices.
                unsafe {
                    let narrow =
                        _mm512_maskz_loadu_epi8(low_bits(bytes.len()), bytes.as_ptr().cast());
                    let wide = _mm512_maskz_permutexvar_epi8(used, order, narrow);
                    let wide = _mm512_srav_epi64(wide, shift);
                    _mm512_mask_storeu_epi64(sums.as_mut_ptr(), low_bits(sums.len()) as u8, wide);
                }
            }
        });
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
    pub fn finish(sums: &[i64], means: &mut [f32]) {
        finish_each(sums, means);
    }

    /// Where each of 64 bytes comes from, by width.
    type Orders = [[u8; 64]; 9];

    const NARROW: Orders = {
        let mut orders = [[0; 64]; 9];
        let mut width = 1;
        while width <= 8 {
            let mut byte = 0;
            while byte < 8 * width {
                orders[width][byte] = (byte / width * 8 + byte % width) as u8;
                byte += 1;
            }
            width += 1;
        }
        orders
    };

    const WIDE: Orders = {
        let mut orders = [[0; 64]; 9];
        let mut width = 1;
        while width <= 8 {
            let mut byte = 0;
            while byte < 64 {
                let unused = 8 - width;
                if byte % 8 >= unused {
                    orders[width][byte] = (byte / 8 * width + byte % 8 - unused) as u8;
                }
                byte += 1;
            }
            width += 1;
        }
        orders
    };

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn load(order: &[u8; 64]) -> __m512i {
        // SAFETY: 64 bytes are there to be read.
        unsafe { _mm512_loadu_si512(order.as_ptr().cast()) }
    }

    fn low_bits(count: usize) -> u64 {
        match count {
            64.. => u64::MAX,
            _ => (1 << count) - 1,
        }
    }

    /// Of each of eight words.
    fn upper_bytes(count: usize) -> u64 {
        let word = 0xff << (8 - count) & 0xff;
        word * 0x0101_0101_0101_0101
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use common::rng::CounterRng;

    use super::*;

    fn round_trip(sums: &[i64]) -> Vec<u8> {
        let mut bytes = vec![9; 3];
        encode(sums, &mut bytes);
        assert!(bytes.len() <= encoded_limit(sums.len()));
        let mut back = vec![7; sums.len()];
        decode(&bytes, &mut back).unwrap();
        assert_eq!(back, sums);
        bytes
    }

    #[test]
    fn every_value_comes_back() {
        assert!(round_trip(&[]).is_empty());
        for bits in 0..64 {
            let power = 1i64 << bits;
            for value in [power, power.wrapping_sub(1), !power, power.wrapping_neg()] {
                round_trip(&[value]);
                round_trip(&[value, 0, -1]);
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
    fn any_mixture_comes_back() {
        let mut rng = CounterRng::new(3, &[]);
        for length in [1, 127, 128, 129, 1000] {
            let mut value = || (rng.next_u64() as i64) >> rng.below(64);
            let sums: Vec<i64> = (0..length).map(|_| value()).collect();
            round_trip(&sums);
        }
    }

    #[test]
    fn every_processor_gives_the_same_bytes() {
        let mut rng = CounterRng::new(4, &[]);
        for length in [1, 7, 8, 131, 999] {
            for shift in 0..64 {
                let sums: Vec<i64> = (0..length)
                    .map(|_| rng.next_u64() as i64 >> shift)
                    .collect();
                let bytes = round_trip(&sums);
                let mut plain = vec![0; encoded_limit(length)];
                let used = encode_with(&sums, &mut plain, write_plain);
                assert_eq!(plain[..used], bytes);
                let (widths, data) = bytes.split_at(length.div_ceil(GROUP));
                let mut back = vec![7; length];
                decode_with(widths, data, &mut back, read_plain);
                assert_eq!(back, sums);
            }
        }
    }

    #[test]
    fn what_is_no_encoding_is_refused() {
        let mut sums = vec![0; 200];
        let mut bytes = Vec::new();
        encode(&[300; 200], &mut bytes);
        assert!(decode(&bytes, &mut sums).is_ok());
        for wrong in [&bytes[..0], &bytes[..1], &bytes[..bytes.len() - 1]] {
            assert!(decode(wrong, &mut sums).is_err());
        }
        bytes.push(0);
        assert!(decode(&bytes, &mut sums).is_err());
        let too_wide = [vec![9, 0], vec![0; 9 * 128]].concat();
        assert!(decode(&too_wide, &mut sums).is_err());
    }
}
