//! Factors and weights as words of the sum: one float32 each, or a pair of bfloat16, or for instructions that have no such pairs two
//! float32 that they were widened to, the second of the pair before the first.

use rayon::prelude::*;

use super::instructions::{Instructions, Packed};
use crate::engine::memory;
use crate::engine::ops::element::{Element, widen};
use crate::engine::ops::matrix::{Along, Term, View, Weights};
use crate::engine::ops::nf4::Nf4View;

/// Whether elements are widened to words.
pub(super) const fn is_widened<I: Instructions, E: Element>() -> bool {
    size_of::<E>() < size_of::<u32>() && !I::HAS_PAIRS
}

/// Elements in a word.
pub(super) const fn per_word<I: Instructions, E: Element>() -> usize {
    match is_widened::<I, E>() {
        true => 1,
        false => size_of::<u32>() / size_of::<E>(),
    }
}

/// Elements that are multiplied one after the other, whatever the words are.
const fn together<E: Element>() -> usize {
    size_of::<u32>() / size_of::<E>()
}

/// Words of the sum of a term.
pub(super) fn words<I: Instructions, E: Element>(term: &Term<E>) -> usize {
    term.sum().next_multiple_of(together::<E>()) / per_word::<I, E>()
}

/// A copy of a factor `[rows][sum]`, `[rows][words]`, where its rows are no words as they lie: with zeros behind each row. It is made by
/// all threads, or by this one alone.
pub(super) fn copied<I: Instructions, E: Element>(a: &View<E>, by_all: bool) -> Option<Vec<u32>> {
    let is_widened = is_widened::<I, E>();
    let elements = a.columns.next_multiple_of(together::<E>());
    if !is_widened && elements == a.columns {
        return None;
    }
    let words = elements / per_word::<I, E>();
    let mut copy: Vec<u32> = memory::zeros(a.rows * words);
    let fill = |(row, copy): (usize, &mut [u32])| {
        let row = a.row(row);
        match is_widened {
            true => widen_turned(row, bytemuck::cast_slice_mut(copy)),
            false => bytemuck::cast_slice_mut(copy)[..row.len()].copy_from_slice(row),
        }
    };
    let words = words.max(1);
    match by_all {
        true => copy.par_chunks_exact_mut(words).enumerate().for_each(fill),
        false => copy.chunks_exact_mut(words).enumerate().for_each(fill),
    }
    Some(copy)
}

/// A copy of a factor `[sum][rows]`, `[words][rows]`, whose elements are no words as they lie. What is missing of the last pair is zero.
pub(super) fn copied_turned<I: Instructions, E: Element>(a: &View<E>) -> Option<Vec<u32>> {
    let together = together::<E>();
    if together == 1 {
        return None;
    }
    let mut copy: Vec<u32> =
        memory::zeros(a.rows.div_ceil(together) * together / per_word::<I, E>() * a.columns);
    let of_pair = (together / per_word::<I, E>() * a.columns).max(1);
    let pairs = copy.par_chunks_mut(of_pair).enumerate();
    pairs.for_each(|(pair, words)| {
        for index in 0..together.min(a.rows - pair * together) {
            let row = a.row(pair * together + index);
            if is_widened::<I, E>() {
                let place = (together - 1 - index) * a.columns;
                let words = &mut words[place..place + a.columns];
                widen(row, bytemuck::cast_slice_mut(words));
                continue;
            }
            let elements: &mut [E] = bytemuck::cast_slice_mut(words);
            for (pair, element) in elements.chunks_exact_mut(together).zip(row) {
                pair[index] = *element;
            }
        }
    });
    Some(copy)
}

/// Widens elements, the second of each pair before the first. What is missing of the last pair is zero.
fn widen_turned<E: Element>(row: &[E], to: &mut [f32]) {
    let (pairs, last) = row.as_chunks::<2>();
    crate::engine::ops::vector::dispatch(
        #[inline(always)]
        || {
            for (to, pair) in to.chunks_exact_mut(2).zip(pairs) {
                to[0] = pair[1].wide();
                to[1] = pair[0].wide();
            }
        },
    );
    if let ([first], Some([missing, to])) = (last, to.get_mut(row.len() - 1..row.len() + 1)) {
        (*missing, *to) = (0.0, first.wide());
    }
}

/// Packs an area of a term's weights of at most a strip. `scratch` has room for so many elements, or float32 where they are widened.
///
/// # Safety
/// As [`Instructions::pack`].
pub(super) unsafe fn pack<I: Instructions, E: Element>(
    term: &Term<E>,
    packed: Packed,
    scratch: &mut [u32],
) {
    let along = term.along;
    // SAFETY: the caller's word; what is packed of the scratch is an area of its own.
    unsafe {
        if let (false, Weights::Dense(w)) = (is_widened::<I, E>(), &term.w) {
            return I::pack(w, along, packed);
        }
        let part = Part::of::<I, E>(term, packed);
        let from_scratch = Packed {
            first: 0,
            start: 0,
            ..packed
        };
        if is_widened::<I, E>() {
            let wide: &mut [f32] = bytemuck::cast_slice_mut(scratch);
            let [rows, columns] = part.widen::<I, E>(term, wide);
            I::pack(&View::new(wide, rows, columns), along, from_scratch);
        } else if let Weights::Nf4(w) = &term.w {
            let elements: &mut [E] = bytemuck::cast_slice_mut(scratch);
            for (index, to) in elements
                .chunks_exact_mut(part.columns.max(1))
                .take(part.rows)
                .enumerate()
            {
                I::widen(w, part.row + index, part.column, to);
            }
            I::pack(
                &View::new(elements, part.rows, part.columns),
                along,
                from_scratch,
            );
        }
    }
}

/// Rows and columns of weights that are packed.
struct Part {
    row: usize,
    rows: usize,
    column: usize,
    columns: usize,
}

impl Part {
    fn of<I: Instructions, E: Element>(term: &Term<E>, packed: Packed) -> Self {
        let start = packed.start * per_word::<I, E>();
        let count = (packed.count * per_word::<I, E>()).min(term.sum() - start);
        match term.along {
            Along::Columns => Self {
                row: packed.first,
                rows: packed.columns,
                column: start,
                columns: count,
            },
            Along::Rows => Self {
                row: start,
                rows: count,
                column: packed.first,
                columns: packed.columns,
            },
        }
    }

    /// Widens the part with the second element of each pair along the sum before the first, and what is missing of the last pair as
    /// zero. Returns the rows and columns that it has then.
    ///
    /// # Safety
    /// The processor has the instructions.
    unsafe fn widen<I: Instructions, E: Element>(
        &self,
        term: &Term<E>,
        wide: &mut [f32],
    ) -> [usize; 2] {
        match term.along {
            Along::Columns => {
                let columns = self.columns.next_multiple_of(2);
                let lines = wide.chunks_exact_mut(columns.max(1)).take(self.rows);
                for (index, line) in lines.enumerate() {
                    match &term.w {
                        Weights::Dense(w) => {
                            let row = &w.row(self.row + index)[self.column..][..self.columns];
                            widen_turned(row, line);
                        }
                        Weights::Nf4(w) => {
                            // SAFETY: by the caller's word.
                            unsafe { self.widen_row::<I, E>(w, index, line) };
                            line[self.columns..].fill(0.0);
                            line.chunks_exact_mut(2).for_each(|pair| pair.swap(0, 1));
                        }
                    }
                }
                [self.rows, columns]
            }
            Along::Rows => {
                let rows = self.rows.next_multiple_of(2);
                let lines = wide.chunks_exact_mut(self.columns.max(1)).take(rows);
                for (line, to) in lines.enumerate() {
                    let index = line ^ 1;
                    match &term.w {
                        _ if index >= self.rows => to.fill(0.0),
                        Weights::Dense(w) => {
                            let row = &w.row(self.row + index)[self.column..][..self.columns];
                            widen(row, to);
                        }
                        // SAFETY: by the caller's word.
                        Weights::Nf4(w) => unsafe { self.widen_row::<I, E>(w, index, to) },
                    }
                }
                [rows, self.columns]
            }
        }
    }

    /// # Safety
    /// The processor has the instructions.
    unsafe fn widen_row<I: Instructions, E: Element>(
        &self,
        w: &Nf4View,
        index: usize,
        to: &mut [f32],
    ) {
        let to = &mut to[..self.columns];
        // SAFETY: by the caller's word.
        unsafe { I::widen(w, self.row + index, self.column, to) };
        to.iter_mut().for_each(|x| *x = E::round_from(*x).wide());
    }
}
