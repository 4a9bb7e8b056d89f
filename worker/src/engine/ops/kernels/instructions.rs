//! What a set of instructions must have so that products are computed with it.

use super::block::Block;
use crate::engine::ops::element::Element;
use crate::engine::ops::matrix::{Along, View};
use crate::engine::ops::nf4::Nf4View;

/// What of the weights is packed, and where to: `panel[word][column]`, `STRIP` words from line to line.
#[derive(Clone, Copy)]
pub(super) struct Packed {
    /// First column of the output.
    pub first: usize,
    /// At most a strip.
    pub columns: usize,
    /// First word of the sum.
    pub start: usize,
    /// Number of words.
    pub count: usize,
    pub panel: *mut u32,
}

/// A set of instructions. Whichever it is, a sum has the same bits: it is one chain of fused products and additions along the sum; of
/// bfloat16 the second of each pair comes before the first, and numbers below the normal ones are zero, as `vdpbf16ps` has it.
pub(super) trait Instructions {
    /// Columns that lie together in a panel.
    const STRIP: usize;
    /// Whether pairs of bfloat16 are multiplied as they are; else they are widened.
    const HAS_PAIRS: bool;

    /// Packs an area of the weights; what lies outside them, up to the next vector, is zero. The words are float32, or pairs of
    /// bfloat16 where there are such.
    ///
    /// # Safety
    /// The processor has the instructions, the area is within the weights, and the panel has room for it.
    unsafe fn pack<E: Element>(w: &View<E>, along: Along, packed: Packed);

    /// Writes columns of a row of weights of 4 bits, from `start` on.
    ///
    /// # Safety
    /// The processor has the instructions.
    unsafe fn widen<E: Element>(w: &Nf4View, row: usize, start: usize, out: &mut [E]);

    /// All rows of a task against a strip, whose words are float32.
    ///
    /// # Safety
    /// The processor has the instructions, and the block's pointers are good for that many rows.
    unsafe fn multiply(rows: usize, block: Block);

    /// All rows of a task against a strip, whose words are pairs of bfloat16.
    ///
    /// # Safety
    /// As [`multiply`](Self::multiply).
    unsafe fn multiply_pairs(_: usize, _: Block) {
        unreachable!("pairs of bfloat16 without instructions for them");
    }
}
