//! Products with AVX-512: float32, and bfloat16 with the instructions for it (`avx512_bf16`), where a pair of factors
//! adds two products to a float32 sum.
//!
//! In: the parts of a product, row-major. Out: float32 sums, rounded where the target is bfloat16. Each output element
//! is summed by one thread, in blocks of [`SUM_BLOCK`] words, so its bits do not depend on the number of threads. A word
//! is 32 bits of the sum: one float32, or a pair of bfloat16.

use std::arch::x86_64::*;
use std::cell::RefCell;

use half::bf16;
use rayon::prelude::*;

use super::element::Element;
use super::product::{Along, Data, Part, Start, Target, Term, View};

/// Output columns of a panel: four vectors of 16 float32.
const PANEL: usize = 64;
const LANES: usize = 16;
const LINE_BYTES: usize = 64;

/// Words of the sum per packed panel: 64 x 128 words are 32 KiB, which stay in L1.
const SUM_BLOCK: usize = 128;

/// Output rows of a task: its sums are 128 KiB, which stay in L2.
const TASK_ROWS: usize = 512;

/// Rows of a task where there are few panels.
const FEWEST_TASK_ROWS: usize = 48;

/// Whether this processor has the instructions for products of such elements.
pub fn is_supported<E: Element>() -> bool {
    use std::arch::is_x86_feature_detected as has;
    let wide = has!("avx512f") && has!("avx512bw") && has!("avx512vl");
    wide && (size_of::<E>() == size_of::<f32>() || has!("avx512bf16"))
}

/// Fills the parts' columns of the target, whose shapes were checked. The processor is one that [`is_supported`].
pub(super) fn product<E: Element>(target: Target, parts: &[Part<E>]) {
    assert!(is_supported::<E>(), "a processor without AVX-512");
    let padded = padded_factors(parts);
    let panels: usize = parts.iter().map(|p| p.width().div_ceil(PANEL)).sum();
    let (rows, stride) = (target.rows, target.columns);
    let task_rows = task_rows(rows, panels);
    let out = match target.data {
        Data::F32(data) => Out::F32(data.as_mut_ptr(), stride),
        Data::Bf16(data) => Out::Bf16(data.as_mut_ptr().cast(), stride),
    };
    let tasks: Vec<Task<E>> = parts
        .iter()
        .zip(&padded)
        .flat_map(|(part, padded)| {
            (0..part.width()).step_by(PANEL).flat_map(move |column| {
                (0..rows).step_by(task_rows).map(move |row| Task {
                    part,
                    padded,
                    column,
                    columns: PANEL.min(part.width() - column),
                    row,
                    rows: task_rows.min(rows - row),
                })
            })
        })
        .collect();
    tasks.into_par_iter().with_max_len(1).for_each(|task| {
        SCRATCH.with_borrow_mut(|scratch| {
            // SAFETY: the features were checked above and the shapes before; each task has its own rows and columns
            // of the target.
            unsafe { task.run(out, stride, scratch) }
        });
    });
}

/// Enough tasks for the threads there are. A row's bits do not depend on its task.
fn task_rows(rows: usize, panels: usize) -> usize {
    let wanted = (4 * rayon::current_num_threads()).div_ceil(panels.max(1));
    rows.div_ceil(wanted).clamp(FEWEST_TASK_ROWS, TASK_ROWS)
}

/// Factors whose rows end within a word, with a zero behind them. By part and term.
fn padded_factors<E: Element>(parts: &[Part<E>]) -> Vec<Vec<Option<Vec<E>>>> {
    let per_word = per_word::<E>();
    let padded = |a: &View<E>| {
        let stride = a.columns.next_multiple_of(per_word);
        (stride != a.columns).then(|| {
            let mut copy = vec![E::zeroed(); a.rows * stride];
            for (row, copy) in copy.chunks_exact_mut(stride).enumerate() {
                copy[..a.columns].copy_from_slice(a.row(row));
            }
            copy
        })
    };
    parts
        .iter()
        .map(|part| part.terms.iter().map(|term| padded(&term.a)).collect())
        .collect()
}

/// Elements in a word.
const fn per_word<E>() -> usize {
    size_of::<u32>() / size_of::<E>()
}

#[repr(align(64))]
#[derive(Clone, Copy)]
struct Line(#[allow(dead_code)] [u32; LANES]);

/// Of each thread: a packed panel, and the sums of a task.
struct Scratch {
    panel: Vec<Line>,
    sums: Vec<Line>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        panel: vec![Line([0; LANES]); SUM_BLOCK * PANEL / LANES],
        sums: vec![Line([0; LANES]); TASK_ROWS * PANEL / LANES],
    });
}

/// Where sums go to, and elements from row to row.
#[derive(Clone, Copy)]
enum Out {
    F32(*mut f32, usize),
    Bf16(*mut u16, usize),
}
// SAFETY: tasks write disjoint rows or columns, see `product`.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    /// # Safety
    /// The row and column lie within.
    unsafe fn at(self, row: usize, column: usize) -> Self {
        // SAFETY: as the caller says.
        unsafe {
            match self {
                Self::F32(out, stride) => Self::F32(out.add(row * stride + column), stride),
                Self::Bf16(out, stride) => Self::Bf16(out.add(row * stride + column), stride),
            }
        }
    }
}

/// Rows and columns of one part.
struct Task<'a, E> {
    part: &'a Part<'a, E>,
    padded: &'a [Option<Vec<E>>],
    /// Within the part.
    column: usize,
    columns: usize,
    row: usize,
    rows: usize,
}

impl<E: Element> Task<'_, E> {
    /// # Safety
    /// The processor has the features, and the task's rows and columns lie within the target.
    unsafe fn run(&self, out: Out, stride: usize, scratch: &mut Scratch) {
        let sums: *mut f32 = scratch.sums.as_mut_ptr().cast();
        let panel: *mut u32 = scratch.panel.as_mut_ptr().cast();
        // SAFETY: the parts' shapes were checked against the target's.
        unsafe {
            let mut from = match self.part.start {
                Start::Zero => (std::ptr::null(), 0),
                Start::Row(row) => (row.as_ptr().add(self.column), 0),
                Start::Rows(rows) => (rows.as_ptr().add(self.row * stride + self.column), stride),
            };
            let out = out.at(self.row, self.part.first + self.column);
            let blocks: usize = self.part.terms.iter().map(|t| blocks(t)).sum();
            let mut done = 0;
            for (index, (term, padded)) in self.part.terms.iter().zip(self.padded).enumerate() {
                let (a, a_stride) = match padded {
                    Some(copy) => (copy.as_ptr(), term.sum().next_multiple_of(per_word::<E>())),
                    None => (term.a.data.as_ptr(), term.a.stride),
                };
                let a: *const u8 = a.add(self.row * a_stride).cast();
                let words = words(term);
                for start in (0..words).step_by(SUM_BLOCK) {
                    let count = SUM_BLOCK.min(words - start);
                    pack(term, self.column, self.columns, start, count, panel);
                    done += 1;
                    let block = Block {
                        a: a.add(start * size_of::<u32>()),
                        a_stride: a_stride * size_of::<E>(),
                        words: count,
                        panel,
                        from,
                        to: if done == blocks {
                            out
                        } else {
                            Out::F32(sums, PANEL)
                        },
                        columns: self.columns,
                        ahead: self.ahead(index, start + SUM_BLOCK),
                    };
                    match per_word::<E>() {
                        1 => multiply_f32(self.rows, block),
                        _ => multiply_bf16(self.rows, block),
                    }
                    from = (sums.cast_const(), PANEL);
                }
            }
        }
    }
}

impl<E: Element> Task<'_, E> {
    /// The weights that are packed after this block: of the same panel, or the first of the one beside it, which the
    /// same thread is likely to be given.
    fn ahead(&self, index: usize, start: usize) -> Ahead {
        let terms = &self.part.terms;
        let (term, column, start) = match (start < words(&terms[index]), index + 1 < terms.len()) {
            (true, _) => (&terms[index], self.column, start),
            (false, true) => (&terms[index + 1], self.column, 0),
            (false, false) => (&terms[0], self.column + PANEL, 0),
        };
        let columns = PANEL.min(term.width().saturating_sub(column));
        let elements = per_word::<E>() * SUM_BLOCK.min(words(term).saturating_sub(start));
        let start = start * per_word::<E>();
        let (row, column, rows, row_elements) = match term.along {
            Along::Columns => (column, start, columns, elements),
            Along::Rows => (start, column, elements, columns),
        };
        let data = term.w.data.as_ptr();
        Ahead {
            row: data.wrapping_add(row * term.w.stride + column).cast(),
            stride: term.w.stride * size_of::<E>(),
            line: 0,
            lines: (row_elements * size_of::<E>()).div_ceil(LINE_BYTES),
            rows: if row_elements > 0 { rows } else { 0 },
        }
    }
}

/// Memory that is read soon, to be fetched bit by bit along the way: rows of whole cache lines.
#[derive(Clone, Copy)]
struct Ahead {
    row: *const u8,
    stride: usize,
    line: usize,
    lines: usize,
    rows: usize,
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

fn words<E>(term: &Term<E>) -> usize {
    term.sum().div_ceil(per_word::<E>())
}

fn blocks<E>(term: &Term<E>) -> usize {
    words(term).div_ceil(SUM_BLOCK)
}

/// Packs `count` words of the sum from `start` and `columns` columns of the output from `first` into
/// `panel[word][column]`; what lies outside the weights, up to the next vector, is zero.
///
/// # Safety
/// The processor has the features, and the words and columns are within the term's.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack<E: Element>(
    term: &Term<E>,
    first: usize,
    columns: usize,
    start: usize,
    count: usize,
    panel: *mut u32,
) {
    let w = &term.w;
    let start = start * per_word::<E>();
    // SAFETY: offsets stay within the weights by the caller's word.
    unsafe {
        match (term.along, per_word::<E>()) {
            (Along::Columns, _) => {
                let from = w.data.as_ptr().add(first * w.stride + start);
                let len = (w.columns - start).min(count * per_word::<E>());
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

/// Rows that become columns: their length and stride in bytes.
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

/// Rows of float32 lie as the panel wants them.
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

/// Pairs are two rows of bfloat16: interleaves them. A missing last row is zero.
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

fn lanes(count: usize) -> __mmask16 {
    ((1u32 << count.min(LANES)) - 1) as __mmask16
}

/// One block of the sum, for all rows of a task: words of `a` (rows `a_stride` bytes apart) and the packed panel.
#[derive(Clone, Copy)]
struct Block {
    a: *const u8,
    a_stride: usize,
    words: usize,
    panel: *const u32,
    /// What is added to, with elements from row to row; null for nothing.
    from: (*const f32, usize),
    to: Out,
    columns: usize,
    ahead: Ahead,
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
unsafe fn multiply_f32(rows: usize, block: Block) {
    // SAFETY: the caller's word.
    unsafe { panel::<Single>(rows, block) }
}

/// # Safety
/// As [`panel`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn multiply_bf16(rows: usize, block: Block) {
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
            2 => tiles::<S, 2, 12>(rows, block),
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
                a: self.a.add(row * self.a_stride),
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
        for word in 0..block.words {
            let row = block.panel.add(word * PANEL);
            let w: [__m512i; VECTORS] =
                std::array::from_fn(|j| _mm512_loadu_si512(row.add(j * LANES).cast()));
            let a = block.a.add(word * size_of::<u32>());
            for (i, sums) in sums.iter_mut().enumerate() {
                let a: *const i32 = a.add(i * block.a_stride).cast();
                let a = _mm512_set1_epi32(a.read_unaligned());
                for (sum, w) in sums.iter_mut().zip(w) {
                    *sum = S::step(*sum, a, w);
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

/// To bfloat16 as [`Element::narrow`] does, for processors without the instruction too.
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

const _: () = assert!(size_of::<bf16>() == size_of::<u16>());
