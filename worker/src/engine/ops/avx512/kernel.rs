//! The innermost loops of products: tiles of as many sums as there are registers for, fed by one packed panel.

use std::arch::x86_64::*;

use super::tile::{LANES, LINE_BYTES, PANEL, lanes};

/// Where sums go to: the address of an element, and the number of elements from row to row.
#[derive(Clone, Copy)]
pub(super) enum Out {
    F32(*mut f32, usize),
    Bf16(*mut u16, usize),
}
// SAFETY: tasks write disjoint rows or columns, see `super::product`.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    /// The target from this row and column on.
    ///
    /// # Safety
    /// The row and column must lie within it.
    pub(super) unsafe fn at(self, row: usize, column: usize) -> Self {
        // SAFETY: as the caller says.
        unsafe {
            match self {
                Self::F32(out, stride) => Self::F32(out.add(row * stride + column), stride),
                Self::Bf16(out, stride) => Self::Bf16(out.add(row * stride + column), stride),
            }
        }
    }
}

/// Memory that is read soon and is prefetched bit by bit along the way: rows of whole cache lines.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    pub(super) row: *const u8,
    pub(super) stride: usize,
    pub(super) line: usize,
    pub(super) lines: usize,
    pub(super) rows: usize,
}

impl Ahead {
    #[inline(always)]
    fn fetch(&mut self, lines: usize) {
        for _ in 0..lines {
            if self.rows == 0 {
                return;
            }
            let line = self.row.wrapping_add(self.line * LINE_BYTES);
            // SAFETY: a prefetch of any address is only a hint, and every x86-64 processor knows it.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) };
            self.line += 1;
            if self.line == self.lines {
                self.line = 0;
                self.rows -= 1;
                self.row = self.row.wrapping_add(self.stride);
            }
        }
    }
}

/// A factor's words along the sum, on the side of the rows.
#[derive(Clone, Copy)]
pub(super) struct Factor {
    pub(super) data: *const u8,
    /// Bytes from row to row.
    pub(super) row: usize,
    /// Bytes from word to word.
    pub(super) word: usize,
    pub(super) words: usize,
}

impl Factor {
    pub(super) const NONE: Self = Self {
        data: std::ptr::null(),
        row: 0,
        word: 0,
        words: 0,
    };
}

/// One block of the sum, for all rows of a task: one factor's words, then another's, and the panel that both are packed
/// in.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub(super) factors: [Factor; 2],
    pub(super) panel: *const u32,
    /// What the sums are added to, with the number of elements from row to row; null for nothing.
    pub(super) from: (*const f32, usize),
    pub(super) to: Out,
    pub(super) columns: usize,
    pub(super) ahead: Ahead,
}

/// How a word of `a` and a vector of the panel add to sums.
trait Step {
    /// # Safety
    /// The processor has the instruction.
    unsafe fn step(sum: __m512, a: __m512i, w: __m512i) -> __m512;
}

struct Single;
struct Pairs;

impl Step for Single {
    #[inline(always)]
    unsafe fn step(sum: __m512, a: __m512i, w: __m512i) -> __m512 {
        // SAFETY: by the caller's word.
        unsafe { _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(w), sum) }
    }
}

impl Step for Pairs {
    #[inline(always)]
    unsafe fn step(sum: __m512, a: __m512i, w: __m512i) -> __m512 {
        // SAFETY: by the caller's word.
        unsafe {
            let pairs = |x| std::mem::transmute::<__m512i, __m512bh>(x);
            _mm512_dpbf16_ps(sum, pairs(a), pairs(w))
        }
    }
}

/// # Safety
/// As [`panel`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn multiply_f32(rows: usize, block: Block) {
    // SAFETY: the caller's word.
    unsafe { panel::<Single>(rows, block) }
}

/// # Safety
/// As [`panel`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn multiply_bf16(rows: usize, block: Block) {
    // SAFETY: the caller's word.
    unsafe { panel::<Pairs>(rows, block) }
}

/// All rows of a task against one packed panel, in tiles of as many accumulators as there are registers for.
///
/// # Safety
/// The block's pointers are good for that many rows, and the processor has the features.
#[inline(always)]
unsafe fn panel<S: Step>(rows: usize, block: Block) {
    // SAFETY: the caller's word.
    unsafe {
        match block.columns.div_ceil(LANES) {
            1 => tiles::<S, 1, 12>(rows, block),
            2 => tiles::<S, 2, 8>(rows, block),
            3 => tiles::<S, 3, 8>(rows, block),
            _ => tiles::<S, 4, 6>(rows, block),
        }
    }
}

/// # Safety
/// As [`panel`].
#[inline(always)]
unsafe fn tiles<S: Step, const VECTORS: usize, const ROWS: usize>(rows: usize, block: Block) {
    let mut row = 0;
    let mut ahead = block.ahead;
    let lines = (ahead.rows * ahead.lines).div_ceil((rows / ROWS).max(1));
    // SAFETY: the caller's word.
    unsafe {
        while row + ROWS <= rows {
            ahead.fetch(lines);
            tile::<S, VECTORS, ROWS>(block.of_row(row));
            row += ROWS;
        }
        if row + 4 <= rows {
            tile::<S, VECTORS, 4>(block.of_row(row));
            row += 4;
        }
        while row + 2 <= rows {
            tile::<S, VECTORS, 2>(block.of_row(row));
            row += 2;
        }
        if row < rows {
            tile::<S, VECTORS, 1>(block.of_row(row));
        }
    }
}

impl Block {
    /// # Safety
    /// There is such a row.
    #[inline(always)]
    unsafe fn of_row(self, row: usize) -> Self {
        // SAFETY: the caller's word.
        unsafe {
            Self {
                factors: self.factors.map(|factor| Factor {
                    data: factor.data.wrapping_add(row * factor.row),
                    ..factor
                }),
                from: match self.from.0.is_null() {
                    true => self.from,
                    false => (self.from.0.add(row * self.from.1), self.from.1),
                },
                to: self.to.at(row, 0),
                ..self
            }
        }
    }
}

/// One tile of `ROWS` rows and `VECTORS` vectors of outputs, of which `columns` exist.
///
/// # Safety
/// As [`panel`].
#[inline(always)]
unsafe fn tile<S: Step, const VECTORS: usize, const ROWS: usize>(block: Block) {
    // SAFETY: the caller vouches for the rows; the masks keep to the columns that exist.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        let (from, from_stride) = block.from;
        if !from.is_null() {
            for (i, sums) in sums.iter_mut().enumerate() {
                for (j, sum) in sums.iter_mut().enumerate() {
                    let mask = lanes(block.columns - j * LANES);
                    *sum = _mm512_maskz_loadu_ps(mask, from.add(i * from_stride + j * LANES));
                }
            }
        }
        let mut line = block.panel;
        for factor in block.factors {
            for word in 0..factor.words {
                let w: [__m512i; VECTORS] =
                    std::array::from_fn(|j| _mm512_loadu_si512(line.add(j * LANES).cast()));
                line = line.add(PANEL);
                let a = factor.data.add(word * factor.word);
                for (i, sums) in sums.iter_mut().enumerate() {
                    let a: *const i32 = a.add(i * factor.row).cast();
                    let a = _mm512_set1_epi32(a.read_unaligned());
                    for (sum, w) in sums.iter_mut().zip(w) {
                        *sum = S::step(*sum, a, w);
                    }
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (j, sum) in sums.iter().enumerate() {
                let mask = lanes(block.columns - j * LANES);
                match block.to {
                    Out::F32(out, stride) => {
                        _mm512_mask_storeu_ps(out.add(i * stride + j * LANES), mask, *sum);
                    }
                    Out::Bf16(out, stride) => {
                        let out = out.add(i * stride + j * LANES);
                        _mm256_mask_storeu_epi16(out.cast(), mask, rounded(*sum));
                    }
                }
            }
        }
    }
}

/// Rounds to bfloat16 as [`Element::round_from`](crate::engine::ops::element::Element::round_from) does, for processors without the instruction too.
///
/// # Safety
/// The processor has AVX-512.
#[inline(always)]
pub(super) unsafe fn rounded(x: __m512) -> __m256i {
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
