//! Products with AVX-512: float32, and bfloat16 with the instructions for it (`avx512_bf16`), where a pair of factors adds two
//! products to a float32 sum.

mod nf4;
mod pack;

use std::arch::x86_64::*;

use super::block::Block;
use super::instructions::{Instructions, Packed};
use super::tile::{PANEL, Vector, tiles};
use crate::engine::ops::element::Element;
use crate::engine::ops::matrix::{Along, View};
use crate::engine::ops::nf4::Nf4View;

/// Float32 elements of a vector.
const LANES: usize = 16;

/// The mask of the first `count` lanes.
fn lanes(count: usize) -> __mmask16 {
    ((1u32 << count.min(LANES)) - 1) as __mmask16
}

/// Without the instructions for bfloat16.
pub(super) struct Avx512;

/// With them.
pub(super) struct Avx512Bf16;

impl Instructions for Avx512 {
    const STRIP: usize = PANEL;
    const HAS_PAIRS: bool = false;

    unsafe fn pack<E: Element>(w: &View<E>, along: Along, packed: Packed) {
        // SAFETY: the caller's word.
        unsafe { pack::pack(w, along, packed) }
    }

    unsafe fn widen<E: Element>(w: &Nf4View, row: usize, start: usize, out: &mut [E]) {
        // SAFETY: the processor has the instructions by the caller's word, and `out` is as long as it is.
        unsafe { nf4::widen(w, row, start, out.len(), out.as_mut_ptr()) }
    }

    unsafe fn multiply(rows: usize, block: Block) {
        // SAFETY: the caller's word.
        unsafe { multiply_f32(rows, block) }
    }
}

impl Instructions for Avx512Bf16 {
    const STRIP: usize = PANEL;
    const HAS_PAIRS: bool = true;

    unsafe fn pack<E: Element>(w: &View<E>, along: Along, packed: Packed) {
        // SAFETY: the caller's word.
        unsafe { Avx512::pack(w, along, packed) }
    }

    unsafe fn widen<E: Element>(w: &Nf4View, row: usize, start: usize, out: &mut [E]) {
        // SAFETY: the caller's word.
        unsafe { Avx512::widen(w, row, start, out) }
    }

    unsafe fn multiply(rows: usize, block: Block) {
        // SAFETY: the caller's word.
        unsafe { multiply_f32(rows, block) }
    }

    unsafe fn multiply_pairs(rows: usize, block: Block) {
        // SAFETY: the caller's word.
        unsafe { multiply_bf16(rows, block) }
    }
}

/// # Safety
/// As [`tiles`].
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn multiply_f32(rows: usize, block: Block) {
    // SAFETY: the caller's word.
    unsafe { strip::<Single>(rows, block) }
}

/// # Safety
/// As [`tiles`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn multiply_bf16(rows: usize, block: Block) {
    // SAFETY: the caller's word.
    unsafe { strip::<Pairs>(rows, block) }
}

/// # Safety
/// As [`tiles`].
#[inline(always)]
unsafe fn strip<V: Vector>(rows: usize, block: Block) {
    // SAFETY: the caller's word.
    unsafe {
        match block.columns.div_ceil(LANES) {
            1 => tiles::<V, PANEL, 1, 12>(rows, block),
            2 => tiles::<V, PANEL, 2, 8>(rows, block),
            3 => tiles::<V, PANEL, 3, 8>(rows, block),
            _ => tiles::<V, PANEL, 4, 6>(rows, block),
        }
    }
}

/// Words of one float32.
struct Single;

/// Words of two bfloat16.
struct Pairs;

impl Vector for Single {
    const LANES: usize = LANES;
    type Sums = __m512;
    type Words = __m512;
    type Word = __m512;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: by the caller's word.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32, count: usize) -> __m512 {
        // SAFETY: by the caller's word; the mask keeps to what is there.
        unsafe { _mm512_maskz_loadu_ps(lanes(count), from) }
    }

    #[inline(always)]
    unsafe fn store(sums: __m512, to: *mut f32, count: usize) {
        // SAFETY: as `load`.
        unsafe { _mm512_mask_storeu_ps(to, lanes(count), sums) }
    }

    #[inline(always)]
    unsafe fn store_bf16(sums: __m512, to: *mut u16, count: usize) {
        // SAFETY: as `load`.
        unsafe { _mm256_mask_storeu_epi16(to.cast(), lanes(count), rounded(sums)) }
    }

    #[inline(always)]
    unsafe fn words(from: *const u32) -> __m512 {
        // SAFETY: by the caller's word.
        unsafe { _mm512_loadu_ps(from.cast()) }
    }

    #[inline(always)]
    unsafe fn word(from: *const u8) -> __m512 {
        // SAFETY: by the caller's word.
        unsafe { _mm512_set1_ps(from.cast::<f32>().read_unaligned()) }
    }

    #[inline(always)]
    unsafe fn step(sums: __m512, word: __m512, words: __m512) -> __m512 {
        // SAFETY: by the caller's word.
        unsafe { _mm512_fmadd_ps(word, words, sums) }
    }
}

impl Vector for Pairs {
    const LANES: usize = LANES;
    type Sums = __m512;
    type Words = __m512i;
    type Word = __m512i;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: by the caller's word.
        unsafe { Single::zero() }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32, count: usize) -> __m512 {
        // SAFETY: by the caller's word.
        unsafe { Single::load(from, count) }
    }

    #[inline(always)]
    unsafe fn store(sums: __m512, to: *mut f32, count: usize) {
        // SAFETY: by the caller's word.
        unsafe { Single::store(sums, to, count) }
    }

    #[inline(always)]
    unsafe fn store_bf16(sums: __m512, to: *mut u16, count: usize) {
        // SAFETY: by the caller's word.
        unsafe { Single::store_bf16(sums, to, count) }
    }

    #[inline(always)]
    unsafe fn words(from: *const u32) -> __m512i {
        // SAFETY: by the caller's word.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn word(from: *const u8) -> __m512i {
        // SAFETY: by the caller's word.
        unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) }
    }

    #[inline(always)]
    unsafe fn step(sums: __m512, word: __m512i, words: __m512i) -> __m512 {
        // SAFETY: by the caller's word.
        unsafe {
            let pairs = |x| std::mem::transmute::<__m512i, __m512bh>(x);
            _mm512_dpbf16_ps(sums, pairs(word), pairs(words))
        }
    }
}

/// Rounds to bfloat16, for processors without the instruction too.
///
/// # Safety
/// The processor has AVX-512.
#[inline(always)]
unsafe fn rounded(x: __m512) -> __m256i {
    // SAFETY: by the caller's word.
    unsafe {
        let bits = _mm512_castps_si512(x);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
        let nearest = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
        let quiet = _mm512_or_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(0x40));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
        _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(nearest, nan, quiet))
    }
}
