//! The exact sum through the real accumulator and the real exchange: whatever the schedule, every rank gets the bits,
//! and finds the invalid scalars, that one worker alone does.
#![allow(clippy::unwrap_used)]

mod mesh;

use common::job::Reduction;
use mesh::{collectives, enter};
use proptest::collection::vec;
use proptest::prelude::*;
use worker::collective::{AllReduced, Contribution, LocalSums};
use worker::engine::accumulator::{self, Accumulator};
use worker::engine::slot::{HeldSlots, SlotOutcome};

/// More than one piece of a chunk for few members, and a remainder for all.
const SCALARS: usize = 70_001;
/// Scalars that a case decides; the others are filled from them.
const CHOSEN: usize = 16;

#[derive(Clone, Debug)]
struct Case {
    workers: usize,
    trained_tokens: u64,
    /// By slot.
    chosen: Vec<Vec<f32>>,
    owners: Vec<usize>,
    order: Vec<usize>,
}

impl Case {
    /// The gradient of a slot: the chosen scalars all over it.
    fn gradient(&self, slot: usize) -> Vec<f32> {
        let chosen = &self.chosen[slot];
        (0..SCALARS)
            .map(|i| match i % 101 {
                at if at < CHOSEN => chosen[at],
                at => at as f32 * 1e-3 * (slot as f32 - 3.5),
            })
            .collect()
    }

    fn accumulate(&self, slots: impl Iterator<Item = usize>) -> Accumulator {
        let mut accumulator = Accumulator::new(Reduction::Exact, SCALARS);
        accumulator.begin(7, self.trained_tokens, self.chosen.len());
        for slot in slots {
            accumulator.add(slot as u32, [&self.gradient(slot)[..]]);
        }
        accumulator
    }
}

fn case(invalid_too: bool) -> impl Strategy<Value = Case> {
    let gradient = match invalid_too {
        true => prop_oneof![
            8 => -1.0f32..1.0,
            1 => proptest::num::f32::ANY,
            1 => prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30]),
        ]
        .boxed(),
        false => prop_oneof![-1.0f32..1.0, -1e-9f32..1e-9].boxed(),
    };
    (1usize..=64, 1usize..=8).prop_flat_map(move |(slots, workers)| {
        let order = Just((0..slots).collect::<Vec<_>>()).prop_shuffle();
        let chosen = vec(vec(gradient.clone(), CHOSEN), slots);
        (1u64..1 << 20, chosen, vec(0..workers, slots), order).prop_map(
            move |(trained_tokens, chosen, owners, order)| Case {
                workers,
                trained_tokens,
                chosen,
                owners,
                order,
            },
        )
    })
}

/// What each rank gets.
fn exchange(accumulators: &[Accumulator], slots: usize) -> Vec<AllReduced> {
    let members = collectives(accumulators.len());
    enter(&members, 1);
    std::thread::scope(|scope| {
        let threads: Vec<_> = members
            .iter()
            .zip(accumulators)
            .map(|(member, accumulator)| {
                scope.spawn(move || {
                    let accumulator::Sums::Exact { sums, invalid } = accumulator.sums() else {
                        unreachable!("made as exact");
                    };
                    let held: HeldSlots = accumulator
                        .held()
                        .iter()
                        .map(|slot| (*slot, SlotOutcome::default()))
                        .collect();
                    let contribution = Contribution {
                        step: 7,
                        slots: slots as u32,
                        held: &held,
                        sums: LocalSums::Packed(sums),
                        invalid: *invalid,
                    };
                    member.mesh(1).unwrap().all_reduce(&contribution).unwrap()
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

fn check(case: &Case) -> Result<(), TestCaseError> {
    let slots = case.chosen.len();
    let alone = case.accumulate(0..slots);
    let expected: Vec<u32> = alone.mean().iter().map(|mean| mean.to_bits()).collect();
    let accumulators: Vec<Accumulator> = (0..case.workers)
        .map(|worker| {
            let own = |slot: &usize| case.owners[*slot] == worker;
            case.accumulate(case.order.iter().copied().filter(own))
        })
        .collect();
    for (rank, reduced) in exchange(&accumulators, slots).into_iter().enumerate() {
        let bits: Vec<u32> = reduced
            .mean
            .values
            .iter()
            .map(|mean| mean.to_bits())
            .collect();
        // Not prop_assert_eq, which would print them all.
        prop_assert!(bits == expected, "rank {rank} has other bits");
        prop_assert_eq!(reduced.mean.invalid, alone.invalid(), "rank {}", rank);
    }
    Ok(())
}

/// Nothing is written beside the sources: a failure is printed as the smallest input that shows it.
fn cases() -> ProptestConfig {
    ProptestConfig {
        cases: 24,
        max_shrink_iters: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn every_rank_gets_the_bits_of_one_worker_alone(case in case(false)) {
        check(&case)?;
    }

    #[test]
    fn every_rank_finds_the_same_invalid_scalars(case in case(true)) {
        check(&case)?;
    }
}
