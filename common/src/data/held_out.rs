//! Which rows are held out for evaluation.

use crate::job::{JobSpec, ValSetSize};
use crate::rng::CounterRng;

/// Random stream that draws which examples are held out.
const STREAM_VALIDATION: u64 = u64::from_be_bytes(*b"validate");

/// For each row, whether it is held out for validation: drawn from the seed, or of the last rows where nothing is shuffled. The
/// examples of one row, of which `examples` has the number, stay together, since they share their text. Rows that are not used
/// are not held out either.
pub fn held_out(job: &JobSpec, examples: &[u32], is_used: &[bool]) -> Result<Vec<bool>, String> {
    let mut order: Vec<u32> = (0..examples.len() as u32)
        .rev()
        .filter(|row| is_used[*row as usize])
        .collect();
    let all = order.iter().map(|row| examples[*row as usize] as usize);
    let all: usize = all.sum();
    let wanted = match job.val_set_size {
        ValSetSize::None => 0,
        ValSetSize::Examples(count) => count,
        ValSetSize::Fraction(fraction) => (all as f64 * fraction).ceil() as usize,
    };
    if job.shuffle {
        CounterRng::new(job.seed, &[STREAM_VALIDATION]).shuffle(&mut order);
    }
    let mut held_out = vec![false; examples.len()];
    let mut count = 0;
    for row in order {
        if count >= wanted {
            break;
        }
        held_out[row as usize] = true;
        count += examples[row as usize] as usize;
    }
    if wanted > 0 && count >= all {
        return Err(format!(
            "val_set_size holds out {wanted} of {all} examples: none is left to train on"
        ));
    }
    Ok(held_out)
}
