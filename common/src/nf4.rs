//! Matrices of 4 bits a scalar, laid out as bitsandbytes lays them out (Dettmers et al., "QLoRA", 2023): blocks of scalars
//! that share a scale, and the scales in 8 bits again where they are nested ("double quantisation").
//!
//! Enters: float32 scalars, or the parts of a matrix that somebody else quantised. Leaves: the parts, and float32 scalars
//! again. What leaves is a function of what enters alone: single operations of float32, in one order, on every machine.

mod mean;
mod nested;

use rayon::prelude::*;
use thiserror::Error;

pub use nested::Nested;

/// Scalars that share a scale, where Muster quantises.
pub const BLOCK: usize = 64;

/// Scalars of a block that another program quantised: a power of two from the first to the last.
pub const BLOCKS: std::ops::RangeInclusive<usize> = 32..=4096;

/// The values of NF4: quantiles of a normal distribution, scaled to [-1, 1].
///
/// Source: bitsandbytes 0.50, `functional.py`, `get_4bit_type`.
pub const NF4_LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Least magnitude that a block is divided by.
const LEAST_ABSMAX: f32 = 1e-38;

/// Blocks that are quantised in one task.
const TASK_BLOCKS: usize = 1024;

/// A matrix in 4 bits a scalar, row after row; a block may go on in the next row.
#[derive(Clone, Debug, PartialEq)]
pub struct Nf4 {
    /// Two scalars a byte, the first in the upper half.
    codes: Vec<u8>,
    scalars: usize,
    /// Scalars of a block.
    block: usize,
    /// What each code stands for, times the block's scale.
    levels: [f32; 16],
    scales: Scales,
}

/// The largest magnitude of each block: as it is, or in 8 bits.
#[derive(Clone, Debug, PartialEq)]
pub enum Scales {
    Plain(Vec<f32>),
    Nested(Nested),
}

/// Why scalars are not quantised, or parts are no matrix.
#[derive(Debug, Error, PartialEq)]
pub enum NotQuantised {
    #[error("holds {0}, which cannot be quantised")]
    NotFinite(f32),
    #[error("has {found} {what} where its shape makes it {expected}")]
    Length {
        what: &'static str,
        expected: usize,
        found: usize,
    },
    #[error("has blocks of {0} scalars; powers of two from 32 to 4096 are read")]
    Block(usize),
    #[error("stands for numbers that are not finite in block {0}")]
    Overflow(usize),
}

impl Nf4 {
    /// Quantises scalars to NF4, and the scales of the blocks too where they are to be nested.
    pub fn quantise(scalars: &[f32], nested: bool) -> Result<Self, NotQuantised> {
        if let Some(odd) = scalars.iter().find(|scalar| !scalar.is_finite()) {
            return Err(NotQuantised::NotFinite(*odd));
        }
        let mut codes = vec![0; scalars.len().div_ceil(2)];
        let mut absmax = vec![0.0; scalars.len().div_ceil(BLOCK)];
        codes
            .par_chunks_mut(TASK_BLOCKS * BLOCK / 2)
            .zip(absmax.par_chunks_mut(TASK_BLOCKS))
            .zip(scalars.par_chunks(TASK_BLOCKS * BLOCK))
            .for_each(|((codes, absmax), scalars)| {
                let blocks = codes.chunks_mut(BLOCK / 2).zip(scalars.chunks(BLOCK));
                for (absmax, (codes, scalars)) in absmax.iter_mut().zip(blocks) {
                    *absmax = quantise_block(scalars, codes);
                }
            });
        Ok(Self {
            codes,
            scalars: scalars.len(),
            block: BLOCK,
            levels: NF4_LEVELS,
            scales: match nested {
                true => Scales::Nested(Nested::quantise(&absmax)),
                false => Scales::Plain(absmax),
            },
        })
    }

    /// A matrix of what another program quantised.
    pub fn of_parts(
        codes: Vec<u8>,
        scalars: usize,
        block: usize,
        levels: [f32; 16],
        scales: Scales,
    ) -> Result<Self, NotQuantised> {
        if !BLOCKS.contains(&block) || !block.is_power_of_two() {
            return Err(NotQuantised::Block(block));
        }
        let length = |what, expected, found| match expected == found {
            true => Ok(()),
            false => Err(NotQuantised::Length {
                what,
                expected,
                found,
            }),
        };
        length("bytes of codes", scalars.div_ceil(2), codes.len())?;
        length("scales", scalars.div_ceil(block), scales.len())?;
        let matrix = Self {
            codes,
            scalars,
            block,
            levels,
            scales,
        };
        let is_finite = |block: &usize| matrix.levels_of(*block).iter().all(|x| x.is_finite());
        match (0..matrix.scales.len()).find(|block| !is_finite(block)) {
            Some(block) => Err(NotQuantised::Overflow(block)),
            None => Ok(matrix),
        }
    }

    /// What the codes of a block stand for.
    #[inline]
    pub fn levels_of(&self, block: usize) -> [f32; 16] {
        let scale = self.scale(block);
        self.levels.map(|level| level * scale)
    }

    /// Number of scalars.
    pub fn scalars(&self) -> usize {
        self.scalars
    }

    /// The codes, two a byte.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// Number of scalars of a block.
    pub fn block(&self) -> usize {
        self.block
    }

    /// What each code stands for, times the block's scale.
    pub fn levels(&self) -> &[f32; 16] {
        &self.levels
    }

    pub fn scales(&self) -> &Scales {
        &self.scales
    }

    /// The factor on the levels of a block.
    #[inline]
    pub fn scale(&self, block: usize) -> f32 {
        match &self.scales {
            Scales::Plain(absmax) => absmax[block],
            Scales::Nested(nested) => nested.scale(block),
        }
    }

    /// The code of a scalar, 0 to 15.
    #[inline]
    pub fn code(&self, scalar: usize) -> usize {
        let pair = self.codes[scalar / 2];
        usize::from(if scalar.is_multiple_of(2) {
            pair >> 4
        } else {
            pair & 15
        })
    }

    /// Writes the scalars from `first` on to `out`.
    pub fn dequantise(&self, first: usize, out: &mut [f32]) {
        let mut scalar = first;
        let mut rest = out;
        while !rest.is_empty() {
            let left = self.block - scalar % self.block;
            let (run, after) = rest.split_at_mut(left.min(rest.len()));
            let levels = self.levels_of(scalar / self.block);
            for (index, out) in run.iter_mut().enumerate() {
                *out = levels[self.code(scalar + index)];
            }
            scalar += run.len();
            rest = after;
        }
    }

    /// Bytes that codes and scales take.
    pub fn bytes(&self) -> usize {
        self.codes.len() + self.scales.bytes()
    }
}

impl Scales {
    fn len(&self) -> usize {
        match self {
            Self::Plain(absmax) => absmax.len(),
            Self::Nested(nested) => nested.len(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Plain(absmax) => size_of_val(&absmax[..]),
            Self::Nested(nested) => nested.bytes(),
        }
    }
}

/// Bytes of so many scalars that Muster quantised.
pub fn bytes(scalars: u64, nested: bool) -> u64 {
    let blocks = scalars.div_ceil(BLOCK as u64);
    let scales = match nested {
        true => nested::bytes(blocks),
        false => blocks * size_of::<f32>() as u64,
    };
    scalars.div_ceil(2) + scales
}

/// Writes the codes of a block, and returns its largest magnitude.
fn quantise_block(scalars: &[f32], codes: &mut [u8]) -> f32 {
    let mut absmax = scalars.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
    let divisor = absmax.max(LEAST_ABSMAX);
    let inverse = 1.0 / divisor;
    let is_short = scalars.len() < BLOCK;
    let mut each = [0u8; BLOCK];
    let mut scaled = [0.0; BLOCK];
    for (scaled, scalar) in scaled.iter_mut().zip(scalars) {
        // A short block is divided instead, and keeps what it was divided by: so does bitsandbytes.
        let of_one = if is_short {
            scalar / divisor
        } else {
            scalar * inverse
        };
        *scaled = of_one.clamp(-1.0, 1.0);
    }
    if is_short {
        absmax = divisor;
    }
    // The nearest level; halfway between two it is the lower one.
    for pair in NF4_LEVELS.windows(2) {
        let middle = (pair[0] + pair[1]) / 2.0;
        for (code, scaled) in each.iter_mut().zip(&scaled) {
            *code += u8::from(*scaled > middle);
        }
    }
    // Behind an odd last scalar there is a zero.
    each[scalars.len()..].fill(7);
    for (codes, pair) in codes.iter_mut().zip(each.chunks_exact(2)) {
        *codes = pair[0] << 4 | pair[1];
    }
    absmax
}
