//! The exact sum: slot gradients in 64-bit fixed point, so that their sum does not depend on order, partition or
//! topology (the order-invariant sum of Hallberg and Adcroft, 2014).
//!
//! In: float32 gradients of a slot's *summed* token loss. Out: the mean gradient in float32, the same bits everywhere.

#[cfg(target_arch = "x86_64")]
use crate::instruction_set::InstructionSet;

/// 2^48: the fixed-point unit is 2^-48 of the mean gradient.
const SCALE: f64 = (1u64 << 48) as f64;

/// The rule of one step: how its gradients become integers. Built from the plan, equal on all workers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FixedPoint {
    trained_tokens: f64,
    /// Largest magnitude a slot may add, so that no sum over the step's slots can overflow.
    limit: f64,
}

impl FixedPoint {
    /// `trained_tokens` (T, the divisor) and `slots` are those of the whole step, over all workers; both at least 1.
    pub fn new(trained_tokens: u64, slots: usize) -> Self {
        assert!(trained_tokens > 0 && slots > 0, "a step without work");
        Self {
            trained_tokens: trained_tokens as f64,
            limit: (i64::MAX / slots as i64) as f64 / 2.0,
        }
    }

    /// The rule for a slot that adds to a scalar in up to so many parts.
    pub fn of_parts(&self, parts: u64) -> Self {
        Self {
            limit: self.limit / parts.max(1) as f64,
            ..*self
        }
    }

    /// T, for who rounds elsewhere than here.
    pub fn trained_tokens(&self) -> f64 {
        self.trained_tokens
    }

    /// The largest magnitude, in units of 2^-48, that one gradient may have.
    pub fn limit(&self) -> f64 {
        self.limit
    }

    /// `round_half_even(g * 2^48 / T)`, or `None` where `g` is not finite or out of range.
    #[inline(always)]
    pub fn quantize(&self, gradient: f32) -> Option<i64> {
        let scaled = (f64::from(gradient) * SCALE / self.trained_tokens).round_ties_even();
        // A NaN fails the comparison.
        let fits = scaled.abs() <= self.limit;
        let scaled = if fits { scaled } else { 0.0 };
        // SAFETY: no limit is above half of the range. A cast that looks for values beyond it makes no vector code.
        let integer = unsafe { scaled.to_int_unchecked() };
        fits.then_some(integer)
    }

    /// [`quantize`](Self::quantize) with instructions that AVX2 has for vectors, too: among these is no conversion to 64 bits, so that the
    /// upper and the lower 32 are made apart, each in the mantissa of a number that is added.
    #[inline(always)]
    pub fn quantize_in_halves(&self, gradient: f32) -> Option<i64> {
        /// Added to a smaller number, it rounds it to the nearest integer, ties to even, and leaves that in its lower bits.
        const ROUND: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52
        const UPPER: f64 = 4_294_967_296.0; // 2^32
        let integer = |sum: f64| (sum.to_bits() as i64).wrapping_sub(ROUND.to_bits() as i64);
        let scaled = f64::from(gradient) * SCALE / self.trained_tokens;
        let upper = scaled * (1.0 / UPPER) + ROUND;
        let upper_part = (upper - ROUND) * UPPER;
        let lower = scaled - upper_part + ROUND;
        // A NaN fails the comparison.
        let fits = (upper_part + (lower - ROUND)).abs() <= self.limit;
        let rounded = (integer(upper) << 32).wrapping_add(integer(lower));
        fits.then_some(rounded)
    }

    /// Adds a slot's gradient to `sums`, element by element, and returns how many elements were invalid. Invalid
    /// elements add nothing; the caller counts them in the exchange, and any of them skips the step on every worker.
    pub fn accumulate(&self, sums: &mut [i64], gradient: &[f32]) -> u64 {
        assert_eq!(
            sums.len(),
            gradient.len(),
            "gradient and sum differ in length"
        );
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f,avx512dq,avx512vl")]
            fn with_avx512(rule: &FixedPoint, sums: &mut [i64], gradient: &[f32]) -> u64 {
                accumulate_each(sums, gradient, |g| rule.quantize(g))
            }
            #[target_feature(enable = "avx2")]
            fn with_avx2(rule: &FixedPoint, sums: &mut [i64], gradient: &[f32]) -> u64 {
                accumulate_each(sums, gradient, |g| rule.quantize_in_halves(g))
            }
            match InstructionSet::chosen() {
                InstructionSet::Scalar => {}
                // SAFETY: the processor has the instructions.
                InstructionSet::Avx2 => return unsafe { with_avx2(self, sums, gradient) },
                InstructionSet::Avx512 | InstructionSet::Avx512Bf16 => {
                    // SAFETY: as above.
                    return unsafe { with_avx512(self, sums, gradient) };
                }
            }
        }
        accumulate_each(sums, gradient, |g| self.quantize(g))
    }
}

/// Compiled for more than one instruction set; the bits are the same.
#[inline(always)]
fn accumulate_each(
    sums: &mut [i64],
    gradient: &[f32],
    quantize: impl Fn(f32) -> Option<i64>,
) -> u64 {
    let mut invalid = 0;
    for (sum, &g) in sums.iter_mut().zip(gradient) {
        let q = quantize(g);
        invalid += u64::from(q.is_none());
        // Wrapping, because partial sums may leave the range and come back; the limit keeps the total in it.
        *sum = sum.wrapping_add(q.unwrap_or(0));
    }
    invalid
}

/// The mean gradient of a finished sum.
#[inline]
pub fn dequantize(sum: i64) -> f32 {
    (sum as f64 * (1.0 / SCALE)) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::CounterRng;

    fn sum(slots: &[Vec<f32>], order: &[usize]) -> Vec<i64> {
        let rule = FixedPoint::new(1000, slots.len());
        let mut sums = vec![0; slots[0].len()];
        for &slot in order {
            assert_eq!(rule.accumulate(&mut sums, &slots[slot]), 0);
        }
        sums
    }

    #[test]
    fn a_gradient_is_quantised_alike_in_one_piece_and_in_halves() {
        let mut rng = CounterRng::new(3, &[]);
        for (tokens, slots) in [(1, 1), (1000, 3), (7, 5000), (1 << 20, 1 << 12)] {
            let rule = FixedPoint::new(tokens, slots);
            let check = |g: f32| assert_eq!(rule.quantize_in_halves(g), rule.quantize(g), "{g:e}");
            for g in [
                0.0,
                -0.0,
                f32::NAN,
                f32::INFINITY,
                -f32::INFINITY,
                f32::MAX,
                f32::MIN_POSITIVE,
            ] {
                check(g);
            }
            // Ties, and what is just beside the limit.
            for half in 1..100 {
                let tie = half as f64 * 0.5 * tokens as f64 / SCALE;
                [tie, -tie].into_iter().for_each(|g| check(g as f32));
            }
            let limit = (rule.limit() * tokens as f64 / SCALE) as f32;
            for step in 0..16 {
                let beside = f32::from_bits(limit.to_bits() - 8 + step);
                [beside, -beside].into_iter().for_each(check);
            }
            for _ in 0..20_000 {
                check(f32::from_bits(rng.next_u64() as u32));
                check(rng.normal() as f32 * 1e-3);
            }
        }
    }

    #[test]
    fn any_order_and_partition_gives_the_same_bits() {
        let mut rng = CounterRng::new(7, &[]);
        for slot_count in [1usize, 2, 3, 17, 64] {
            let slots: Vec<Vec<f32>> = (0..slot_count)
                .map(|_| (0..33).map(|_| rng.normal() as f32).collect())
                .collect();
            let mut order: Vec<usize> = (0..slot_count).collect();
            let expected = sum(&slots, &order);
            rng.shuffle(&mut order);
            let cut = rng.below(slot_count as u64 + 1) as usize;
            let (left, right) = (sum(&slots, &order[..cut]), sum(&slots, &order[cut..]));
            let joined: Vec<i64> = left
                .iter()
                .zip(&right)
                .map(|(a, b)| a.wrapping_add(*b))
                .collect();
            assert_eq!(joined, expected);
        }
    }

    #[test]
    fn the_mean_is_exact_to_the_resolution() {
        let rule = FixedPoint::new(3, 2);
        let mut sums = [0];
        rule.accumulate(&mut sums, &[1.0]);
        rule.accumulate(&mut sums, &[2.0]);
        assert_eq!(dequantize(sums[0]), 1.0);
    }

    #[test]
    fn parts_share_a_slot_s_range() {
        let rule = FixedPoint::new(1, 1);
        let largest = 16_000.0;
        assert!(rule.quantize(largest).is_some());
        assert_eq!(rule.of_parts(1), rule);
        assert_eq!(rule.of_parts(2).quantize(largest), None);
        assert_eq!(rule.of_parts(2).quantize(1.5), rule.quantize(1.5));
    }

    #[test]
    fn values_that_are_not_finite_or_out_of_range_are_counted() {
        let rule = FixedPoint::new(1, 4);
        let mut sums = [0; 4];
        let invalid = rule.accumulate(&mut sums, &[f32::NAN, f32::INFINITY, 1e30, 0.5]);
        assert_eq!((invalid, sums), (3, [0, 0, 0, 1 << 47]));
    }
}
