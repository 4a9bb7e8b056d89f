//! Weights that are trained in bfloat16: widened piece by piece, updated as float32 weights are, and rounded by chance.
//!
//! Most updates are smaller than half the distance between two numbers of bfloat16, and rounding to the nearest would lose all of
//! them. Rounded by chance (Gupta et al., "Deep Learning with Limited Numerical Precision", 2015), a weight between two numbers
//! becomes the upper one as often as it is near to it, so that on average nothing is lost. The chance is a function of the seed, the
//! number of the update, the tensor and the place in it: the same for any number of threads and workers, and after a resume.

use common::files::moments::{BLOCK_SCALARS, MomentPartMut};
use common::rng::CounterRng;
use half::bf16;
use rayon::prelude::*;

use super::{TensorUpdate, UPDATE_CHUNK, Update};
use crate::engine::mean_gradient::MeanSource;
use crate::engine::memory;
use crate::engine::ops::element::widen;
use crate::engine::ops::vector::dispatch;

/// Stream of the counter-based generator that decides how weights are rounded.
const STREAM_ROUNDING: u64 = 0x726f_756e_6469_6e67;

/// Scalars of a tensor that are in float32 at a time.
const PIECE: usize = 64 * UPDATE_CHUNK;

const _: () = assert!(PIECE.is_multiple_of(BLOCK_SCALARS));
const _: () = assert!(UPDATE_CHUNK.is_multiple_of(CounterRng::NUMBERS_PER_WORD as usize));

/// Updates a tensor's weights and moments in place, as [`TensorUpdate::apply`] does.
pub(super) fn apply(
    rule: &TensorUpdate,
    update: &Update,
    weights: &mut [bf16],
    mut moments: Vec<MomentPartMut>,
    (mean, first): (MeanSource, usize),
) {
    // What is updated as a whole is widened as a whole.
    let piece = match rule.is_wide() {
        true => weights.len(),
        false => PIECE,
    };
    let key = [STREAM_ROUNDING, update.number, first as u64];
    let mut wide = memory::zeros(piece.min(weights.len()));
    for (index, weights) in weights.chunks_mut(piece.max(1)).enumerate() {
        let (start, wide) = (index * piece, &mut wide[..weights.len()]);
        wide.par_chunks_mut(UPDATE_CHUNK)
            .zip(weights.par_chunks(UPDATE_CHUNK))
            .for_each(|(wide, weights)| widen(weights, wide));
        let moments = moments.iter_mut();
        let moments = moments.map(|moment| moment.split_off(weights.len()));
        rule.apply_f32(update, wide, moments.collect(), (mean, first + start));
        round(wide, weights, (rule.seed, &key), start);
    }
}

/// Rounds some weights of a tensor, of which `start` is the first, each by a random number of its own.
fn round(wide: &[f32], weights: &mut [bf16], (seed, key): (u64, &[u64]), start: usize) {
    weights
        .par_chunks_mut(UPDATE_CHUNK)
        .zip(wide.par_chunks(UPDATE_CHUNK))
        .enumerate()
        .for_each(|(chunk, (weights, wide))| {
            let mut rng = CounterRng::new(seed, key);
            rng.skip((start + chunk * UPDATE_CHUNK) as u64 / CounterRng::NUMBERS_PER_WORD);
            let mut numbers = [0; UPDATE_CHUNK];
            rng.fill(&mut numbers[..weights.len()]);
            dispatch(
                #[inline(always)]
                || {
                    for ((weight, wide), number) in weights.iter_mut().zip(wide).zip(&numbers) {
                        *weight = rounded(*wide, *number);
                    }
                },
            );
        });
}

/// The number of bfloat16 below or above `x` in magnitude: above as often, over all numbers, as `x` is near to it. What is a number of
/// bfloat16, infinite or no number at all stays so.
#[inline(always)]
fn rounded(x: f32, number: u16) -> bf16 {
    let bits = x.to_bits();
    let by_chance = bits.wrapping_add(u32::from(number)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    bf16::from_bits(if x.is_nan() { quiet } else { by_chance } as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::optim::{Rule, Sgd};
    use crate::engine::testing::in_pool;

    /// Plain descent with a rate of 1: a weight moves by its gradient.
    fn descent(seed: u64) -> TensorUpdate {
        let rule = Rule::Sgd(Sgd {
            momentum: 0.0,
            dampening: 0.0,
            nesterov: false,
            weight_decay: 0.0,
        });
        TensorUpdate {
            rule,
            rate: 1.0,
            seed,
        }
    }

    fn updated(scalars: usize, gradient: f32, (seed, number): (u64, u64)) -> Vec<bf16> {
        let mut weights = vec![bf16::ONE; scalars];
        let gradients = vec![gradient; scalars + 3];
        let update = Update {
            number,
            learning_rate: 1.0,
            gradient_scale: 1.0,
        };
        let mean = (MeanSource::Values(&gradients), 3);
        apply(&descent(seed), &update, &mut weights, Vec::new(), mean);
        weights
    }

    #[test]
    fn a_small_update_is_right_on_average() {
        // 1 has 1 - 2^-8 below it, and moves by a tenth of the way.
        let below = 1.0 - 1.0 / 256.0;
        let weights = updated(1 << 20, 0.1 / 256.0, (7, 1));
        let moved = weights.iter().filter(|weight| weight.to_f32() == below);
        let moved = moved.count() as f64 / (1 << 20) as f64;
        // Ten standard deviations.
        assert!((moved - 0.1).abs() < 0.003, "{moved}");
        let others = weights.iter().filter(|weight| weight.to_f32() != below);
        assert!({ others }.all(|weight| *weight == bf16::ONE));
    }

    #[test]
    fn the_chance_depends_on_seed_update_and_place_alone() {
        // More than one piece.
        let scalars = PIECE + 3 * UPDATE_CHUNK + 5;
        let of = |threads, key| in_pool(threads, || updated(scalars, 0.4 / 256.0, key));
        let first = of(1, (7, 1));
        assert_eq!(of(3, (7, 1)), first);
        for other in [(8, 1), (7, 2)] {
            assert_ne!(of(2, other), first, "{other:?}");
        }
        assert_ne!(first[..UPDATE_CHUNK], first[UPDATE_CHUNK..2 * UPDATE_CHUNK]);
        assert_ne!(first[..UPDATE_CHUNK], first[PIECE..PIECE + UPDATE_CHUNK]);
    }

    #[test]
    fn what_bfloat16_has_stays_and_the_rest_goes_to_a_neighbour() {
        for x in [0.0, -0.0, 1.0, -3.5, f32::INFINITY, f32::NEG_INFINITY] {
            for number in [0, 1, u16::MAX] {
                let found = rounded(x, number);
                assert_eq!(found.to_f32().to_bits(), x.to_bits(), "{x}");
            }
        }
        assert!(rounded(f32::NAN, u16::MAX).is_nan());
        assert!(rounded(f32::from_bits(0x7f80_0001), 0).is_nan());
        // A quarter of the way up: three of four numbers round down.
        let x = f32::from_bits(0x3f80_4000);
        assert_eq!(rounded(x, 0xbfff), bf16::ONE);
        assert_eq!(rounded(x, 0xc000), bf16::from_bits(0x3f81));
        assert_eq!(rounded(-x, 0xc000), bf16::from_bits(0xbf81));
    }
}
