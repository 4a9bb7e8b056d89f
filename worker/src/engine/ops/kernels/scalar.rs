//! Products on any processor, in loops that the compiler makes vector code of where it knows the instructions (NEON). Without
//! instructions for fused products these are made of numbers of 64 bits.

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
        std::array::from_fn(|lane| fused(word, words[lane], sums[lane]))
    }
}

/// `a b + c`, rounded once.
#[inline(always)]
fn fused(a: f32, b: f32, c: f32) -> f32 {
    match cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
        true => a.mul_add(b, c),
        false => fused_in_64_bits(a, b, c),
    }
}

/// [`fused`] without instructions for it: what the function of the library narrows twice where the result is below the normal numbers.
///
/// The product is exact in 64 bits. The sum is rounded to odd (Boldo and Melquiond, 2008), so that narrowing it is the one rounding.
#[inline(always)]
fn fused_in_64_bits(a: f32, b: f32, c: f32) -> f32 {
    let (product, c) = (f64::from(a) * f64::from(b), f64::from(c));
    let sum = product + c;
    let of_c = sum - product;
    let error = (product - (sum - of_c)) + (c - of_c);
    let bits = sum.to_bits();
    let is_inexact = error != 0.0 && sum.is_finite() && bits & 1 == 0;
    let towards = match (error > 0.0) == (sum > 0.0) {
        true => bits.wrapping_add(1),
        false => bits.wrapping_sub(1),
    };
    f64::from_bits(if is_inexact { towards } else { bits }) as f32
}

#[cfg(test)]
mod tests {
    use common::rng::CounterRng;

    use super::*;

    /// What the processor, or the library where numbers are normal, gives.
    #[test]
    fn a_product_and_a_sum_are_rounded_once() {
        let check = |[a, b, c]: [f32; 3]| {
            let (found, expected) = (fused_in_64_bits(a, b, c), a.mul_add(b, c));
            assert!(
                found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan()),
                "{a:e} {b:e} {c:e}: {found:e}, not {expected:e}"
            );
        };
        let mut rng = CounterRng::new(11, &[]);
        for _ in 0..300_000 {
            let words = [0; 3].map(|_: u32| rng.next_u64() as u32);
            let near = |exponent: u32| {
                words.map(|word| {
                    let near = exponent + (word >> 9 & 7);
                    f32::from_bits((word & 0x807f_ffff) | (near << 23))
                })
            };
            check(near(124));
            if is_fused() {
                check(words.map(f32::from_bits));
                let [a, b, c] = near(60);
                check([a, b, f32::from_bits(c.to_bits() & 0x80ff_ffff)]);
            }
        }
        // A result below the normal numbers, which narrowing twice gets wrong.
        let [a, b, c] = [0x1a00_0001, 0x19ff_fffe, 0x0040_0001].map(f32::from_bits);
        assert_eq!(fused_in_64_bits(a, b, c).to_bits(), 0x0040_0001);
    }

    /// Whether the processor has the instructions, which the library uses then.
    fn is_fused() -> bool {
        #[cfg(target_arch = "x86_64")]
        return std::arch::is_x86_feature_detected!("fma");
        #[cfg(not(target_arch = "x86_64"))]
        return cfg!(target_arch = "aarch64");
    }
}
