//! Products with AVX-512: float32, and bfloat16 with the instructions for it (`avx512_bf16`), where a pair of factors
//! adds two products to a float32 sum.
//!
//! In: the parts of a product, row-major. Out: float32 sums, rounded where the target is bfloat16. Each output element
//! is summed by one thread, in blocks of [`SUM_BLOCK`] words, so its bits do not depend on the number of threads. A word
//! is 32 bits of the sum: one float32, or a pair of bfloat16.

mod kernel;
mod nf4;
mod pack;
mod tile;

use std::cell::RefCell;

use half::bf16;
use rayon::prelude::*;

use super::element::Element;
use super::matrix::MatrixMut;
use super::matrix::{Along, Data, Part, Start, Target, Term, View, Weights};
use crate::engine::memory;
use kernel::{Ahead, Block, Factor, Out, multiply_bf16, multiply_f32};
use pack::{Area, pack, pack_nf4};
use tile::{LANES, LINE_BYTES, PANEL, per_word};

/// Words of the sum per packed panel: 64 x 128 words are 32 KiB, which stay in L1.
const SUM_BLOCK: usize = 128;

/// Longest term, in words, that goes with the block before it, as an adapter's does.
const SHORT_TERM: usize = 32;

/// Most output rows of a task: its sums are 128 KiB, which stay in L2.
const TASK_ROWS: usize = 512;

/// Least rows of a task, where there are few panels.
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
                    add: false,
                    turned: false,
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

/// Computes one product on the calling thread, of shapes that were checked. The processor is one that [`is_supported`].
pub(super) fn multiply_small<E: Element>(c: MatrixMut, add: bool, term: Term<E>) {
    small(c, add, term, false);
}

fn small<E: Element>(c: MatrixMut, add: bool, term: Term<E>, turned: bool) {
    assert!(is_supported::<E>(), "a processor without AVX-512");
    let (rows, width, stride) = (c.rows, term.width(), c.row_stride);
    let part = Part {
        first: 0,
        start: Start::Zero,
        terms: vec![term],
    };
    SCRATCH.with_borrow_mut(|scratch| {
        for column in (0..width).step_by(PANEL) {
            for row in (0..rows).step_by(TASK_ROWS) {
                let task = Task {
                    part: &part,
                    padded: &[None],
                    column,
                    columns: PANEL.min(width - column),
                    row,
                    rows: TASK_ROWS.min(rows - row),
                    add,
                    turned,
                };
                // SAFETY: the features were checked above and the shapes before; `c` is an exclusive borrow.
                unsafe { task.run(Out::F32(c.data, stride), stride, scratch) };
            }
        }
    });
}

/// Computes `aᵀ · w` on all threads, of shapes that were checked. The processor is one that [`is_supported`].
pub(super) fn multiply_turned<E: Element>(c: MatrixMut, add: bool, a: View<E>, w: View<E>) {
    assert!(is_supported::<E>(), "a processor without AVX-512");
    let (rows, width, stride) = (c.rows, w.columns, c.row_stride);
    let paired = [paired(&a)];
    let part = Part {
        first: 0,
        start: Start::Zero,
        terms: vec![turned_term(a, w)],
    };
    let task_rows = task_rows(rows, width.div_ceil(PANEL));
    let columns = (0..width).step_by(PANEL);
    let tasks = columns.flat_map(|column| {
        let (part, paired) = (&part, &paired);
        (0..rows).step_by(task_rows).map(move |row| Task {
            part,
            padded: paired,
            column,
            columns: PANEL.min(width - column),
            row,
            rows: task_rows.min(rows - row),
            add,
            turned: true,
        })
    });
    let (tasks, out): (Vec<Task<E>>, _) = (tasks.collect(), Out::F32(c.data, stride));
    tasks.into_par_iter().with_max_len(1).for_each(|task| {
        SCRATCH.with_borrow_mut(|scratch| {
            // SAFETY: the features were checked above and the shapes before; each task has its own rows and columns
            // of `c`, which is an exclusive borrow.
            unsafe { task.run(out, stride, scratch) }
        });
    });
}

/// Computes a small [`multiply_turned`] on the calling thread alone.
pub(super) fn multiply_small_turned(c: MatrixMut, add: bool, a: View<f32>, w: View<f32>) {
    small(c, add, turned_term(a, w), true);
}

/// A copy of a factor `[sum][rows]` whose elements are narrower than a word: each word of the sum has a pair of them for each row.
/// What is missing of the last pair is zero.
fn paired<E: Element>(a: &View<E>) -> Option<Vec<E>> {
    let per_word = per_word::<E>();
    if per_word == 1 {
        return None;
    }
    let mut copy = memory::zeros(a.rows.div_ceil(per_word) * per_word * a.columns);
    let words = copy.par_chunks_mut((per_word * a.columns).max(1));
    words.enumerate().for_each(|(word, pairs)| {
        for index in 0..per_word.min(a.rows - word * per_word) {
            let row = a.row(word * per_word + index);
            for (pair, element) in pairs.chunks_exact_mut(per_word).zip(row) {
                pair[index] = *element;
            }
        }
    });
    Some(copy)
}

fn turned_term<'a, E>(a: View<'a, E>, w: View<'a, E>) -> Term<'a, E> {
    let (w, along) = (w.into(), Along::Rows);
    Term { a, w, along }
}

/// Rows of a task, such that there are enough tasks for the threads. A row's bits do not depend on its task.
fn task_rows(rows: usize, panels: usize) -> usize {
    let wanted = (4 * rayon::current_num_threads()).div_ceil(panels.max(1));
    rows.div_ceil(wanted).clamp(FEWEST_TASK_ROWS, TASK_ROWS)
}

/// Copies of the factors whose rows end within a word, with zeros behind each row; by part and term.
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

#[repr(align(64))]
#[derive(Clone, Copy)]
struct Line(#[allow(dead_code)] [u32; LANES]);

/// Memory that a thread uses again: a packed panel, what 4-bit weights for it were widened to, and the sums of a task.
struct Scratch {
    panel: Vec<Line>,
    widened: Vec<Line>,
    sums: Vec<Line>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        panel: vec![Line([0; LANES]); (SUM_BLOCK + SHORT_TERM) * PANEL / LANES],
        widened: vec![Line([0; LANES]); SUM_BLOCK * PANEL / LANES],
        sums: vec![Line([0; LANES]); TASK_ROWS * PANEL / LANES],
    });
}
/// Some rows and columns of one part of a product.
struct Task<'a, E> {
    part: &'a Part<'a, E>,
    padded: &'a [Option<Vec<E>>],
    /// First column of the task within the part.
    column: usize,
    columns: usize,
    row: usize,
    rows: usize,
    /// Whether to add to what the target holds, in float32.
    add: bool,
    /// Whether the factor `a` is `[sum][rows]`: as it lies in float32, or [`paired`].
    turned: bool,
}

/// Words of a term that are packed together.
#[derive(Clone, Copy)]
struct Piece {
    /// Index of the term.
    term: usize,
    start: usize,
    count: usize,
}

impl<E: Element> Task<'_, E> {
    /// # Safety
    /// The processor has the features, and the task's rows and columns lie within the target.
    unsafe fn run(&self, out: Out, stride: usize, scratch: &mut Scratch) {
        let sums: *mut f32 = scratch.sums.as_mut_ptr().cast();
        let panel: *mut u32 = scratch.panel.as_mut_ptr().cast();
        let widened: *mut E = scratch.widened.as_mut_ptr().cast();
        // SAFETY: the parts' shapes were checked against the target's.
        unsafe {
            let mut from = match self.part.start {
                Start::Zero => (std::ptr::null(), 0),
                Start::Row(row) => (row.as_ptr().add(self.column), 0),
                Start::Rows(rows) => (rows.as_ptr().add(self.row * stride + self.column), stride),
            };
            let out = out.at(self.row, self.part.first + self.column);
            if let (true, Out::F32(sums, stride)) = (self.add, out) {
                from = (sums.cast_const(), stride);
            }
            let mut next = self.piece(0, 0);
            while let Some(first) = next {
                next = self.after(first);
                let second = next.filter(|next| self.goes_with(first, *next));
                if let Some(second) = second {
                    next = self.after(second);
                }
                let pieces = [Some(first), second];
                let mut packed = 0;
                for piece in pieces.into_iter().flatten() {
                    let term = &self.part.terms[piece.term];
                    let to = panel.add(packed * PANEL);
                    let area = Area {
                        first: self.column,
                        columns: self.columns,
                        start: piece.start,
                        count: piece.count,
                    };
                    match &term.w {
                        Weights::Dense(w) => pack(w, term.along, area, to),
                        Weights::Nf4(w) => pack_nf4::<E>(w, term.along, area, widened, to),
                    }
                    packed += piece.count;
                }
                let block = Block {
                    factors: pieces.map(|piece| piece.map_or(Factor::NONE, |p| self.factor(p))),
                    panel,
                    from,
                    to: match next {
                        None => out,
                        Some(_) => Out::F32(sums, PANEL),
                    },
                    columns: self.columns,
                    ahead: self.ahead(next),
                };
                match per_word::<E>() {
                    1 => multiply_f32(self.rows, block),
                    _ => multiply_bf16(self.rows, block),
                }
                from = (sums.cast_const(), PANEL);
            }
        }
    }

    /// The words of a term from `start`, or else of the next term, that are packed first.
    fn piece(&self, term: usize, start: usize) -> Option<Piece> {
        let left = words(self.part.terms.get(term)?) - start;
        match left {
            0 => self.piece(term + 1, 0),
            _ => Some(Piece {
                term,
                start,
                count: SUM_BLOCK.min(left),
            }),
        }
    }

    fn after(&self, piece: Piece) -> Option<Piece> {
        self.piece(piece.term, piece.start + piece.count)
    }

    /// Whether the second piece is short enough to share the first one's block.
    fn goes_with(&self, first: Piece, second: Piece) -> bool {
        second.term > first.term && words(&self.part.terms[second.term]) <= SHORT_TERM
    }

    /// # Safety
    /// The task's rows and the piece's words lie within the term.
    unsafe fn factor(&self, piece: Piece) -> Factor {
        const WORD: usize = size_of::<u32>();
        let term = &self.part.terms[piece.term];
        let (data, stride) = match (&self.padded[piece.term], self.turned) {
            (Some(copy), false) => (copy.as_ptr(), term.sum().next_multiple_of(per_word::<E>())),
            (Some(copy), true) => (copy.as_ptr(), term.a.columns * per_word::<E>()),
            (None, _) => (term.a.data.as_ptr(), term.a.stride),
        };
        let (data, stride): (*const u8, _) = (data.cast(), stride * size_of::<E>());
        let (row, word) = match self.turned {
            false => (stride, WORD),
            true => (WORD, stride),
        };
        Factor {
            // SAFETY: by the caller's word.
            data: unsafe { data.add(self.row * row + piece.start * word) },
            row,
            word,
            words: piece.count,
        }
    }
}

impl<E: Element> Task<'_, E> {
    /// The weights to prefetch, which are packed after this block: of the same panel, or the first of the one beside it, which
    /// the same thread is likely to be given.
    fn ahead(&self, next: Option<Piece>) -> Ahead {
        let terms = &self.part.terms;
        let (term, column, start) = match next {
            Some(piece) => (&terms[piece.term], self.column, piece.start),
            None => (&terms[0], self.column + PANEL, 0),
        };
        let columns = PANEL.min(term.width().saturating_sub(column));
        let elements = per_word::<E>() * SUM_BLOCK.min(words(term).saturating_sub(start));
        let start = start * per_word::<E>();
        let (row, column, rows, row_elements) = match term.along {
            Along::Columns => (column, start, columns, elements),
            Along::Rows => (start, column, elements, columns),
        };
        // Of codes there are two a byte.
        let (data, stride, bytes): (*const u8, _, fn(usize) -> usize) = match &term.w {
            Weights::Dense(w) => (w.data.as_ptr().cast(), w.stride, |n| n * size_of::<E>()),
            Weights::Nf4(w) => (w.matrix.codes().as_ptr(), w.columns, |n| n / 2),
        };
        Ahead {
            row: data.wrapping_add(bytes(row * stride + column)),
            stride: bytes(stride),
            line: 0,
            lines: bytes(row_elements).div_ceil(LINE_BYTES),
            rows: if row_elements > 0 { rows } else { 0 },
        }
    }
}

fn words<E>(term: &Term<E>) -> usize {
    term.sum().div_ceil(per_word::<E>())
}

const _: () = assert!(size_of::<bf16>() == size_of::<u16>());
