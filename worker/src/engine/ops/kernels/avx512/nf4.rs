//! Widens weights of 4 bits with AVX-512: a block's sixteen scaled levels stand in one register, and codes pick from it.

use std::arch::x86_64::*;

use super::{LANES, lanes, rounded};
use crate::engine::ops::element::Element;
use crate::engine::ops::nf4::{Nf4View, Run};

/// Writes `len` columns of a row from `start` on to `out`, as [`Nf4View::widen`] does.
///
/// # Safety
/// The processor has the features, and `out` has room for so many elements.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn widen<E: Element>(
    view: &Nf4View,
    row: usize,
    start: usize,
    len: usize,
    out: *mut E,
) {
    // SAFETY: a matrix has sixteen levels.
    let levels = unsafe { _mm512_loadu_ps(view.matrix.levels().as_ptr()) };
    for run in view.runs(row, start, len) {
        // SAFETY: a run lies within the row, whose codes are there, and within what was asked for.
        unsafe {
            let scaled = _mm512_mul_ps(levels, _mm512_set1_ps(view.matrix.scale(run.block)));
            let out = out.add(run.at);
            match size_of::<E>() == size_of::<f32>() {
                true => widen_f32(view.matrix.codes(), run, scaled, out.cast()),
                false => widen_bf16(view.matrix.codes(), run, scaled, out.cast()),
            }
        }
    }
}

/// # Safety
/// The run's codes are there, and `out` has room for it.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn widen_f32(codes: &[u8], run: Run, levels: __m512, out: *mut f32) {
    let (mut scalar, end) = (run.first, run.first + run.len);
    let mut out = out;
    // SAFETY: masks keep to the bytes and elements that exist.
    unsafe {
        if scalar % 2 == 1 {
            let code = _mm512_set1_epi32(i32::from(codes[scalar / 2] & 15));
            _mm512_mask_storeu_ps(out, 1, _mm512_permutexvar_ps(code, levels));
            (scalar, out) = (scalar + 1, out.add(1));
        }
        while scalar < end {
            let count = LANES.min(end - scalar);
            let bytes = _mm_maskz_loadu_epi8(
                ((1u32 << count.div_ceil(2)) - 1) as __mmask16,
                codes.as_ptr().add(scalar / 2).cast(),
            );
            let pairs = _mm512_cvtepu8_epi64(bytes);
            let upper = _mm512_srli_epi64::<4>(pairs);
            let lower = _mm512_slli_epi64::<32>(_mm512_and_si512(pairs, _mm512_set1_epi64(15)));
            let values = _mm512_permutexvar_ps(_mm512_or_si512(upper, lower), levels);
            _mm512_mask_storeu_ps(out, lanes(count), values);
            (scalar, out) = (scalar + count, out.add(count));
        }
    }
}

/// # Safety
/// As [`widen_f32`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn widen_bf16(codes: &[u8], run: Run, levels: __m512, out: *mut u16) {
    const HALVES: usize = 2 * LANES;
    let (mut scalar, end) = (run.first, run.first + run.len);
    let mut out = out;
    // SAFETY: masks keep to the bytes and elements that exist.
    unsafe {
        let levels = _mm512_broadcast_i64x4(rounded(levels));
        if scalar % 2 == 1 {
            let code = _mm512_set1_epi16(i16::from(codes[scalar / 2] & 15));
            _mm512_mask_storeu_epi16(out.cast(), 1, _mm512_permutexvar_epi16(code, levels));
            (scalar, out) = (scalar + 1, out.add(1));
        }
        while scalar < end {
            let count = HALVES.min(end - scalar);
            let bytes = _mm_maskz_loadu_epi8(
                ((1u32 << count.div_ceil(2)) - 1) as __mmask16,
                codes.as_ptr().add(scalar / 2).cast(),
            );
            let pairs = _mm512_cvtepu8_epi32(bytes);
            let upper = _mm512_srli_epi32::<4>(pairs);
            let lower = _mm512_slli_epi32::<16>(_mm512_and_si512(pairs, _mm512_set1_epi32(15)));
            let values = _mm512_permutexvar_epi16(_mm512_or_si512(upper, lower), levels);
            let mask = ((1u64 << count) - 1) as __mmask32;
            _mm512_mask_storeu_epi16(out.cast(), mask, values);
            (scalar, out) = (scalar + count, out.add(count));
        }
    }
}
