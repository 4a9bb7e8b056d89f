//! Moments of 8 bits (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022), stored as bitsandbytes stores them.
//!
//! A block's moments are opened in float32, updated as float32 moments are, and closed again: none but those of the blocks in hand
//! is ever in float32. The weights move by what the moments are before they are rounded.
//!
//! A code is that of the nearest value of a [dynamic map](common::dynamic_map), of two the lower, for the moment divided by the
//! largest magnitude of its block. bitsandbytes 0.50 does so on GPUs, and rounds a few moments otherwise:
//! - There a second moment below a six millionth of its block's largest becomes 0, and the next update divides by little more
//!   than epsilon (`csrc/kernels.cu`, `kOptimizerStatic8bit2StateBlockwise`). Here what is above 0 stays above 0.
//! - There a negative first moment nearest to 0 becomes the least negative value, a positive one 0. Here both become 0.
//! - Its processor path finds codes among 65,536 equal places (`csrc/cpu_ops.cpp`), too few for the smallest values.

use std::sync::LazyLock;

use common::dynamic_map::{self, Map};
use common::files::moments::{BLOCK_SCALARS, BlocksMut};
use rayon::prelude::*;

use super::UPDATE_CHUNK;
use crate::engine::mean_gradient::MeanSource;
use crate::engine::ops::vector::{LANES, dispatch};

const _: () = assert!(UPDATE_CHUNK.is_multiple_of(BLOCK_SCALARS));

/// The upper half of a float32's bits: numbers that share it lie next to each other.
const PREFIXES: usize = 1 << 16;

/// The values that codes stand for, and how the nearest one is found.
pub(in crate::engine) struct Codebook {
    pub map: &'static Map,
    /// What is above the limit of a code has a higher one; that of the last is infinite.
    pub limits: [f32; 256],
    /// The lowest code among the numbers of each prefix. The others have this one or the next.
    lowest: Box<[u8]>,
}

impl Codebook {
    /// The codes of what may have either sign.
    pub fn signed() -> &'static Self {
        static CODES: LazyLock<Codebook> =
            LazyLock::new(|| Codebook::new(dynamic_map::signed(), None));
        &CODES
    }

    /// The codes of what is never negative.
    pub fn unsigned() -> &'static Self {
        // What is above 0 stays above it.
        static CODES: LazyLock<Codebook> =
            LazyLock::new(|| Codebook::new(dynamic_map::unsigned(), Some(0.0)));
        &CODES
    }

    fn new(map: &'static Map, first_limit: Option<f32>) -> Self {
        let mut limits = [f32::INFINITY; 256];
        for (limit, pair) in limits.iter_mut().zip(map.windows(2)) {
            *limit = (pair[0] + pair[1]) * 0.5;
        }
        limits[0] = first_limit.unwrap_or(limits[0]);
        let code = |x: f32| limits.partition_point(|limit| x > *limit) as u8;
        let lowest = (0..PREFIXES as u32).map(|prefix| {
            let [one, other] = [0, 0xffff].map(|rest| f32::from_bits(prefix << 16 | rest));
            match one.is_finite() && other.is_finite() {
                true => code(one.min(other)),
                // No moment of finite gradients. The same on every machine, whatever bits its NaN has.
                false => u8::MAX,
            }
        });
        Self {
            map,
            limits,
            lowest: lowest.collect(),
        }
    }

    /// The code of a number from -1 to 1.
    #[inline(always)]
    fn code(&self, x: f32) -> u8 {
        let lowest = self.lowest[(x.to_bits() >> 16) as usize];
        lowest + u8::from(x > self.limits[usize::from(lowest)])
    }

    #[inline(always)]
    fn open(&self, codes: &[u8], absmax: f32, values: &mut [f32]) {
        for (value, code) in values.iter_mut().zip(codes) {
            *value = self.map[usize::from(*code)] * absmax;
        }
    }

    /// Writes the codes of a block and returns its largest magnitude.
    #[inline(always)]
    fn close(&self, values: &[f32], codes: &mut [u8]) -> f32 {
        let absmax = largest_magnitude(values).min(f32::MAX);
        if absmax == 0.0 {
            codes.fill(0);
            return 0.0;
        }
        // Apart from the look-ups, so that the divisions are vector code.
        let mut scaled = [0.0; BLOCK_SCALARS];
        for (scaled, value) in scaled.iter_mut().zip(values) {
            *scaled = *value / absmax;
        }
        for (code, scaled) in codes.iter_mut().zip(&scaled) {
            *code = self.code(*scaled);
        }
        absmax
    }
}

#[inline(always)]
fn largest_magnitude(values: &[f32]) -> f32 {
    let larger = |most: f32, x: f32| if x.abs() > most { x.abs() } else { most };
    let mut lanes = [0.0; LANES];
    for group in values.chunks(LANES) {
        for (most, x) in lanes.iter_mut().zip(group) {
            *most = larger(*most, *x);
        }
    }
    lanes.into_iter().fold(0.0, larger)
}

/// Some blocks of a tensor: its weights and moments, and where their gradient begins.
struct Task<'a, const N: usize> {
    weights: &'a mut [f32],
    moments: [BlocksMut<'a>; N],
    start: usize,
}

/// Updates a tensor whose moments are in 8 bits, each as its codebook says. `apply` updates the weights and moments of a block,
/// which are in float32 then, by their gradient; it must be `#[inline(always)]`.
pub(super) fn update_blocks<const N: usize>(
    codebooks: [&Codebook; N],
    mut weights: &mut [f32],
    mut moments: [&mut BlocksMut; N],
    (mean, first): (MeanSource, usize),
    apply: impl Fn(&mut [f32], &mut [[f32; BLOCK_SCALARS]; N], &[f32]) + Sync,
) {
    let mut moments = moments.each_mut().map(|blocks| BlocksMut {
        codes: &mut *blocks.codes,
        absmax: &mut *blocks.absmax,
    });
    let mut tasks = Vec::with_capacity(weights.len().div_ceil(UPDATE_CHUNK));
    let mut start = first;
    while !weights.is_empty() {
        let scalars = weights.len().min(UPDATE_CHUNK);
        tasks.push(Task {
            weights: split(&mut weights, scalars),
            moments: moments.each_mut().map(|blocks| BlocksMut {
                codes: split(&mut blocks.codes, scalars),
                absmax: split(&mut blocks.absmax, scalars.div_ceil(BLOCK_SCALARS)),
            }),
            start,
        });
        start += scalars;
    }
    tasks
        .into_par_iter()
        .for_each_init(Vec::new, |scratch, task| {
            let gradient = mean.read(task.start..task.start + task.weights.len(), scratch);
            dispatch(
                #[inline(always)]
                || update_task(codebooks, task, gradient, &apply),
            );
        });
}

fn split<'a, T>(rest: &mut &'a mut [T], count: usize) -> &'a mut [T] {
    rest.split_off_mut(..count)
        .expect("weights and moments are of one tensor")
}

#[inline(always)]
fn update_task<const N: usize>(
    codebooks: [&Codebook; N],
    task: Task<N>,
    gradient: &[f32],
    apply: &impl Fn(&mut [f32], &mut [[f32; BLOCK_SCALARS]; N], &[f32]),
) {
    let Task {
        weights,
        mut moments,
        ..
    } = task;
    let mut open = [[0.0; BLOCK_SCALARS]; N];
    let blocks = weights.chunks_mut(BLOCK_SCALARS);
    let blocks = blocks.zip(gradient.chunks(BLOCK_SCALARS));
    for (index, (weights, gradient)) in blocks.enumerate() {
        let scalars = weights.len();
        let start = index * BLOCK_SCALARS;
        for ((moment, open), codebook) in moments.iter().zip(&mut open).zip(codebooks) {
            let codes = &moment.codes[start..start + scalars];
            codebook.open(codes, moment.absmax[index], &mut open[..scalars]);
        }
        apply(weights, &mut open, gradient);
        for ((moment, open), codebook) in moments.iter_mut().zip(&open).zip(codebooks) {
            let codes = &mut moment.codes[start..start + scalars];
            moment.absmax[index] = codebook.close(&open[..scalars], codes);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
