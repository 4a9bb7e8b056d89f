//! The gradient's norm, and clipping by it, with the semantics of `torch.nn.utils.clip_grad_norm_`. In: the mean gradient, the
//! same on every worker. Out: numbers, the same to the bit for any number of threads.

use rayon::prelude::*;

use crate::engine::mean_gradient::MeanSource;
use crate::engine::ops::vector::dispatch;

/// Scalars whose squares are summed in order. Part of the numerics: another value gives other norms.
pub const NORM_CHUNK: usize = 65_536;

/// The Euclidean norm of a flat gradient. Squares are summed in float64, in order within chunks of 65,536 scalars and
/// then over the chunks in order. Not finite if a scalar is not.
pub fn gradient_norm(mean: MeanSource) -> f64 {
    let scalars = mean.scalars();
    let chunk_sums: Vec<f64> = (0..scalars.div_ceil(NORM_CHUNK))
        .into_par_iter()
        .map_init(Vec::new, |scratch, index| {
            let range = index * NORM_CHUNK..scalars.min((index + 1) * NORM_CHUNK);
            let chunk = mean.read(range, scratch);
            dispatch(
                #[inline(always)]
                || sum_of_squares(chunk),
            )
        })
        .collect();
    chunk_sums.iter().sum::<f64>().sqrt()
}

/// Sum of squares in eight interleaved lanes, which the compiler can keep in vector registers.
#[inline(always)]
fn sum_of_squares(chunk: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut sums = [0.0f64; LANES];
    let (groups, rest) = chunk.as_chunks::<LANES>();
    for group in groups {
        for (sum, g) in sums.iter_mut().zip(group) {
            *sum += f64::from(*g) * f64::from(*g);
        }
    }
    let tail: f64 = rest.iter().map(|g| f64::from(*g) * f64::from(*g)).sum();
    sums.iter().sum::<f64>() + tail
}

/// The factor for the gradient after which its norm does not exceed `max_norm`; at most 1.
pub fn clip_coefficient(norm: f64, max_norm: Option<f64>) -> f32 {
    match max_norm {
        Some(max_norm) => (max_norm / (norm + 1e-6)).min(1.0) as f32,
        None => 1.0,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_norm_is_the_same_for_any_number_of_threads() {
        let flat: Vec<f32> = (0..5 * NORM_CHUNK + 3).map(|i| (i as f32).cos()).collect();
        let norms = [1, 2, 5].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| gradient_norm(MeanSource::Values(&flat)))
                .to_bits()
        });
        assert!(norms.iter().all(|norm| *norm == norms[0]));
        assert_eq!(gradient_norm(MeanSource::Values(&[3.0, 4.0])), 5.0);
        assert!(!gradient_norm(MeanSource::Values(&[1.0, f32::NAN])).is_finite());
    }

    #[test]
    fn only_gradients_above_the_limit_are_clipped() {
        assert_eq!(clip_coefficient(0.5, Some(1.0)), 1.0);
        assert_eq!(clip_coefficient(4.0, Some(1.0)), (1.0 / 4.000001f64) as f32);
        assert_eq!(clip_coefficient(4.0, None), 1.0);
    }
}
