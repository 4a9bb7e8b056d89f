//! Products with the processor's own instructions: AVX-512, AVX2, or whatever it has.
//!
//! In: the parts of a product, row-major. Out: float32 sums, rounded where the target is bfloat16. Each output element is one chain of
//! fused products and additions along the sum, computed by one thread, so its bits depend neither on the number of threads nor on the
//! instructions. A word is 32 bits of the sum: one float32, or a pair of bfloat16.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod block;
mod flush;
mod instructions;
mod scalar;
mod tile;
mod words;

use std::cell::RefCell;

use rayon::prelude::*;

use super::element::Element;
use super::matrix::MatrixMut;
use super::matrix::{Along, Data, Part, Start, Target, Term, View, Weights};
use block::{Ahead, Block, Factor, LINE_BYTES, Out};
use common::instruction_set::InstructionSet;
use instructions::{Instructions, Packed};
use tile::PANEL;
use words::{copied, copied_turned, is_widened, pack, per_word, words};

/// Words of the sum per packed panel: 64 x 128 words are 32 KiB, which stay in L1.
const SUM_BLOCK: usize = 128;

/// Longest term, in words, that goes with the block before it, as an adapter's does.
const SHORT_TERM: usize = 32;

/// Most output rows of a task: its sums are 128 KiB, which stay in L2.
const TASK_ROWS: usize = 512;

/// Least rows of a task, where there are few panels.
const FEWEST_TASK_ROWS: usize = 48;

/// Calls a function of [`Instructions`] with those that a set is of, which this processor has.
macro_rules! with_instructions {
    ($set:expr, $function:ident::<$element:ty>($($argument:expr),*)) => {{
        let set: InstructionSet = $set;
        assert!(set.is_there(), "a processor without {}", set.name());
        match set {
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512Bf16 => $function::<avx512::Avx512Bf16, $element>($($argument),*),
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512 => $function::<avx512::Avx512, $element>($($argument),*),
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx2 => $function::<avx2::Avx2, $element>($($argument),*),
            _ => $function::<scalar::Scalar, $element>($($argument),*),
        }
    }};
}

/// Fills the parts' columns of the target, whose shapes were checked.
pub(super) fn product<E: Element>(set: InstructionSet, target: Target, parts: &[Part<E>]) {
    with_instructions!(set, product_with::<E>(target, parts));
}

/// Computes one product on the calling thread, of shapes that were checked.
pub(super) fn multiply_small<E: Element>(
    set: InstructionSet,
    c: MatrixMut,
    add: bool,
    term: Term<E>,
) {
    with_instructions!(set, small::<E>(c, add, term, false));
}

/// Computes `aᵀ · w` on all threads, of shapes that were checked.
pub(super) fn multiply_turned<E: Element>(
    set: InstructionSet,
    c: MatrixMut,
    add: bool,
    a: View<E>,
    w: View<E>,
) {
    with_instructions!(set, turned_with::<E>(c, add, a, w));
}

/// Computes a small [`multiply_turned`] on the calling thread alone.
pub(super) fn multiply_small_turned(
    set: InstructionSet,
    c: MatrixMut,
    add: bool,
    a: View<f32>,
    w: View<f32>,
) {
    with_instructions!(set, small::<f32>(c, add, turned_term(a, w), true));
}

fn product_with<I: Instructions, E: Element>(target: Target, parts: &[Part<E>]) {
    let copies = copies::<I, E>(parts);
    let panels: usize = parts.iter().map(|p| p.width().div_ceil(PANEL)).sum();
    let (rows, stride) = (target.rows, target.columns);
    let task_rows = task_rows(rows, panels);
    let out = match target.data {
        Data::F32(data) => Out::F32(data.as_mut_ptr(), stride),
        Data::Bf16(data) => Out::Bf16(data.as_mut_ptr().cast(), stride),
    };
    let tasks: Vec<Task<E>> = parts
        .iter()
        .zip(&copies)
        .flat_map(|(part, copies)| {
            (0..part.width()).step_by(PANEL).flat_map(move |column| {
                (0..rows).step_by(task_rows).map(move |row| Task {
                    part,
                    copies,
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
            // SAFETY: instructions and shapes were checked; each task has its own rows and columns of the target.
            unsafe { task.run::<I>(out, stride, scratch) }
        });
    });
}

fn small<I: Instructions, E: Element>(c: MatrixMut, add: bool, term: Term<E>, turned: bool) {
    let copies = match turned {
        false => [copied::<I, E>(&term.a, false)],
        // Of float32 alone.
        true => [None],
    };
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
                    copies: &copies,
                    column,
                    columns: PANEL.min(width - column),
                    row,
                    rows: TASK_ROWS.min(rows - row),
                    add,
                    turned,
                };
                // SAFETY: instructions and shapes were checked; `c` is an exclusive borrow.
                unsafe { task.run::<I>(Out::F32(c.data, stride), stride, scratch) };
            }
        }
    });
}

fn turned_with<I: Instructions, E: Element>(c: MatrixMut, add: bool, a: View<E>, w: View<E>) {
    let (rows, width, stride) = (c.rows, w.columns, c.row_stride);
    let copies = [copied_turned::<I, E>(&a)];
    let part = Part {
        first: 0,
        start: Start::Zero,
        terms: vec![turned_term(a, w)],
    };
    let task_rows = task_rows(rows, width.div_ceil(PANEL));
    let columns = (0..width).step_by(PANEL);
    let tasks = columns.flat_map(|column| {
        let (part, copies) = (&part, &copies);
        (0..rows).step_by(task_rows).map(move |row| Task {
            part,
            copies,
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
            // SAFETY: instructions and shapes were checked; each task has its own rows and columns of `c`, which is an exclusive
            // borrow.
            unsafe { task.run::<I>(out, stride, scratch) }
        });
    });
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

/// Copies of the factors that are no words as they lie, by part and term.
fn copies<I: Instructions, E: Element>(parts: &[Part<E>]) -> Vec<Vec<Option<Vec<u32>>>> {
    let of_part = |part: &Part<E>| {
        let terms = part.terms.iter();
        terms.map(|term| copied::<I, E>(&term.a, true)).collect()
    };
    parts.iter().map(of_part).collect()
}

/// 32-bit words of a cache line.
const LINE_WORDS: usize = LINE_BYTES / size_of::<u32>();

#[repr(align(64))]
#[derive(Clone, Copy)]
struct Line(#[allow(dead_code)] [u32; LINE_WORDS]);

/// Memory that a thread uses again: a packed panel, what weights for it were widened to, and the sums of a task.
struct Scratch {
    panel: Vec<Line>,
    widened: Vec<u32>,
    sums: Vec<Line>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        panel: vec![Line([0; LINE_WORDS]); (SUM_BLOCK + SHORT_TERM) * PANEL / LINE_WORDS],
        widened: vec![0; SUM_BLOCK * PANEL],
        sums: vec![Line([0; LINE_WORDS]); TASK_ROWS * PANEL / LINE_WORDS],
    });
}

/// Some rows and columns of one part of a product.
struct Task<'a, E> {
    part: &'a Part<'a, E>,
    copies: &'a [Option<Vec<u32>>],
    /// First column of the task within the part.
    column: usize,
    columns: usize,
    row: usize,
    rows: usize,
    /// Whether to add to what the target holds, in float32.
    add: bool,
    /// Whether the factor `a` is `[sum][rows]`.
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
    /// The processor has the instructions, and the task's rows and columns lie within the target.
    unsafe fn run<I: Instructions>(&self, out: Out, stride: usize, scratch: &mut Scratch) {
        let sums: *mut f32 = scratch.sums.as_mut_ptr().cast();
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
            let mut next = self.piece::<I>(0, 0);
            while let Some(first) = next {
                next = self.after::<I>(first);
                let second = next.filter(|next| self.goes_with::<I>(first, *next));
                if let Some(second) = second {
                    next = self.after::<I>(second);
                }
                let pieces = [Some(first), second];
                self.pack::<I>(pieces, scratch);
                let block = Block {
                    factors: pieces
                        .map(|piece| piece.map_or(Factor::NONE, |p| self.factor::<I>(p))),
                    panel: scratch.panel.as_ptr().cast(),
                    from,
                    to: match next {
                        None => out,
                        Some(_) => Out::F32(sums, PANEL),
                    },
                    columns: self.columns,
                    ahead: self.ahead::<I>(next),
                };
                self.multiply::<I>(block);
                from = (sums.cast_const(), PANEL);
            }
        }
    }

    /// Packs pieces into the panel: strip by strip, in each one piece behind the other.
    ///
    /// # Safety
    /// As [`run`](Self::run).
    unsafe fn pack<I: Instructions>(&self, pieces: [Option<Piece>; 2], scratch: &mut Scratch) {
        let words: usize = pieces.iter().flatten().map(|piece| piece.count).sum();
        let panel: *mut u32 = scratch.panel.as_mut_ptr().cast();
        for strip in (0..self.columns).step_by(I::STRIP) {
            let mut line = strip / I::STRIP * words;
            for piece in pieces.into_iter().flatten() {
                // SAFETY: the piece lies within its term, and the panel has room for all of it.
                unsafe {
                    let packed = Packed {
                        first: self.column + strip,
                        columns: I::STRIP.min(self.columns - strip),
                        start: piece.start,
                        count: piece.count,
                        panel: panel.add(line * I::STRIP),
                    };
                    pack::<I, E>(&self.part.terms[piece.term], packed, &mut scratch.widened);
                }
                line += piece.count;
            }
        }
    }

    /// # Safety
    /// As [`run`](Self::run), with a block of this task.
    unsafe fn multiply<I: Instructions>(&self, block: Block) {
        let words: usize = block.factors.iter().map(|factor| factor.words).sum();
        for strip in (0..self.columns).step_by(I::STRIP) {
            // SAFETY: the strip is packed there, its columns are the task's, and the rest is the caller's word.
            unsafe {
                let strip = Block {
                    panel: block.panel.add(strip * words),
                    columns: I::STRIP.min(self.columns - strip),
                    ahead: if strip == 0 { block.ahead } else { Ahead::NONE },
                    ..block.of_element(0, strip)
                };
                if is_widened::<I, E>() {
                    flush::without_subnormals(|| I::multiply(self.rows, strip));
                } else if per_word::<I, E>() == 1 {
                    I::multiply(self.rows, strip);
                } else {
                    I::multiply_pairs(self.rows, strip);
                }
            }
        }
    }

    /// The words of a term from `start`, or else of the next term, that are packed first.
    fn piece<I: Instructions>(&self, term: usize, start: usize) -> Option<Piece> {
        let left = words::<I, E>(self.part.terms.get(term)?) - start;
        match left {
            0 => self.piece::<I>(term + 1, 0),
            _ => Some(Piece {
                term,
                start,
                count: SUM_BLOCK.min(left),
            }),
        }
    }

    fn after<I: Instructions>(&self, piece: Piece) -> Option<Piece> {
        self.piece::<I>(piece.term, piece.start + piece.count)
    }

    /// Whether the second piece is short enough to share the first one's block.
    fn goes_with<I: Instructions>(&self, first: Piece, second: Piece) -> bool {
        second.term > first.term && words::<I, E>(&self.part.terms[second.term]) <= SHORT_TERM
    }

    /// # Safety
    /// The task's rows and the piece's words lie within the term.
    unsafe fn factor<I: Instructions>(&self, piece: Piece) -> Factor {
        const WORD: usize = size_of::<u32>();
        let term = &self.part.terms[piece.term];
        let (data, stride): (*const u8, usize) = match &self.copies[piece.term] {
            Some(copy) => {
                let words = match self.turned {
                    false => words::<I, E>(term),
                    true => term.a.columns,
                };
                (copy.as_ptr().cast(), words * WORD)
            }
            None => (term.a.data.as_ptr().cast(), term.a.stride * size_of::<E>()),
        };
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
    fn ahead<I: Instructions>(&self, next: Option<Piece>) -> Ahead {
        let terms = &self.part.terms;
        let (term, column, start) = match next {
            Some(piece) => (&terms[piece.term], self.column, piece.start),
            None => (&terms[0], self.column + PANEL, 0),
        };
        let columns = PANEL.min(term.width().saturating_sub(column));
        let per_word = per_word::<I, E>();
        let words = words::<I, E>(term).saturating_sub(start).min(SUM_BLOCK);
        let (start, elements) = (start * per_word, words * per_word);
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
