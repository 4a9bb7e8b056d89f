//! Products with AVX2 and FMA.

mod pack;

use std::arch::x86_64::*;

use super::block::Block;
use super::instructions::{Instructions, Packed};
use super::tile::{Vector, tiles};
use crate::engine::ops::element::Element;
use crate::engine::ops::matrix::{Along, View};
use crate::engine::ops::nf4::Nf4View;

/// Float32 elements of a vector.
const LANES: usize = 8;

/// Two vectors of columns and six rows leave four of sixteen registers for what is multiplied.
const STRIP: usize = 2 * LANES;

pub(super) struct Avx2;

impl Instructions for Avx2 {
    const STRIP: usize = STRIP;
    const HAS_PAIRS: bool = false;

    unsafe fn pack<E: Element>(w: &View<E>, along: Along, packed: Packed) {
        // SAFETY: the caller's word.
        unsafe { pack::pack(w.wide(), along, packed) }
    }

    unsafe fn widen<E: Element>(w: &Nf4View, row: usize, start: usize, out: &mut [E]) {
        w.widen(row, start, out);
    }

    unsafe fn multiply(rows: usize, block: Block) {
        // SAFETY: the caller's word.
        unsafe { multiply(rows, block) }
    }
}

/// # Safety
/// As [`tiles`].
#[inline(never)]
#[target_feature(enable = "avx2,fma")]
unsafe fn multiply(rows: usize, block: Block) {
    // SAFETY: the caller's word.
    unsafe {
        match block.columns.div_ceil(LANES) {
            1 => tiles::<Eight, STRIP, 1, 12>(rows, block),
            _ => tiles::<Eight, STRIP, 2, 6>(rows, block),
        }
    }
}

/// The mask of the first `count` lanes.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn lanes(count: usize) -> __m256i {
    // SAFETY: by the caller's word.
    unsafe {
        let numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_cmpgt_epi32(_mm256_set1_epi32(count.min(LANES) as i32), numbers)
    }
}

/// Words of one float32.
struct Eight;

impl Vector for Eight {
    const LANES: usize = LANES;
    type Sums = __m256;
    type Words = __m256;
    type Word = __m256;

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        // SAFETY: by the caller's word.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32, count: usize) -> __m256 {
        // SAFETY: by the caller's word; the mask keeps to what is there.
        unsafe {
            match count >= LANES {
                true => _mm256_loadu_ps(from),
                false => _mm256_maskload_ps(from, lanes(count)),
            }
        }
    }

    #[inline(always)]
    unsafe fn store(sums: __m256, to: *mut f32, count: usize) {
        // SAFETY: as `load`.
        unsafe {
            match count >= LANES {
                true => _mm256_storeu_ps(to, sums),
                false => _mm256_maskstore_ps(to, lanes(count), sums),
            }
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(sums: __m256, to: *mut u16, count: usize) {
        // SAFETY: as `load`.
        unsafe {
            let rounded = rounded(sums);
            if count >= LANES {
                return _mm_storeu_si128(to.cast(), rounded);
            }
            let mut all = [0u16; LANES];
            _mm_storeu_si128(all.as_mut_ptr().cast(), rounded);
            to.copy_from_nonoverlapping(all.as_ptr(), count);
        }
    }

    #[inline(always)]
    unsafe fn words(from: *const u32) -> __m256 {
        // SAFETY: by the caller's word.
        unsafe { _mm256_loadu_ps(from.cast()) }
    }

    #[inline(always)]
    unsafe fn word(from: *const u8) -> __m256 {
        // SAFETY: by the caller's word.
        unsafe { _mm256_set1_ps(from.cast::<f32>().read_unaligned()) }
    }

    #[inline(always)]
    unsafe fn step(sums: __m256, word: __m256, words: __m256) -> __m256 {
        // SAFETY: by the caller's word.
        unsafe { _mm256_fmadd_ps(word, words, sums) }
    }
}

/// Rounds to bfloat16.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn rounded(x: __m256) -> __m128i {
    // SAFETY: by the caller's word.
    unsafe {
        let bits = _mm256_castps_si256(x);
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
        let nearest = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half));
        let quiet = _mm256_or_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(0x40));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
        let rounded = _mm256_blendv_epi8(nearest, quiet, nan);
        let halves = _mm256_packus_epi32(rounded, rounded);
        _mm256_castsi256_si128(_mm256_permute4x64_epi64::<0b1000>(halves))
    }
}
