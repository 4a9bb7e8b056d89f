//! Scales of blocks in 8 bits: their distance from their mean, in blocks of their own.
//!
//! Source: bitsandbytes 0.50: `functional.py` (`quantize_4bit` with `compress_statistics`), and `csrc/cpu_ops.cpp`, which finds a code by its place among 65,536.

use std::sync::LazyLock;

use super::mean::mean;
use crate::dynamic_map::{self, Map};

/// Scales that share a scale of their own.
const BLOCK: usize = 256;

/// Scales in 8 bits each.
#[derive(Clone, Debug, PartialEq)]
pub struct Nested {
    codes: Vec<u8>,
    map: Box<Map>,
    /// Number of codes of a block.
    block: usize,
    /// The largest magnitude of each block.
    absmax: Vec<f32>,
    /// What was subtracted from each scale.
    offset: f32,
}

impl Nested {
    /// Quantises the scales of all blocks of a matrix.
    pub fn quantise(scales: &[f32]) -> Self {
        let offset = mean(scales);
        let mut codes = vec![0; scales.len()];
        let mut absmax = Vec::with_capacity(scales.len().div_ceil(BLOCK));
        let places = places();
        for (codes, scales) in codes.chunks_mut(BLOCK).zip(scales.chunks(BLOCK)) {
            let distances = scales.iter().map(|scale| scale - offset);
            let most = distances
                .clone()
                .fold(0.0, |most: f32, x| most.max(x.abs()));
            absmax.push(most);
            if most == 0.0 {
                continue;
            }
            let inverse = 1.0 / most;
            for (code, distance) in codes.iter_mut().zip(distances) {
                let scaled = (distance * inverse).clamp(-1.0, 1.0);
                let place = (scaled + 1.0) * 0.5 * (PLACES - 1) as f32 + 0.5;
                *code = places[(place as usize).min(PLACES - 1)];
            }
        }
        Self {
            codes,
            map: Box::new(*dynamic_map::signed()),
            block: BLOCK,
            absmax,
            offset,
        }
    }

    /// Scales that another program quantised. None where the parts do not fit together: a block's length is a power of two.
    pub fn of_parts(
        codes: Vec<u8>,
        map: Map,
        block: usize,
        absmax: Vec<f32>,
        offset: f32,
    ) -> Option<Self> {
        let fits = block.is_power_of_two() && absmax.len() == codes.len().div_ceil(block);
        fits.then(|| Self {
            codes,
            map: Box::new(map),
            block,
            absmax,
            offset,
        })
    }

    #[inline]
    pub fn scale(&self, index: usize) -> f32 {
        let code = self.codes[index];
        self.map[usize::from(code)] * self.absmax[index >> self.block.trailing_zeros()]
            + self.offset
    }

    pub fn len(&self) -> usize {
        self.codes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.codes.is_empty()
    }

    /// The codes, those of each block's largest magnitude, and what was subtracted.
    pub fn parts(&self) -> (&[u8], &[f32], f32) {
        (&self.codes, &self.absmax, self.offset)
    }

    /// What each code stands for, times the largest magnitude of its block.
    pub fn map(&self) -> &Map {
        &self.map
    }

    /// Number of codes that share a largest magnitude, a power of two.
    pub fn block(&self) -> usize {
        self.block
    }

    pub(super) fn bytes(&self) -> usize {
        self.codes.len() + size_of_val(&self.absmax[..]) + size_of::<Map>()
    }
}

/// Places that [-1, 1] is cut into, each of which has one code.
const PLACES: usize = 1 << 16;

/// The code of each place: the nearest value of the dynamic map, and of two the lower.
fn places() -> &'static [u8] {
    static CODES: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let map = dynamic_map::signed();
        let middles: Vec<f32> = map
            .windows(2)
            .map(|pair| (pair[0] + pair[1]) / 2.0)
            .collect();
        let value = |place: usize| -1.0 + 2.0 * place as f32 / (PLACES - 1) as f32;
        let code = |value: f32| middles.partition_point(|middle| value > *middle) as u8;
        (0..PLACES).map(|place| code(value(place))).collect()
    });
    &CODES
}

/// Bytes of so many scales.
pub(super) fn bytes(scales: u64) -> u64 {
    scales + scales.div_ceil(BLOCK as u64) * size_of::<f32>() as u64 + size_of::<Map>() as u64
}
