//! The mean of float32 numbers as PyTorch computes it on one thread of a processor, so that the scales that are nested
//! around it have bitsandbytes' own bytes.
//!
//! Source: PyTorch 2.15, `aten/src/ATen/native/cpu/SumKernel.cpp` (`cascade_sum`): four sums of eight lanes each, which are
//! carried over to the next of four levels after ever more rows.

const LANES: usize = 8;
/// Sums beside each other.
const SUMS: usize = 4;
const LEVELS: usize = 4;

/// The sum of all numbers in that order, divided by their count.
pub(super) fn mean(numbers: &[f32]) -> f32 {
    // So few are no vector.
    match numbers.len() {
        0 => 0.0,
        1..LANES => sum::<1>(numbers) / numbers.len() as f32,
        _ => sum::<LANES>(numbers) / numbers.len() as f32,
    }
}

fn sum<const WIDTH: usize>(numbers: &[f32]) -> f32 {
    let (rows, rest) = numbers.as_chunks::<WIDTH>();
    let (groups, odd) = rows.as_chunks::<SUMS>();
    let mut partial = in_levels(groups);
    for row in odd {
        add(&mut partial[0], row);
    }
    let [mut total, others @ ..] = partial;
    for other in &others {
        add(&mut total, other);
    }
    rest.iter()
        .chain(&total)
        .fold(0.0, |sum, number| sum + number)
}

/// The sums of all groups, lane by lane.
fn in_levels<const WIDTH: usize>(groups: &[[[f32; WIDTH]; SUMS]]) -> [[f32; WIDTH]; SUMS] {
    let bits = usize::BITS - groups.len().saturating_sub(1).leading_zeros();
    let power = (bits as usize / LEVELS).max(4);
    let mut levels = [[[0.0; WIDTH]; SUMS]; LEVELS];
    let add_all = |to: &mut [[f32; WIDTH]; SUMS], from: &[[f32; WIDTH]; SUMS]| {
        for (to, from) in to.iter_mut().zip(from) {
            add(to, from);
        }
    };
    let whole = groups.chunks_exact(1 << power);
    let rest = whole.remainder();
    for (index, groups) in whole.enumerate() {
        for group in groups {
            add_all(&mut levels[0], group);
        }
        let done = (index + 1) << power;
        for level in 1..LEVELS {
            let lower = std::mem::replace(&mut levels[level - 1], [[0.0; WIDTH]; SUMS]);
            add_all(&mut levels[level], &lower);
            if done & (((1 << power) - 1) << (level * power)) != 0 {
                break;
            }
        }
    }
    for group in rest {
        add_all(&mut levels[0], group);
    }
    let [mut lowest, upper @ ..] = levels;
    for level in &upper {
        add_all(&mut lowest, level);
    }
    lowest
}

fn add<const WIDTH: usize>(to: &mut [f32; WIDTH], from: &[f32; WIDTH]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += from;
    }
}
