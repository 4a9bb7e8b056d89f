//! The innermost loops of products, for vectors of any kind: tiles of as many sums as there are registers for, fed by a packed panel.

use super::block::{Block, Out};

/// Output columns of a panel: four vectors of 16 float32.
pub(super) const PANEL: usize = 64;

/// A vector of sums, of 32 bits each, and what it is made with.
pub(super) trait Vector {
    const LANES: usize;
    type Sums: Copy;
    /// A word of each column, as a panel has them.
    type Words: Copy;
    /// One word of a row, in every lane.
    type Word: Copy;

    /// # Safety
    /// Of this and all others: the processor has the instructions.
    unsafe fn zero() -> Self::Sums;

    /// Reads the first `count` elements, or all where there are more.
    ///
    /// # Safety
    /// They are there.
    unsafe fn load(from: *const f32, count: usize) -> Self::Sums;

    /// # Safety
    /// There is room for the first `count`, or all where there are more.
    unsafe fn store(sums: Self::Sums, to: *mut f32, count: usize);

    /// As [`store`](Self::store), rounded to bfloat16 as [`Element::round_from`](crate::engine::ops::element::Element::round_from)
    /// does.
    ///
    /// # Safety
    /// As `store`.
    unsafe fn store_bf16(sums: Self::Sums, to: *mut u16, count: usize);

    /// # Safety
    /// A whole vector of words is there.
    unsafe fn words(from: *const u32) -> Self::Words;

    /// # Safety
    /// The word is there, at any address.
    unsafe fn word(from: *const u8) -> Self::Word;

    /// The sums with the products of the word and the words added.
    ///
    /// # Safety
    /// As all others.
    unsafe fn step(sums: Self::Sums, word: Self::Word, words: Self::Words) -> Self::Sums;
}

/// All rows of a task against one strip of a packed panel, `STRIP` words from line to line, in tiles of `ROWS` rows and `VECTORS`
/// vectors, which the strip's columns fill.
///
/// # Safety
/// The block's pointers are good for that many rows, and the processor has the instructions.
#[inline(always)]
pub(super) unsafe fn tiles<
    V: Vector,
    const STRIP: usize,
    const VECTORS: usize,
    const ROWS: usize,
>(
    rows: usize,
    block: Block,
) {
    let mut row = 0;
    let mut ahead = block.ahead;
    let lines = (ahead.rows * ahead.lines).div_ceil((rows / ROWS).max(1));
    // SAFETY: the caller's word.
    unsafe {
        while row + ROWS <= rows {
            ahead.fetch(lines);
            tile::<V, STRIP, VECTORS, ROWS>(block.of_row(row));
            row += ROWS;
        }
        if row + 4 <= rows {
            tile::<V, STRIP, VECTORS, 4>(block.of_row(row));
            row += 4;
        }
        while row + 2 <= rows {
            tile::<V, STRIP, VECTORS, 2>(block.of_row(row));
            row += 2;
        }
        if row < rows {
            tile::<V, STRIP, VECTORS, 1>(block.of_row(row));
        }
    }
}

/// One tile of `ROWS` rows and `VECTORS` vectors of outputs, of which `columns` exist. Each output is one chain along the sum, from
/// what it starts with to the last word.
///
/// # Safety
/// As [`tiles`].
#[inline(always)]
unsafe fn tile<V: Vector, const STRIP: usize, const VECTORS: usize, const ROWS: usize>(
    block: Block,
) {
    let left = |vector: usize| block.columns - vector * V::LANES;
    // SAFETY: the caller vouches for the rows; what is read and written keeps to the columns that exist.
    unsafe {
        let mut sums = [[V::zero(); VECTORS]; ROWS];
        let (from, from_stride) = block.from;
        if !from.is_null() {
            for (i, sums) in sums.iter_mut().enumerate() {
                for (j, sum) in sums.iter_mut().enumerate() {
                    *sum = V::load(from.add(i * from_stride + j * V::LANES), left(j));
                }
            }
        }
        let mut line = block.panel;
        for factor in block.factors {
            for word in 0..factor.words {
                let w: [V::Words; VECTORS] =
                    std::array::from_fn(|j| V::words(line.add(j * V::LANES)));
                line = line.add(STRIP);
                let a = factor.data.add(word * factor.word);
                for (i, sums) in sums.iter_mut().enumerate() {
                    let a = V::word(a.add(i * factor.row));
                    for (sum, w) in sums.iter_mut().zip(w) {
                        *sum = V::step(*sum, a, w);
                    }
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (j, sum) in sums.iter().enumerate() {
                match block.to {
                    Out::F32(out, stride) => {
                        V::store(*sum, out.add(i * stride + j * V::LANES), left(j));
                    }
                    Out::Bf16(out, stride) => {
                        V::store_bf16(*sum, out.add(i * stride + j * V::LANES), left(j));
                    }
                }
            }
        }
    }
}
