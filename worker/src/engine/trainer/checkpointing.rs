//! Which activations a pass keeps for its backward half, and which it computes again: decided once, when a job is loaded, on
//! the processor and on GPUs alike. In: what they would take, and what is free. Results do not depend on it.

use common::job::{Checkpointing, JobSpec};
use common::memory::bytes;

use crate::engine::EngineError;

/// Whether layers keep their inputs alone and run forward again in the backward pass.
///
/// With `gradient_checkpointing: auto` they do where the activations of so many tokens as a slot has, by `kept_bytes`, would
/// take too much of what is free; where `free_bytes` cannot say that, they do not.
pub(super) fn is_checkpointing(
    job: &JobSpec,
    kept_bytes: impl FnOnce(usize) -> usize,
    free_bytes: impl FnOnce() -> Result<Option<u64>, EngineError>,
) -> Result<bool, EngineError> {
    match job.gradient_checkpointing {
        Checkpointing::Always => Ok(true),
        Checkpointing::Never => Ok(false),
        Checkpointing::Auto => {
            let kept = kept_bytes(job.micro_batch_size * job.sequence_len) as u64;
            let Some(free) = free_bytes()? else {
                return Ok(false);
            };
            let scarce = is_scarce(kept, free);
            if scarce {
                tracing::info!(
                    "activations are computed again in the backward pass: they would take {} of {}",
                    bytes(kept),
                    bytes(free)
                );
            }
            Ok(scarce)
        }
    }
}

/// Whether so many bytes are too much: more than half, since other workers and the page cache of the model's files want theirs.
fn is_scarce(needed: u64, available: u64) -> bool {
    needed > available / 2
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::testing::job;
    use common::job::Method;

    #[test]
    fn memory_is_scarce_where_less_than_half_of_it_would_stay() {
        assert!(!is_scarce(50, 100));
        assert!(is_scarce(51, 100));
        assert!(is_scarce(1, 0));
    }

    #[test]
    fn activations_are_kept_unless_they_were_said_or_known_to_be_too_large() {
        let decided = |gradient_checkpointing, free| {
            let job = JobSpec {
                gradient_checkpointing,
                ..job(Method::Full)
            };
            is_checkpointing(&job, |tokens| 10 * tokens, || Ok(free)).unwrap()
        };
        let kept = {
            let job = job(Method::Full);
            10 * (job.micro_batch_size * job.sequence_len) as u64
        };
        assert!(decided(Checkpointing::Always, Some(u64::MAX)));
        assert!(!decided(Checkpointing::Never, Some(0)));
        assert!(!decided(Checkpointing::Auto, None));
        assert!(!decided(Checkpointing::Auto, Some(2 * kept)));
        assert!(decided(Checkpointing::Auto, Some(2 * kept - 1)));
    }
}
