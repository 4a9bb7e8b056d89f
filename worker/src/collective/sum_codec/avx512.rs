//! Encodes and decodes sums eight at a time with AVX-512: one permutation moves the bytes.
//!
//! In and out: as for the plain loops of the module above, to the same bytes. Never decides a width.

use std::arch::x86_64::*;

use super::groups::{GROUP, decode_with, encode_with, finish_each};

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
pub fn encode(sums: &[i64], widths: &mut [u8], data: &mut [u8]) -> usize {
    encode_with(sums, widths, data, |group, width, room| {
        let order = load(&NARROW[width]);
        if is_roomy(group.len(), width, room.len()) {
            let (vectors, _) = group.as_chunks::<8>();
            for (index, sums) in vectors.iter().enumerate() {
                // SAFETY: the features as above. There are 64 bytes of room, of which the next vector or the next group
                // overwrites those that are not this one's.
                unsafe {
                    let wide = _mm512_loadu_si512(sums.as_ptr().cast());
                    let narrow = _mm512_permutexvar_epi8(order, wide);
                    let place = room.as_mut_ptr().add(8 * width * index);
                    _mm512_storeu_si512(place.cast(), narrow);
                }
            }
            return;
        }
        for (index, sums) in group.chunks(8).enumerate() {
            let place = &mut room[8 * width * index..];
            let (present, used) = (low_bits(sums.len()) as u8, low_bits(sums.len() * width));
            // SAFETY: the features as above. The masks keep to the group, for which there is room.
            unsafe {
                let wide = _mm512_maskz_loadu_epi64(present, sums.as_ptr());
                let narrow = _mm512_permutexvar_epi8(order, wide);
                _mm512_mask_storeu_epi8(place.as_mut_ptr().cast(), used, narrow);
            }
        }
    })
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
pub fn decode<'a>(widths: &[u8], data: &'a [u8], sums: &mut [i64]) -> &'a [u8] {
    decode_with(widths, data, sums, |bytes, width, group| {
        // To the upper end of each word; a shift brings them down with their sign.
        let (order, used) = (load(&WIDE[width]), upper_bytes(width));
        let shift = _mm512_set1_epi64(8 * (8 - width as i64));
        if is_roomy(group.len(), width, bytes.len()) {
            let (vectors, _) = group.as_chunks_mut::<8>();
            for (index, sums) in vectors.iter_mut().enumerate() {
                // SAFETY: the features as above, and 64 bytes that can be read.
                unsafe {
                    let place = bytes.as_ptr().add(8 * width * index);
                    let narrow = _mm512_loadu_si512(place.cast());
                    let wide = _mm512_maskz_permutexvar_epi8(used, order, narrow);
                    let wide = _mm512_srav_epi64(wide, shift);
                    _mm512_storeu_si512(sums.as_mut_ptr().cast(), wide);
                }
            }
            return;
        }
        for (index, sums) in group.chunks_mut(8).enumerate() {
            let bytes = &bytes[8 * width * index..];
            let (present, there) = (low_bits(sums.len()) as u8, low_bits(sums.len() * width));
            // SAFETY: the features as above. The masks keep to the group, whose bytes are there.
            unsafe {
                let narrow = _mm512_maskz_loadu_epi8(there, bytes.as_ptr().cast());
                let wide = _mm512_maskz_permutexvar_epi8(used, order, narrow);
                let wide = _mm512_srav_epi64(wide, shift);
                _mm512_mask_storeu_epi64(sums.as_mut_ptr(), present, wide);
            }
        }
    })
}

/// Returns whether a group is whole and has 64 bytes from the place of each of its vectors on.
#[inline]
fn is_roomy(sums: usize, width: usize, bytes: usize) -> bool {
    sums == GROUP && bytes >= (GROUP - 8) * width + 64
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
pub fn finish(sums: &[i64], means: &mut [f32]) {
    finish_each(sums, means);
}

/// For each width, where each of 64 bytes comes from.
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

/// Mask of the `count` upper bytes of each of eight words.
fn upper_bytes(count: usize) -> u64 {
    let word = 0xff << (8 - count) & 0xff;
    word * 0x0101_0101_0101_0101
}
