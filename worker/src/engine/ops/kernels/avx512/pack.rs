//! Packs weights into a panel: `panel[word][column]`, as the kernel reads them, whichever side the sum runs along.

use std::arch::x86_64::*;

use super::{LANES, lanes};
use crate::engine::ops::element::Element;
use crate::engine::ops::kernels::instructions::Packed;
use crate::engine::ops::kernels::tile::PANEL;
use crate::engine::ops::matrix::{Along, View};

/// Packs an area of the weights into `panel[word][column]`; what lies outside the weights, up to the next vector, is zero.
///
/// # Safety
/// The processor has the features, and the area is within the weights.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn pack<E: Element>(w: &View<E>, along: Along, packed: Packed) {
    let Packed {
        first,
        columns,
        start,
        count,
        panel,
    } = packed;
    let per_word = size_of::<u32>() / size_of::<E>();
    let start = start * per_word;
    // SAFETY: offsets stay within the weights by the caller's word.
    unsafe {
        match (along, per_word) {
            (Along::Columns, _) => {
                let from = w.data.as_ptr().add(first * w.stride + start);
                let len = (w.columns - start).min(count * per_word);
                let source = Source {
                    data: from.cast(),
                    stride: w.stride * size_of::<E>(),
                };
                pack_transposed(source, columns, len * size_of::<E>(), panel);
            }
            (Along::Rows, 1) => {
                let from = w.data.as_ptr().add(start * w.stride + first);
                pack_rows(from.cast(), w.stride, columns, count, panel);
            }
            (Along::Rows, _) => {
                let from = w.data.as_ptr().add(start * w.stride + first);
                let rows = (w.rows - start).min(2 * count);
                pack_pairs(from.cast(), w.stride, columns, rows, panel);
            }
        }
    }
}

/// Rows that become columns: where they begin, and the bytes from one to the next.
#[derive(Clone, Copy)]
struct Source {
    data: *const u8,
    stride: usize,
}

/// # Safety
/// `rows` rows of `bytes` bytes are readable, and the panel has room for them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack_transposed(source: Source, rows: usize, bytes: usize, panel: *mut u32) {
    const TILE_BYTES: usize = LANES * size_of::<u32>();
    for group in (0..rows).step_by(LANES) {
        let count = LANES.min(rows - group);
        for start in (0..bytes).step_by(TILE_BYTES) {
            let len = TILE_BYTES.min(bytes - start);
            // SAFETY: rows and bytes lie within the source; 16 words of each line within the panel.
            unsafe {
                let tile = Source {
                    data: source.data.add(group * source.stride + start),
                    ..source
                };
                let to = panel.add(start / size_of::<u32>() * PANEL + group);
                let words = len.div_ceil(size_of::<u32>());
                transpose(tile, count, len / size_of::<u16>(), words, to);
            }
        }
    }
}

/// `to[j * PANEL + i]` becomes word j of row i, for 16 rows and words; what is missing is zero. `halves` are the 16-bit
/// units to read of a row.
///
/// # Safety
/// The rows and the lines are valid.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn transpose(source: Source, rows: usize, halves: usize, words: usize, to: *mut u32) {
    let mask = ((1u64 << halves) - 1) as __mmask32;
    // SAFETY: masked loads touch nothing outside the rows.
    unsafe {
        let mut r = [_mm512_setzero_si512(); LANES];
        for (i, r) in r.iter_mut().enumerate().take(rows) {
            *r = _mm512_maskz_loadu_epi16(mask, source.data.add(i * source.stride).cast());
        }
        let mut t = r;
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        for i in 0..4 {
            r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
            r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
            r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
        }
        for i in 0..4 {
            t[i] = _mm512_shuffle_i32x4::<0x88>(r[i], r[i + 4]);
            t[i + 4] = _mm512_shuffle_i32x4::<0xdd>(r[i], r[i + 4]);
            t[i + 8] = _mm512_shuffle_i32x4::<0x88>(r[i + 8], r[i + 12]);
            t[i + 12] = _mm512_shuffle_i32x4::<0xdd>(r[i + 8], r[i + 12]);
        }
        for i in 0..8 {
            r[i] = _mm512_shuffle_i32x4::<0x88>(t[i], t[i + 8]);
            r[i + 8] = _mm512_shuffle_i32x4::<0xdd>(t[i], t[i + 8]);
        }
        for (j, r) in r.iter().enumerate().take(words) {
            _mm512_storeu_si512(to.add(j * PANEL).cast(), *r);
        }
    }
}

/// Copies rows of float32, which lie as the panel wants them.
///
/// # Safety
/// `count` rows of `columns` words are readable, `stride` words apart, and the panel has room for them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack_rows(
    from: *const u32,
    stride: usize,
    columns: usize,
    count: usize,
    panel: *mut u32,
) {
    for word in 0..count {
        for group in (0..columns).step_by(LANES) {
            let mask = lanes(columns - group);
            // SAFETY: the mask keeps to the columns that exist.
            unsafe {
                let row = from.add(word * stride + group);
                let values = _mm512_maskz_loadu_epi32(mask, row.cast());
                _mm512_storeu_si512(panel.add(word * PANEL + group).cast(), values);
            }
        }
    }
}

/// Interleaves rows of bfloat16 two by two, so that each pair is a word. A missing last row is zero.
///
/// # Safety
/// `rows` rows of `columns` half words are readable, `stride` half words apart, and the panel has room for them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack_pairs(
    from: *const u16,
    stride: usize,
    columns: usize,
    rows: usize,
    panel: *mut u32,
) {
    for word in 0..rows.div_ceil(2) {
        let both = 2 * word + 1 < rows;
        for group in (0..columns).step_by(LANES) {
            let mask = lanes(columns - group);
            // SAFETY: the masks keep to the columns and rows that exist.
            unsafe {
                let row = from.add(2 * word * stride + group);
                let low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row.cast()));
                let next = row.wrapping_add(stride).cast();
                let high = _mm256_maskz_loadu_epi16(if both { mask } else { 0 }, next);
                let high = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high));
                let pair = _mm512_or_si512(low, high);
                _mm512_storeu_si512(panel.add(word * PANEL + group).cast(), pair);
            }
        }
    }
}
