//! The exact sum, whatever the schedule: any partition and order give the bits of one worker, and every scalar is
//! rounded by the one rule.
#![allow(clippy::unwrap_used)]

use common::exact::{FixedPoint, dequantize};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

const SCALARS: usize = 4;
/// 2^-48
const UNIT: f64 = 1.0 / (1u64 << 48) as f64;

/// Nothing is written beside the sources: a failure is printed as the smallest input that shows it.
fn cases(count: u32) -> Config {
    Config {
        cases: count,
        failure_persistence: None,
        ..Config::default()
    }
}

/// Mostly what training brings, now and then anything that a float can be.
fn gradient() -> impl Strategy<Value = f32> {
    prop_oneof![
        6 => -1.0f32..1.0,
        3 => -1e-9f32..1e-9,
        2 => -1e4f32..1e4,
        1 => proptest::num::f32::ANY,
    ]
}

/// A step and how it was computed.
#[derive(Clone, Debug)]
struct Schedule {
    trained_tokens: u64,
    /// By slot.
    gradients: Vec<Vec<f32>>,
    /// By slot: the worker that computes it.
    owners: Vec<usize>,
    /// In which the slots are computed, and the workers' sums added.
    order: Vec<usize>,
    merge: Vec<usize>,
}

fn schedules(slots: usize, workers: usize) -> impl Strategy<Value = Schedule> {
    let order = Just((0..slots).collect::<Vec<_>>()).prop_shuffle();
    let merge = Just((0..workers).collect::<Vec<_>>()).prop_shuffle();
    let gradients = vec(vec(gradient(), SCALARS), slots);
    let owners = vec(0..workers, slots);
    (1u64..1 << 20, gradients, owners, order, merge).prop_map(
        |(trained_tokens, gradients, owners, order, merge)| Schedule {
            trained_tokens,
            gradients,
            owners,
            order,
            merge,
        },
    )
}

/// Sums and invalid scalars of the slots in this order.
fn accumulate(
    rule: &FixedPoint,
    schedule: &Schedule,
    slots: impl Iterator<Item = usize>,
) -> (Vec<i64>, u64) {
    let mut sums = vec![0; SCALARS];
    let invalid = slots.map(|slot| rule.accumulate(&mut sums, &schedule.gradients[slot]));
    let invalid = invalid.sum();
    (sums, invalid)
}

#[test]
fn every_number_of_slots_and_workers_gives_the_bits_of_one_worker() {
    for slots in 1..=64 {
        for workers in 1..=8 {
            let mut runner = TestRunner::new(cases(4));
            let checked = runner.run(&schedules(slots, workers), |schedule| {
                let rule = FixedPoint::new(schedule.trained_tokens, slots);
                let (expected, expected_invalid) = accumulate(&rule, &schedule, 0..slots);
                let (mut sums, mut invalid) = (vec![0i64; SCALARS], 0);
                for &worker in &schedule.merge {
                    let own = |slot: &usize| schedule.owners[*slot] == worker;
                    let own = schedule.order.iter().copied().filter(own);
                    let (part, part_invalid) = accumulate(&rule, &schedule, own);
                    for (sum, part) in sums.iter_mut().zip(part) {
                        *sum = sum.wrapping_add(part);
                    }
                    invalid += part_invalid;
                }
                prop_assert_eq!(&sums, &expected);
                prop_assert_eq!(invalid, expected_invalid);
                for (sum, expected) in sums.iter().zip(&expected) {
                    prop_assert_eq!(dequantize(*sum).to_bits(), dequantize(*expected).to_bits());
                }
                Ok(())
            });
            checked.unwrap_or_else(|failure| panic!("{slots} slots, {workers} workers: {failure}"));
        }
    }
}

/// `numerator / denominator` to the nearest integer, a tie to the even one.
fn round_half_even(numerator: i128, denominator: i128) -> i128 {
    let (floor, rest) = (
        numerator.div_euclid(denominator),
        numerator.rem_euclid(denominator),
    );
    match (2 * rest).cmp(&denominator) {
        std::cmp::Ordering::Less => floor,
        std::cmp::Ordering::Greater => floor + 1,
        std::cmp::Ordering::Equal => floor + floor.rem_euclid(2),
    }
}

/// `g * 2^48 / trained_tokens` as a fraction. `g` is between 2^-80 and 2^10 or zero.
fn fraction(g: f32, trained_tokens: u64) -> (i128, i128) {
    let bits = g.to_bits();
    let exponent = ((bits >> 23) & 0xff) as i32 - 127 - 23 + 48;
    let significand = i128::from((bits & 0x7f_ffff) | 0x80_0000);
    let magnitude = if g == 0.0 { 0 } else { significand };
    let signed = if g < 0.0 { -magnitude } else { magnitude };
    let tokens = i128::from(trained_tokens);
    match exponent {
        0.. => (signed << exponent, tokens),
        _ => (signed, tokens << -exponent),
    }
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn a_tie_goes_to_the_even_integer(below in 0i64..1 << 22, negative: bool, shift in 0u32..20) {
        let trained_tokens = 1u64 << shift;
        let sign = if negative { -1.0 } else { 1.0 };
        // Exact: 24 bits and a power of two.
        let gradient = sign * (below as f64 + 0.5) * UNIT * trained_tokens as f64;
        prop_assert_eq!(f64::from(gradient as f32), gradient);
        let even = (below + below % 2) * sign as i64;
        let rule = FixedPoint::new(trained_tokens, 64);
        prop_assert_eq!(rule.quantize(gradient as f32), Some(even));
    }

    #[test]
    fn many_scalars_are_rounded_as_one_is(gradients in vec(gradient(), 1..70), trained_tokens in 1u64..1 << 20) {
        let rule = FixedPoint::new(trained_tokens, 3);
        let mut sums = vec![0; gradients.len()];
        let invalid = rule.accumulate(&mut sums, &gradients);
        let each: Vec<Option<i64>> = gradients.iter().map(|g| rule.quantize(*g)).collect();
        prop_assert_eq!(invalid, each.iter().filter(|q| q.is_none()).count() as u64);
        prop_assert_eq!(sums, each.iter().map(|q| q.unwrap_or(0)).collect::<Vec<_>>());
    }

    #[test]
    fn rounding_is_exact_where_the_division_is(
        gradient in prop_oneof![-8.0f32..8.0, -1e-10f32..1e-10],
        shift in 0u32..20,
    ) {
        prop_assume!(gradient == 0.0 || gradient.abs() > 1e-20);
        let trained_tokens = 1u64 << shift;
        let (numerator, denominator) = fraction(gradient, trained_tokens);
        let expected = round_half_even(numerator, denominator);
        let rule = FixedPoint::new(trained_tokens, 8);
        prop_assert_eq!(rule.quantize(gradient).map(i128::from), Some(expected));
    }

    #[test]
    fn no_scalar_is_off_by_more_than_half_a_unit(
        gradient in prop_oneof![-1e-3f32..1e-3, -1e-10f32..1e-10],
        trained_tokens in 1u64..1 << 20,
    ) {
        prop_assume!(gradient == 0.0 || gradient.abs() > 1e-20);
        let (numerator, denominator) = fraction(gradient, trained_tokens);
        let rule = FixedPoint::new(trained_tokens, 8);
        let quantized = i128::from(rule.quantize(gradient).unwrap());
        // The division rounds once more, to 53 bits: below 2^39 that is less than 2^-12 of a unit.
        let error = (quantized * denominator - numerator).abs();
        prop_assert!(error * 2 * 4096 <= denominator * 4097);
    }

    #[test]
    fn the_largest_gradients_cannot_overflow_the_sum(slots in 1usize..=64, trained_tokens in 1u64..1 << 20) {
        let rule = FixedPoint::new(trained_tokens, slots);
        // Positive floats are ordered as their bits are.
        let (mut allowed, mut refused) = (0, f32::INFINITY.to_bits());
        while refused - allowed > 1 {
            let middle = (allowed + refused) / 2;
            match rule.quantize(f32::from_bits(middle)) {
                Some(_) => allowed = middle,
                None => refused = middle,
            }
        }
        let largest = f32::from_bits(allowed);
        prop_assert_eq!(rule.quantize(largest.next_up()), None);
        for gradient in [largest, -largest] {
            let mut sums = [0];
            for _ in 0..slots {
                prop_assert_eq!(rule.accumulate(&mut sums, &[gradient]), 0);
            }
            let expected = slots as i128 * i128::from(rule.quantize(gradient).unwrap());
            prop_assert_eq!(i128::from(sums[0]), expected);
        }
    }
}
