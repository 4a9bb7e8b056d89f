//! Products on any processor, in loops that the compiler makes vector code of where it knows the instructions (NEON). Without
//! instructions for fused products they are computed in software, slowly.

use super::block::Block;
use super::instructions::{Instructions, Packed};
use super::tile::{Vector, tiles};
use crate::engine::ops::element::Element;
use crate::engine::ops::matrix::{Along, View};
use crate::engine::ops::nf4::Nf4View;

const LANES: usize = 16;

pub(super) struct Scalar;

impl Instructions for Scalar {
    const STRIP: usize = LANES;
    const HAS_PAIRS: bool = false;

    unsafe fn pack<E: Element>(w: &View<E>, along: Along, packed: Packed) {
        let w = w.wide();
        let Packed {
            first,
            columns,
            start,
            count,
            panel,
        } = packed;
        // SAFETY: the panel has room for the words by the caller's word, and nobody else writes to it.
        let panel: &mut [f32] =
            unsafe { std::slice::from_raw_parts_mut(panel.cast(), count * LANES) };
        for (word, line) in panel.chunks_exact_mut(LANES).enumerate() {
            let (there, missing) = line.split_at_mut(columns);
            match along {
                Along::Rows => there.copy_from_slice(&w.row(start + word)[first..][..columns]),
                Along::Columns => {
                    for (column, to) in there.iter_mut().enumerate() {
                        *to = w.row(first + column)[start + word];
                    }
                }
            }
            missing.fill(0.0);
        }
    }

    unsafe fn widen<E: Element>(w: &Nf4View, row: usize, start: usize, out: &mut [E]) {
        w.widen(row, start, out);
    }

    #[inline(never)]
    unsafe fn multiply(rows: usize, block: Block) {
        // SAFETY: the caller's word.
        unsafe { tiles::<Plain, LANES, 1, 4>(rows, block) }
    }
}

struct Plain;

impl Vector for Plain {
    const LANES: usize = LANES;
    type Sums = [f32; LANES];
    type Words = [f32; LANES];
    type Word = f32;

    #[inline(always)]
    unsafe fn zero() -> [f32; LANES] {
        [0.0; LANES]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32, count: usize) -> [f32; LANES] {
        let mut sums = [0.0; LANES];
        // SAFETY: they are there by the caller's word.
        unsafe { from.copy_to_nonoverlapping(sums.as_mut_ptr(), count.min(LANES)) };
        sums
    }

    #[inline(always)]
    unsafe fn store(sums: [f32; LANES], to: *mut f32, count: usize) {
        // SAFETY: there is room by the caller's word.
        unsafe { to.copy_from_nonoverlapping(sums.as_ptr(), count.min(LANES)) }
    }

    #[inline(always)]
    unsafe fn store_bf16(sums: [f32; LANES], to: *mut u16, count: usize) {
        let rounded = sums.map(|sum| half::bf16::round_from(sum).to_bits());
        // SAFETY: there is room by the caller's word.
        unsafe { to.copy_from_nonoverlapping(rounded.as_ptr(), count.min(LANES)) }
    }

    #[inline(always)]
    unsafe fn words(from: *const u32) -> [f32; LANES] {
        // SAFETY: they are there by the caller's word.
        unsafe { from.cast::<[f32; LANES]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn word(from: *const u8) -> f32 {
        // SAFETY: it is there by the caller's word.
        unsafe { from.cast::<f32>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn step(sums: [f32; LANES], word: f32, words: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|lane| word.mul_add(words[lane], sums[lane]))
    }
}
