//! Packs weights of float32 into a panel, as the kernel reads them, whichever side the sum runs along.

use std::arch::x86_64::*;

use super::{LANES, STRIP, lanes};
use crate::engine::ops::kernels::instructions::Packed;
use crate::engine::ops::matrix::{Along, View};

/// Packs an area of the weights; what lies outside them, up to the next vector, is zero.
///
/// # Safety
/// The processor has AVX2, the area is within the weights, and the panel has room for it.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn pack(w: View<f32>, along: Along, packed: Packed) {
    let Packed {
        first,
        columns,
        start,
        count,
        panel,
    } = packed;
    // SAFETY: offsets stay within the weights and the panel by the caller's word.
    unsafe {
        let panel: *mut f32 = panel.cast();
        for group in (0..columns).step_by(LANES) {
            let lines = panel.add(group);
            let here = LANES.min(columns - group);
            match along {
                Along::Columns => {
                    let from = w.data.as_ptr().add((first + group) * w.stride + start);
                    for word in (0..count).step_by(LANES) {
                        let words = LANES.min(count - word);
                        let to = lines.add(word * STRIP);
                        transpose(from.add(word), w.stride, [here, words], to);
                    }
                }
                Along::Rows => {
                    let from = w.data.as_ptr().add(start * w.stride + first + group);
                    for word in 0..count {
                        let row = _mm256_maskload_ps(from.add(word * w.stride), lanes(here));
                        _mm256_storeu_ps(lines.add(word * STRIP), row);
                    }
                }
            }
        }
    }
}

/// `to[j * STRIP + i]` becomes word j of row i, for up to 8 rows and words; what is missing of the rows is zero.
///
/// # Safety
/// The rows and the lines are there.
#[target_feature(enable = "avx2")]
unsafe fn transpose(from: *const f32, stride: usize, [rows, words]: [usize; 2], to: *mut f32) {
    // SAFETY: masked loads touch nothing outside the rows.
    unsafe {
        let mask = lanes(words);
        let mut r = [_mm256_setzero_ps(); LANES];
        for (i, r) in r.iter_mut().enumerate().take(rows) {
            *r = _mm256_maskload_ps(from.add(i * stride), mask);
        }
        let mut t = r;
        for i in 0..4 {
            t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        for i in 0..2 {
            r[4 * i] = _mm256_shuffle_ps::<0x44>(t[4 * i], t[4 * i + 2]);
            r[4 * i + 1] = _mm256_shuffle_ps::<0xee>(t[4 * i], t[4 * i + 2]);
            r[4 * i + 2] = _mm256_shuffle_ps::<0x44>(t[4 * i + 1], t[4 * i + 3]);
            r[4 * i + 3] = _mm256_shuffle_ps::<0xee>(t[4 * i + 1], t[4 * i + 3]);
        }
        for i in 0..4 {
            t[i] = _mm256_permute2f128_ps::<0x20>(r[i], r[i + 4]);
            t[i + 4] = _mm256_permute2f128_ps::<0x31>(r[i], r[i + 4]);
        }
        for (j, t) in t.iter().enumerate().take(words) {
            _mm256_storeu_ps(to.add(j * STRIP), *t);
        }
    }
}
