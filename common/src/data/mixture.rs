//! In which order the rows of several datasets are trained on, and how often each.
//!
//! Enters: how many rows each dataset has, and how the job joins them. Leaves: the numbers of rows, counted over all
//! datasets. A pure function of both and the seed. What is taken by turns or at random, and until when, is as in
//! `interleave_datasets` of the library `datasets` 5.2; its draws are numpy's, ours are [`CounterRng`]'s.

use crate::job::{MixStrategy, MixtureSpec};
use crate::rng::CounterRng;
use crate::text::grouped;

/// Random streams: which dataset is next, and the order within each.
const STREAM_MIXTURE: u64 = u64::from_be_bytes(*b"mixture\0");
const STREAM_SETS: u64 = u64::from_be_bytes(*b"mix-sets");

/// Most rows of a mixture, and most draws that it takes: four bytes each.
const MAX_ROWS: u64 = 1 << 28;

/// Most rows of a mixture against those of its datasets, where that is more than a few.
const MAX_TIMES: u64 = 1000;
const FEW_ROWS: u64 = 100_000;

/// A dataset among those that are mixed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Set {
    /// Number of rows that it has.
    pub rows: u64,
    /// Its share of the rows of all sets, against their shares.
    pub fraction: Option<f64>,
    /// Number of times that every row comes.
    pub repeat: u64,
}

/// The rows in the order in which they are trained on; None where that is every row once, in the order of the data.
pub fn order(sets: &[Set], spec: &MixtureSpec, seed: u64) -> Result<Option<Vec<u32>>, String> {
    let is_plain = |set: &Set| set.fraction.is_none() && set.repeat == 1;
    let is_joined = spec.strategy == MixStrategy::Concat || sets.len() == 1;
    if is_joined && !spec.shuffle_sets && sets.iter().all(is_plain) {
        return Ok(None);
    }
    let rows: u64 = sets.iter().map(|set| set.rows).sum();
    if rows > u64::from(u32::MAX) {
        return Err(format!(
            "{} rows are too many to be mixed: at most {} are",
            grouped(rows),
            grouped(u64::from(u32::MAX))
        ));
    }
    let taken = taken(sets);
    let members = members(sets, &taken, spec, seed);
    let lengths: Vec<u64> = taken
        .iter()
        .zip(sets)
        .map(|(rows, set)| rows * set.repeat)
        .collect();
    if !is_joined {
        check_rows(&lengths, &spec.probabilities)?;
    }
    let most = MAX_ROWS.min(rows.saturating_mul(MAX_TIMES).max(FEW_ROWS));
    let mut order = Vec::new();
    let mut put = |set: usize, index: u64| {
        if order.len() as u64 >= most {
            return Err(too_long(most));
        }
        let members = &members[set];
        order.push(members[(index % members.len() as u64) as usize]);
        Ok(())
    };
    if is_joined {
        for (set, length) in lengths.iter().enumerate() {
            (0..*length).try_for_each(|index| put(set, index))?;
        }
    } else if spec.probabilities.is_empty() {
        by_turns(&lengths, spec.strategy, &mut put)?;
    } else {
        let mut rng = CounterRng::new(seed, &[STREAM_MIXTURE]);
        let draws = std::iter::from_fn(|| Some(drawn(&spec.probabilities, rng.uniform())));
        let draws = draws.take(MAX_ROWS as usize);
        at_random(&lengths, spec.strategy, draws, &mut put)?;
    }
    Ok(Some(order))
}

/// Refuses a set that is to be taken from and has no rows.
fn check_rows(lengths: &[u64], probabilities: &[f64]) -> Result<(), String> {
    let is_wanted = |set: usize| probabilities.get(set).is_none_or(|share| *share > 0.0);
    let empty = (0..lengths.len()).find(|set| lengths[*set] == 0 && is_wanted(*set));
    match empty {
        None => Ok(()),
        Some(set) => Err(format!(
            "dataset {} of the job has no rows that could be mixed with the others: remove it, or what leaves its rows out",
            set + 1
        )),
    }
}

fn too_long(most: u64) -> String {
    format!(
        "the mixture of the datasets has more than {} rows: give those that are rare a larger share, or take mix_strategy: interleave_under",
        grouped(most)
    )
}

/// How many rows of each set are taken: all, or the first ones that keep the sets' shares as TRL's `get_dataset` does.
fn taken(sets: &[Set]) -> Vec<u64> {
    let fractions: Option<Vec<f64>> = sets.iter().map(|set| set.fraction).collect();
    let Some(fractions) = fractions else {
        return sets.iter().map(|set| set.rows).collect();
    };
    let sum: f64 = fractions.iter().sum();
    let shares: Vec<f64> = fractions.iter().map(|fraction| fraction / sum).collect();
    let most = sets.iter().zip(&shares);
    let total = most
        .map(|(set, share)| set.rows as f64 / share)
        .fold(f64::INFINITY, f64::min);
    let taken = sets.iter().zip(&shares);
    taken
        .map(|(set, share)| ((share * total).round_ties_even() as u64).min(set.rows))
        .collect()
}

/// The rows of each set that are taken, in its order.
fn members(sets: &[Set], taken: &[u64], spec: &MixtureSpec, seed: u64) -> Vec<Vec<u32>> {
    let mut first = 0;
    let mut members = Vec::with_capacity(sets.len());
    for (index, set) in sets.iter().enumerate() {
        let mut rows: Vec<u32> = (first..first + set.rows).map(|row| row as u32).collect();
        if spec.shuffle_sets {
            CounterRng::new(seed, &[STREAM_SETS, index as u64]).shuffle(&mut rows);
        }
        rows.truncate(taken[index] as usize);
        members.push(rows);
        first += set.rows;
    }
    members
}

/// The set that a number in [0, 1) draws.
fn drawn(probabilities: &[f64], number: f64) -> usize {
    let mut sum = 0.0;
    let mut last = 0;
    for (set, probability) in probabilities.iter().enumerate() {
        if *probability > 0.0 {
            sum += probability;
            last = set;
        }
        if number < sum {
            return set;
        }
    }
    // The sum was rounded down.
    last
}

type Put<'a> = &'a mut dyn FnMut(usize, u64) -> Result<(), String>;

/// Takes a row of each set in turn.
fn by_turns(lengths: &[u64], strategy: MixStrategy, put: Put<'_>) -> Result<(), String> {
    let turns = match strategy {
        MixStrategy::InterleaveUnder => lengths.iter().min(),
        _ => lengths.iter().max(),
    };
    for turn in 0..turns.copied().unwrap_or(0) {
        for (set, length) in lengths.iter().enumerate() {
            let is_over = turn >= *length && strategy == MixStrategy::InterleaveOnce;
            if !is_over && *length > 0 {
                put(set, turn)?;
            }
        }
    }
    Ok(())
}

/// Takes the next row of the set that is drawn.
fn at_random(
    lengths: &[u64],
    strategy: MixStrategy,
    draws: impl Iterator<Item = usize>,
    put: Put<'_>,
) -> Result<(), String> {
    let mut counts = vec![0; lengths.len()];
    let mut left = lengths.iter().filter(|length| **length > 0).count();
    for set in draws {
        let length = lengths[set];
        let is_over = counts[set] >= length;
        if length == 0 || is_over && strategy == MixStrategy::InterleaveOnce {
            continue;
        }
        put(set, counts[set])?;
        counts[set] += 1;
        left -= usize::from(counts[set] == length);
        if left == 0 || counts[set] == length && strategy == MixStrategy::InterleaveUnder {
            return Ok(());
        }
    }
    Err(format!(
        "after {} draws the rows of the datasets are still not all there: give those that are rare a larger share, or take mix_strategy: interleave_under",
        grouped(MAX_ROWS)
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
