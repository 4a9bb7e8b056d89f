//! Sums in fixed point, six bytes each where they fit, and all eight in the tiles where one does not.
//!
//! In: gradients to add. Out: the sums as integers, or the mean gradients they stand for, to the same bits as if each
//! lay in an `i64`. A sum fits below half of the mean gradient's unit, which clipped training hardly leaves.

use std::ops::Range;

use common::exact::{FixedPoint, dequantize};
use common::instruction_set::InstructionSet;
use rayon::prelude::*;

use super::memory;
use super::ops::vector::dispatch;

/// Scalars that share the choice of six or eight bytes, and that a thread works on at a time.
const PACKED_TILE: usize = 1 << 16;
/// Scalars that are unpacked at a time. Tiles are made of whole blocks.
const BLOCK: usize = 1 << 10;

/// Sums of 64 bits, stored as 48-bit signed integers, with 16 bits more only in tiles where a sum does not fit into 48.
///
/// ```text
/// bits    63       48 | 47         32 | 31                 0
///           high: i16 |   middle: u16 |             low: u32
///        only in some |  together a signed 48-bit integer
///               tiles |
/// ```
///
/// A sum is the 48-bit integer plus 2⁴⁸ times its high part, modulo 2⁶⁴.
#[derive(Clone, Debug)]
pub struct PackedSums {
    low: Vec<u32>,
    middle: Vec<u16>,
    /// High parts by tile; None where all of a tile's are zero.
    high: Vec<Option<Box<[i16]>>>,
    /// For each block, whether its sums are zero, whatever low and middle hold. So the first gradient of a step overwrites them.
    empty: Vec<bool>,
}

/// A range of scalars in one tile, with the low, middle and high parts of the whole tile.
struct Part<'a> {
    range: Range<usize>,
    low: &'a mut [u32],
    middle: &'a mut [u16],
    high: &'a mut Option<Box<[i16]>>,
    empty: &'a mut [bool],
}

impl PackedSums {
    pub fn zeros(scalars: usize) -> Self {
        Self {
            low: memory::zeros(scalars),
            middle: memory::zeros(scalars),
            high: vec![None; scalars.div_ceil(PACKED_TILE)],
            empty: vec![true; scalars.div_ceil(BLOCK)],
        }
    }

    pub fn len(&self) -> usize {
        self.low.len()
    }

    pub fn is_empty(&self) -> bool {
        self.low.is_empty()
    }

    pub fn clear(&mut self) {
        self.high.fill(None);
        self.empty.fill(true);
    }

    /// Adds to the scalars from `offset`, and returns how many gradients were invalid (see [`FixedPoint::accumulate`]).
    pub fn add(&mut self, rule: &FixedPoint, offset: usize, gradient: &[f32]) -> u64 {
        let (mut rest, mut parts) = (gradient, Vec::new());
        for part in self.parts(offset..offset + gradient.len()) {
            let (gradient, after) = rest.split_at(part.range.len());
            parts.push((part, gradient));
            rest = after;
        }
        let added = parts.into_par_iter();
        let added = added.map(|(mut part, gradient)| part.add(rule, gradient));
        added.sum()
    }

    /// Overwrites the sums from `start`.
    #[cfg(feature = "cuda")]
    pub fn write(&mut self, start: usize, sums: &[i64]) {
        let mut rest = sums;
        for mut part in self.parts(start..start + sums.len()) {
            let (sums, after) = rest.split_at(part.range.len());
            rest = after;
            let mut at = 0;
            for range in blocks(part.range.clone()) {
                part.open(range.clone());
                part.write(range.clone(), &sums[at..at + range.len()]);
                at += range.len();
            }
        }
    }

    /// Copies the sums from `start` on into `out`, as many as it takes.
    pub fn read(&self, start: usize, out: &mut [i64]) {
        let end = start + out.len();
        let mut at = start;
        while at < end {
            let tile = at / PACKED_TILE;
            let stop = end.min((tile + 1) * PACKED_TILE);
            let out = &mut out[at - start..stop - start];
            let (low, middle) = (&self.low[at..stop], &self.middle[at..stop]);
            let high = self.high[tile].as_deref();
            let high = high.map(|high| &high[at - tile * PACKED_TILE..stop - tile * PACKED_TILE]);
            dispatch(
                #[inline(always)]
                || unpack(low, middle, high, out),
            );
            for range in blocks(at..stop) {
                if self.empty[range.start / BLOCK] {
                    out[range.start - at..range.end - at].fill(0);
                }
            }
            at = stop;
        }
    }

    /// Computes the mean gradients from `start` on into `out`, as many as it takes.
    pub fn read_means(&self, start: usize, out: &mut [f32]) {
        let mut block = [0; BLOCK];
        for (index, out) in out.chunks_mut(BLOCK).enumerate() {
            let sums = &mut block[..out.len()];
            self.read(start + index * BLOCK, sums);
            dispatch(
                #[inline(always)]
                || {
                    for (mean, sum) in out.iter_mut().zip(sums) {
                        *mean = dequantize(*sum);
                    }
                },
            );
        }
    }

    fn parts(&mut self, range: Range<usize>) -> impl Iterator<Item = Part<'_>> {
        let tiles = range.start / PACKED_TILE..range.end.div_ceil(PACKED_TILE);
        let first = tiles.start * PACKED_TILE;
        let low = self.low[first..].chunks_mut(PACKED_TILE);
        let middle = self.middle[first..].chunks_mut(PACKED_TILE);
        let empty = self.empty[first / BLOCK..].chunks_mut(PACKED_TILE / BLOCK);
        let high = self.high[tiles.clone()].iter_mut();
        let stored = low.zip(middle).zip(high.zip(empty));
        tiles.zip(stored).map(move |(tile, stored)| {
            let ((low, middle), (high, empty)) = stored;
            let start = tile * PACKED_TILE;
            Part {
                range: range.start.max(start) - start..range.end.min(start + PACKED_TILE) - start,
                low,
                middle,
                high,
                empty,
            }
        })
    }
}

/// Cuts a range at the borders of blocks, so that each part lies in one block.
fn blocks(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let Range { start, end } = range;
    (start / BLOCK..end.div_ceil(BLOCK))
        .map(move |block| start.max(block * BLOCK)..end.min((block + 1) * BLOCK))
}

impl Part<'_> {
    /// Adds gradients to the scalars of the range.
    fn add(&mut self, rule: &FixedPoint, gradient: &[f32]) -> u64 {
        let (mut invalid, mut rest) = (0, gradient);
        for range in blocks(self.range.clone()) {
            let (gradient, after) = rest.split_at(range.len());
            let is_first = self.open(range.clone());
            invalid += self.add_block(rule, range, gradient, is_first);
            rest = after;
        }
        invalid
    }

    /// Marks the block of the range as not empty, before all sums of the range are written.
    ///
    /// Returns true where the sums of the range are zero but not stored as zeros: the caller must overwrite and not add.
    fn open(&mut self, range: Range<usize>) -> bool {
        let block = range.start / BLOCK;
        if !std::mem::replace(&mut self.empty[block], false) {
            return false;
        }
        let whole = block * BLOCK..self.low.len().min((block + 1) * BLOCK);
        if range != whole {
            self.low[whole.clone()].fill(0);
            self.middle[whole].fill(0);
            return false;
        }
        true
    }

    fn add_block(
        &mut self,
        rule: &FixedPoint,
        range: Range<usize>,
        gradient: &[f32],
        is_first: bool,
    ) -> u64 {
        if self.high.is_none()
            && let Some(invalid) = self.add_narrow(rule, range.clone(), gradient, is_first)
        {
            return invalid;
        }
        let mut block = [0; BLOCK];
        let sums = &mut block[..gradient.len()];
        if !is_first {
            let high = self.high.as_deref().map(|high| &high[range.clone()]);
            let (low, middle) = (&self.low[range.clone()], &self.middle[range.clone()]);
            dispatch(
                #[inline(always)]
                || unpack(low, middle, high, sums),
            );
        }
        let invalid = rule.accumulate(sums, gradient);
        self.write(range, sums);
        invalid
    }

    /// Overwrites sums of a block that is marked as not empty.
    fn write(&mut self, range: Range<usize>, sums: &[i64]) {
        let (low, middle) = (
            &mut self.low[range.clone()],
            &mut self.middle[range.clone()],
        );
        let fits = dispatch(
            #[inline(always)]
            || pack(sums, low, middle),
        );
        if !fits && self.high.is_none() {
            *self.high = Some(vec![0; self.low.len()].into_boxed_slice());
        }
        if let Some(high) = self.high {
            for (high, sum) in high[range].iter_mut().zip(sums) {
                *high = high_of(*sum);
            }
        }
    }

    /// Adds as [`Self::add_block`] does, where no sum has a high part, neither before nor after.
    ///
    /// None where one would get a high part: nothing has changed then, but that first sums are stored as the zeros they are.
    fn add_narrow(
        &mut self,
        rule: &FixedPoint,
        range: Range<usize>,
        gradient: &[f32],
        is_first: bool,
    ) -> Option<u64> {
        let (low, middle) = (&mut self.low[range.clone()], &mut self.middle[range]);
        let in_halves = match InstructionSet::chosen() {
            InstructionSet::Avx2 => true,
            InstructionSet::Scalar | InstructionSet::Avx512 | InstructionSet::Avx512Bf16 => false,
        };
        let (invalid, fits) = dispatch(
            #[inline(always)]
            || match (is_first, in_halves) {
                (true, false) => add_each::<true, false>(rule, gradient, low, middle),
                (false, false) => add_each::<false, false>(rule, gradient, low, middle),
                (true, true) => add_each::<true, true>(rule, gradient, low, middle),
                (false, true) => add_each::<false, true>(rule, gradient, low, middle),
            },
        );
        if !fits {
            take_back(rule, gradient, low, middle);
        }
        fits.then_some(invalid)
    }
}

/// Adds each gradient to its sum, or with `FIRST` to zero. Returns how many were invalid, and whether all sums fit.
#[inline(always)]
fn add_each<const FIRST: bool, const IN_HALVES: bool>(
    rule: &FixedPoint,
    gradient: &[f32],
    low: &mut [u32],
    middle: &mut [u16],
) -> (u64, bool) {
    let (mut invalid, mut lost) = (0, 0);
    for ((g, low), middle) in gradient.iter().zip(low).zip(middle) {
        let added = match IN_HALVES {
            true => rule.quantize_in_halves(*g),
            false => rule.quantize(*g),
        };
        invalid += u64::from(added.is_none());
        let sum = match FIRST {
            true => 0,
            false => i64::from(*middle as i16) << 32 | i64::from(*low),
        };
        let sum = sum.wrapping_add(added.unwrap_or(0));
        (*low, *middle) = (sum as u32, (sum >> 32) as u16);
        lost |= sum ^ (sum << 16 >> 16);
    }
    (invalid, lost == 0)
}

/// Undoes [`add_each`], whether the sums fit or not: modulo 2⁴⁸ nothing is lost.
fn take_back(rule: &FixedPoint, gradient: &[f32], low: &mut [u32], middle: &mut [u16]) {
    for ((g, low), middle) in gradient.iter().zip(low).zip(middle) {
        let sum = i64::from(*middle) << 32 | i64::from(*low);
        let sum = sum.wrapping_sub(rule.quantize(*g).unwrap_or(0));
        (*low, *middle) = (sum as u32, (sum >> 32) as u16);
    }
}

#[inline(always)]
fn unpack(low: &[u32], middle: &[u16], high: Option<&[i16]>, sums: &mut [i64]) {
    for ((sum, low), middle) in sums.iter_mut().zip(low).zip(middle) {
        *sum = i64::from(*middle as i16) << 32 | i64::from(*low);
    }
    if let Some(high) = high {
        for (sum, high) in sums.iter_mut().zip(high) {
            *sum = sum.wrapping_add(i64::from(*high) << 48);
        }
    }
}

/// Stores the lower 48 bits of each sum. Returns whether all high parts are zero.
#[inline(always)]
fn pack(sums: &[i64], low: &mut [u32], middle: &mut [u16]) -> bool {
    let mut lost = 0;
    for ((sum, low), middle) in sums.iter().zip(low).zip(middle) {
        (*low, *middle) = (*sum as u32, (*sum >> 32) as u16);
        lost |= *sum ^ (*sum << 16 >> 16);
    }
    lost == 0
}

/// The high part of a sum: what is left of it without its lower 48 bits and their sign.
#[inline(always)]
fn high_of(sum: i64) -> i16 {
    (sum.wrapping_sub(sum << 16 >> 16) >> 48) as i16
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::rng::CounterRng;

    fn all(packed: &PackedSums) -> Vec<i64> {
        let mut sums = vec![0; packed.len()];
        packed.read(0, &mut sums);
        sums
    }

    /// Of all magnitudes, the largest of which a slot may hold.
    fn gradient(len: usize, largest: i32, key: u64) -> Vec<f32> {
        let mut rng = CounterRng::new(key, &[]);
        let random = |_| (rng.normal() as f32) * 2f32.powi(largest - rng.below(40) as i32);
        (0..len).map(random).collect()
    }

    #[test]
    fn packed_sums_are_those_in_eight_bytes() {
        let scalars = 2 * PACKED_TILE + 700;
        // Whole, within a tile, across tiles, and the end.
        let ranges = [
            0..scalars,
            5..6,
            PACKED_TILE - 3..PACKED_TILE + BLOCK + 3,
            100..2 * PACKED_TILE + 1,
            scalars - 1..scalars,
        ];
        for largest in [-5, 11] {
            let rule = FixedPoint::new(3, 8);
            let (mut packed, mut plain) = (PackedSums::zeros(scalars), vec![0i64; scalars]);
            for (key, range) in ranges.iter().enumerate() {
                let mut gradient = gradient(range.len(), largest, key as u64);
                gradient[range.len() / 2] = [f32::NAN, 1.0][key % 2];
                let invalid = rule.accumulate(&mut plain[range.clone()], &gradient);
                assert_eq!(packed.add(&rule, range.start, &gradient), invalid);
                assert!(all(&packed) == plain, "{largest}, {range:?}");
            }
            let wide = packed.high.iter().filter(|high| high.is_some()).count();
            assert_eq!(wide, if largest > 0 { 3 } else { 0 }, "{largest}");
            let mut part = [0; 99];
            packed.read(PACKED_TILE - 50, &mut part);
            assert_eq!(part, plain[PACKED_TILE - 50..PACKED_TILE + 49]);
            let mut means = [0.0; 99];
            packed.read_means(PACKED_TILE - 50, &mut means);
            assert_eq!(means, part.map(dequantize));
            packed.clear();
            assert!(all(&packed).iter().all(|sum| *sum == 0));
            plain.fill(0);
            for (key, range) in ranges.iter().enumerate().skip(1) {
                let gradient = gradient(range.len(), largest, 9 + key as u64);
                rule.accumulate(&mut plain[range.clone()], &gradient);
                packed.add(&rule, range.start, &gradient);
                assert!(all(&packed) == plain, "once cleared: {largest}, {range:?}");
            }
        }
    }

    #[test]
    fn sums_leave_the_six_bytes_and_come_back() {
        let rule = FixedPoint::new(1, 1000);
        let mut packed = PackedSums::zeros(3);
        let mut plain = [0; 3];
        for gradient in [0.4, 0.2, -1.1, -0.3, 0.8, 15.0, -15.5] {
            for scalar in 0..3 {
                let gradient = [gradient * (scalar as f32 - 1.0)];
                packed.add(&rule, scalar, &gradient);
                rule.accumulate(&mut plain[scalar..=scalar], &gradient);
                assert_eq!(all(&packed), plain);
            }
        }
    }
}
