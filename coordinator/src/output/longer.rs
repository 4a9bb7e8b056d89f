//! The same job with another number of steps: whether a run goes on as it.
//!
//! In: what an earlier run recorded, and the job of this one. Out: yes, no (it is another job), or why not.

use common::job::{JobSpec, LrScheduler};
use common::plan::warmup_steps;

use super::RunRecord;

/// `job` is the record's but for its number of steps, and the steps that were done are its own: then this is true. False
/// where it is another job. An error says why a job of another length cannot go on from them.
///
/// `total_steps` of `job`, where they are known already.
pub(super) fn goes_on(
    record: &RunRecord,
    job: &JobSpec,
    total_steps: Option<u64>,
) -> Result<bool, String> {
    let mut before = job.clone();
    record.take("num_epochs", &mut before.num_epochs);
    record.take("max_steps", &mut before.max_steps);
    if before.digest() != record.job_digest {
        return Ok(false);
    }
    let curve = match job.lr_scheduler {
        LrScheduler::Constant => None,
        LrScheduler::ConstantWithWarmup => {
            let there = warmup_steps(before.warmup, record.total_steps);
            let here = total_steps.map_or(there, |steps| warmup_steps(job.warmup, steps));
            (there != here).then(|| {
                format!("the warm-up is a share of all steps, {there} there and {here} here: set warmup_steps: {there}")
            })
        }
        LrScheduler::Cosine => Some(of_falling_curve("cosine")),
        LrScheduler::Linear => Some(of_falling_curve("linear")),
    };
    if let Some(reason) = curve {
        return Err(reason);
    }
    match total_steps {
        Some(steps) if steps < record.step => Err(format!(
            "{} steps are done already, and it has {steps}",
            record.step
        )),
        _ => Ok(true),
    }
}

fn of_falling_curve(name: &str) -> String {
    format!(
        "with lr_scheduler: {name} the learning rate falls to 0 at the last step, so that the steps that were done are not its \
         own (only a run with constant or constant_with_warmup can be made longer)"
    )
}
