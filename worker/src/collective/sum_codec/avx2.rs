//! Encodes and decodes sums two at a time with AVX2: one shuffle moves the bytes.
//!
//! In and out: as for the plain loops of the module above, to the same bytes. Never decides a width.

use std::arch::x86_64::*;

use super::groups::{GROUP, decode_with, encode_with, finish_each, read_plain, write_plain};

/// Bytes of a vector, which holds two sums.
const VECTOR: usize = 16;

#[target_feature(enable = "avx2")]
pub fn encode(sums: &[i64], widths: &mut [u8], data: &mut [u8]) -> usize {
    encode_with(sums, widths, data, |group, width, room| {
        if !is_roomy(group.len(), width, room.len()) {
            return write_plain(group, width, room);
        }
        let order = load(&NARROW[width]);
        let (vectors, _) = group.as_chunks::<2>();
        for (index, sums) in vectors.iter().enumerate() {
            // SAFETY: there are 16 bytes of room, of which the next vector or the next group overwrites those that are not this one's.
            unsafe {
                let wide = _mm_loadu_si128(sums.as_ptr().cast());
                let place = room.as_mut_ptr().add(2 * width * index);
                _mm_storeu_si128(place.cast(), _mm_shuffle_epi8(wide, order));
            }
        }
    })
}

#[target_feature(enable = "avx2")]
pub fn decode<'a>(widths: &[u8], data: &'a [u8], sums: &mut [i64]) -> &'a [u8] {
    decode_with(widths, data, sums, |bytes, width, group| {
        if width == 0 || !is_roomy(group.len(), width, bytes.len()) {
            return read_plain(bytes, width, group);
        }
        let order = load(&WIDE[width]);
        // There is no shift of 64 bits that keeps the sign.
        let sign = _mm_set1_epi64x((1u64 << (8 * width - 1)) as i64);
        let (vectors, _) = group.as_chunks_mut::<2>();
        for (index, sums) in vectors.iter_mut().enumerate() {
            // SAFETY: there are 16 bytes that can be read.
            unsafe {
                let place = bytes.as_ptr().add(2 * width * index);
                let narrow = _mm_loadu_si128(place.cast());
                let wide = _mm_xor_si128(_mm_shuffle_epi8(narrow, order), sign);
                _mm_storeu_si128(sums.as_mut_ptr().cast(), _mm_sub_epi64(wide, sign));
            }
        }
    })
}

/// Returns whether a group is whole and has 16 bytes from the place of each of its vectors on.
#[inline]
fn is_roomy(sums: usize, width: usize, bytes: usize) -> bool {
    sums == GROUP && bytes >= (GROUP - 2) * width + VECTOR
}

#[target_feature(enable = "avx2")]
pub fn finish(sums: &[i64], means: &mut [f32]) {
    finish_each(sums, means);
}

/// For each width, where each of 16 bytes comes from; none where the upper bit is set.
type Orders = [[u8; VECTOR]; 9];

const NONE: u8 = 0x80;

const NARROW: Orders = {
    let mut orders = [[NONE; VECTOR]; 9];
    let mut width = 1;
    while width <= 8 {
        let mut byte = 0;
        while byte < 2 * width {
            orders[width][byte] = (byte / width * 8 + byte % width) as u8;
            byte += 1;
        }
        width += 1;
    }
    orders
};

const WIDE: Orders = {
    let mut orders = [[NONE; VECTOR]; 9];
    let mut width = 1;
    while width <= 8 {
        let mut byte = 0;
        while byte < 2 * width {
            orders[width][byte / width * 8 + byte % width] = byte as u8;
            byte += 1;
        }
        width += 1;
    }
    orders
};

#[inline]
#[target_feature(enable = "avx2")]
fn load(order: &[u8; VECTOR]) -> __m128i {
    // SAFETY: 16 bytes are there to be read.
    unsafe { _mm_loadu_si128(order.as_ptr().cast()) }
}
