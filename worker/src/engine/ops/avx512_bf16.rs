//! bfloat16 products on AVX-512 BF16: `vdpbf16ps` multiplies pairs along the sum and adds them in float32.
//!
//! In: activations in float32 (rounded here to bfloat16, nearest even), frozen weights in bfloat16 as they lie in
//! memory. Out: float32. The weights are packed a panel at a time into L1, so they never stand in memory twice.
//!
//! Order of additions: along the sum in blocks of `SUM_BLOCK`, pairs in order. Each output element belongs to one
//! tile and one thread, so its bits depend neither on the thread count nor on the other rows.

use std::arch::x86_64::*;

use half::bf16;
use rayon::prelude::*;

use super::gemm::{Matrix, MatrixMut};

/// Output columns of a panel: four vectors of 16 float32.
const PANEL: usize = 64;

/// Output rows of a tile: 6 x 4 accumulators leave registers for one panel row and one broadcast.
const TILE_ROWS: usize = 6;

/// Elements of the sum per packed panel: 64 x 256 bfloat16 are 32 KiB, which stay in L1.
const SUM_BLOCK: usize = 256;

/// Pairs in a packed panel.
const PANEL_PAIRS: usize = SUM_BLOCK / 2 * PANEL;

/// Which side of the weights the sum runs along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Along {
    /// `out[m, rows] = a[m, columns] · wᵀ`: a linear layer's forward pass.
    Columns,
    /// `out[m, columns] = a[m, rows] · w`: its input gradient.
    Rows,
}

/// Weights `[rows, columns]`, row-major.
#[derive(Clone, Copy)]
pub struct Weights<'a> {
    pub data: &'a [bf16],
    pub rows: usize,
    pub columns: usize,
}

/// Whether this processor has the instructions.
pub fn is_supported() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512bf16")
}

/// Writes (or adds, with `accumulate`) the product of `a` and the weights to `out`, whose shapes must fit. `a` is
/// row-major and the processor one that [`is_supported`].
pub fn multiply(out: &mut MatrixMut, accumulate: bool, a: Matrix, weights: Weights, along: Along) {
    let (sum, width) = match along {
        Along::Columns => (weights.columns, weights.rows),
        Along::Rows => (weights.rows, weights.columns),
    };
    assert!(is_supported(), "a processor without AVX-512 BF16");
    assert!(
        weights.data.len() == sum * width && a.columns() == sum && out.columns_count() == width,
        "a product whose shapes do not fit"
    );
    assert_eq!(a.rows(), out.rows(), "a product whose rows do not fit");
    let rounded = round_rows(a);
    let stride = sum.div_ceil(2);
    let target = Target {
        out: out.as_mut_ptr(),
        stride: out.row_stride(),
        width,
    };
    (0..width.div_ceil(PANEL)).into_par_iter().for_each_init(
        || vec![0u32; PANEL_PAIRS],
        |panel, number| {
            let first = number * PANEL;
            for start in (0..sum).step_by(SUM_BLOCK) {
                let len = SUM_BLOCK.min(sum - start);
                // SAFETY: the features were checked above; the ranges lie inside `weights`, `rounded` and `out`, and
                // each panel writes only its own columns.
                unsafe {
                    pack(weights, along, first, start, len, panel);
                    let block = Block {
                        a: rounded.as_ptr().add(start / 2),
                        stride,
                        pairs: len.div_ceil(2),
                        panel: panel.as_ptr(),
                    };
                    multiply_panel(a.rows(), block, target, first, accumulate || start > 0);
                }
            }
        },
    );
}

/// The output; every panel has columns of its own.
#[derive(Clone, Copy)]
struct Target {
    out: *mut f32,
    stride: usize,
    width: usize,
}
// SAFETY: tasks write disjoint columns, see `multiply`.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

/// One block of the sum: pairs of `a` (rows `stride` pairs apart) and the packed panel.
#[derive(Clone, Copy)]
struct Block {
    a: *const u32,
    stride: usize,
    pairs: usize,
    panel: *const u32,
}

/// Rows rounded in one task.
const ROUND_ROWS: usize = 16;

/// Rounds to bfloat16 pairs, rows padded to an even length with zero.
fn round_rows(a: Matrix) -> Vec<u32> {
    let stride = a.columns().div_ceil(2);
    let mut pairs = vec![0u32; a.rows() * stride];
    pairs
        .par_chunks_mut((stride * ROUND_ROWS).max(1))
        .enumerate()
        .for_each(|(tile, pairs)| {
            for (row, pairs) in pairs.chunks_exact_mut(stride).enumerate() {
                // SAFETY: `multiply` checked the features.
                unsafe { round_row(a.row(tile * ROUND_ROWS + row), pairs) };
            }
        });
    pairs
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn round_row(row: &[f32], pairs: &mut [u32]) {
    let mut blocks = row.chunks_exact(32);
    let mut out = pairs.chunks_exact_mut(16);
    for (block, out) in blocks.by_ref().zip(out.by_ref()) {
        // SAFETY: 32 floats in, 16 pairs out.
        unsafe {
            let low = _mm512_loadu_ps(block.as_ptr());
            let high = _mm512_loadu_ps(block.as_ptr().add(16));
            let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(out.as_mut_ptr().cast(), both);
        }
    }
    let done = row.len() / 32 * 16;
    for (pair, two) in pairs[done..].iter_mut().zip(blocks.remainder().chunks(2)) {
        let bits = |i: usize| {
            two.get(i)
                .map_or(0, |x| u32::from(bf16::from_f32(*x).to_bits()))
        };
        *pair = bits(0) | bits(1) << 16;
    }
}

/// Packs columns `first..first + PANEL` of the output and `len` elements of the sum from `start` into
/// `panel[pair][column]`; what lies outside the weights is zero.
///
/// # Safety
/// The processor has the features, and `start + len` is within the sum.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pack(
    weights: Weights,
    along: Along,
    first: usize,
    start: usize,
    len: usize,
    panel: &mut [u32],
) {
    match along {
        Along::Columns => pack_rows(weights, first, start, len, panel),
        Along::Rows => pack_columns(weights, first, start, len, panel),
    }
}

/// Pairs lie side by side in a row of the weights: a transposition of 32-bit pairs, 16 x 16 at a time.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pack_rows(weights: Weights, first: usize, start: usize, len: usize, panel: &mut [u32]) {
    for group in 0..PANEL / 16 {
        let row = first + group * 16;
        let whole = if row + 16 <= weights.rows {
            len / 32
        } else {
            0
        };
        for tile in 0..whole {
            let from = row * weights.columns + start + tile * 32;
            // SAFETY: 16 rows of 32 elements lie inside the weights, 16 pairs of 16 columns inside the panel.
            unsafe {
                let source = weights.data.as_ptr().add(from).cast::<u32>();
                let target = panel.as_mut_ptr().add(tile * 16 * PANEL + group * 16);
                transpose_16x16(source, weights.columns, target);
            }
        }
        for pair in whole * 16..len.div_ceil(2) {
            for column in 0..16 {
                let at =
                    |i: usize| element(weights, row + column, start + pair * 2 + i, start + len);
                panel[pair * PANEL + group * 16 + column] = at(0) | at(1) << 16;
            }
        }
    }
}

fn element(weights: Weights, row: usize, column: usize, end: usize) -> u32 {
    match row < weights.rows && column < end {
        true => u32::from(weights.data[row * weights.columns + column].to_bits()),
        false => 0,
    }
}

/// `target[j * PANEL + i] = source[i, j]` for 16 x 16 words; `columns` is the row length of the source in half words.
///
/// # Safety
/// Both ranges are valid and the processor has AVX-512F.
#[target_feature(enable = "avx512f")]
unsafe fn transpose_16x16(source: *const u32, columns: usize, target: *mut u32) {
    // SAFETY: the caller vouches for both ranges.
    unsafe {
        let mut r = [_mm512_setzero_si512(); 16];
        for (i, r) in r.iter_mut().enumerate() {
            *r = _mm512_loadu_si512(source.cast::<u16>().add(i * columns).cast());
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
        for (j, r) in r.iter().enumerate() {
            _mm512_storeu_si512(target.add(j * PANEL).cast(), *r);
        }
    }
}

/// Pairs are two rows of the weights: interleaves them.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pack_columns(weights: Weights, first: usize, start: usize, len: usize, panel: &mut [u32]) {
    let width = PANEL.min(weights.columns - first);
    for pair in 0..len.div_ceil(2) {
        let row = (start + pair * 2) * weights.columns + first;
        let low = &weights.data[row..row + width];
        let out = &mut panel[pair * PANEL..(pair + 1) * PANEL];
        if pair * 2 + 1 < len {
            let high = &weights.data[row + weights.columns..row + weights.columns + width];
            for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
                *out = u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16;
            }
        } else {
            for (out, low) in out.iter_mut().zip(low) {
                *out = u32::from(low.to_bits());
            }
        }
        out[width..].fill(0);
    }
}

/// All rows of `a` against one packed panel.
///
/// # Safety
/// `block` has `m` rows, `target` has `m` rows of its width, and the processor has the features.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn multiply_panel(m: usize, block: Block, target: Target, first: usize, add: bool) {
    let columns = PANEL.min(target.width - first);
    for row in (0..m).step_by(TILE_ROWS) {
        // SAFETY: the caller vouches for `m` rows on both sides.
        unsafe {
            let block = Block {
                a: block.a.add(row * block.stride),
                ..block
            };
            let out = target.out.add(row * target.stride + first);
            match m - row {
                1 => tile::<1>(block, out, target.stride, columns, add),
                2 => tile::<2>(block, out, target.stride, columns, add),
                3 => tile::<3>(block, out, target.stride, columns, add),
                4 => tile::<4>(block, out, target.stride, columns, add),
                5 => tile::<5>(block, out, target.stride, columns, add),
                _ => tile::<6>(block, out, target.stride, columns, add),
            }
        }
    }
}

/// One tile of `ROWS` x 64 outputs, of which `columns` exist.
///
/// # Safety
/// As [`multiply_panel`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn tile<const ROWS: usize>(
    block: Block,
    out: *mut f32,
    stride: usize,
    columns: usize,
    add: bool,
) {
    // SAFETY: the caller vouches for the rows; the masks keep to the columns that exist.
    unsafe {
        let masks: [__mmask16; 4] = std::array::from_fn(|j| {
            let left = columns.saturating_sub(j * 16).min(16);
            ((1u32 << left) - 1) as __mmask16
        });
        let mut sums = [[_mm512_setzero_ps(); 4]; ROWS];
        if add {
            for (i, sums) in sums.iter_mut().enumerate() {
                for (j, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_maskz_loadu_ps(masks[j], out.add(i * stride + j * 16));
                }
            }
        }
        for pair in 0..block.pairs {
            let row = block.panel.add(pair * PANEL);
            let w: [__m512bh; 4] = std::array::from_fn(|j| {
                std::mem::transmute(_mm512_loadu_si512(row.add(j * 16).cast()))
            });
            for (i, sums) in sums.iter_mut().enumerate() {
                let a: __m512bh = std::mem::transmute(_mm512_set1_epi32(
                    *block.a.add(i * block.stride + pair) as i32,
                ));
                for (sum, w) in sums.iter_mut().zip(w) {
                    *sum = _mm512_dpbf16_ps(*sum, a, w);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (j, sum) in sums.iter().enumerate() {
                _mm512_mask_storeu_ps(out.add(i * stride + j * 16), masks[j], *sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::rng::CounterRng;

    fn random(len: usize, key: u64) -> Vec<f32> {
        let mut rng = CounterRng::new(key, &[]);
        (0..len).map(|_| rng.normal() as f32).collect()
    }

    #[test]
    fn products_equal_the_sum_of_rounded_factors() {
        if !is_supported() {
            return;
        }
        for (m, rows, columns) in [(1, 1, 1), (7, 65, 33), (13, 130, 300), (5, 70, 257)] {
            let data: Vec<bf16> = random(rows * columns, 1)
                .into_iter()
                .map(bf16::from_f32)
                .collect();
            let weights = Weights {
                data: &data,
                rows,
                columns,
            };
            for along in [Along::Columns, Along::Rows] {
                let (sum, width) = match along {
                    Along::Columns => (columns, rows),
                    Along::Rows => (rows, columns),
                };
                let a = random(m * (sum + 3), 2);
                let mut out = vec![1.0; m * (width + 2)];
                multiply(
                    &mut MatrixMut::strided(&mut out, m, width, width + 2),
                    true,
                    Matrix::strided(&a, m, sum, sum + 3),
                    weights,
                    along,
                );
                for (i, row) in out.chunks_exact(width + 2).enumerate() {
                    for (j, found) in row[..width].iter().enumerate() {
                        let expected: f64 = (0..sum)
                            .map(|l| {
                                let w = match along {
                                    Along::Columns => data[j * columns + l],
                                    Along::Rows => data[l * columns + j],
                                };
                                bf16::from_f32(a[i * (sum + 3) + l]).to_f64() * w.to_f64()
                            })
                            .sum();
                        assert!((f64::from(*found) - 1.0 - expected).abs() < 1e-4);
                    }
                    assert_eq!(row[width..], [1.0, 1.0], "columns outside the matrix");
                }
            }
        }
    }
}
