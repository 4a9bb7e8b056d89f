//! Whether a run can go on as the same job with another number of steps.
//!
//! In: what an earlier run recorded, and the job of this one. Out: yes, no (it is another job), or why not.

use common::job::{JobSpec, LrScheduler};
use common::plan::warmup_steps;

use super::RunRecord;

/// Whether `job` can go on from the steps of `record`: it is the same but for its number of steps, and would have made the same
/// steps. False where it is another job. An error says why a job of another length cannot go on from them.
///
/// `total_steps` are those of `job`, where they are known already.
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
        scheduler if scheduler.is_the_same_in_a_longer_run() => {
            let there = warmup_steps(before.warmup, record.total_steps);
            let here = total_steps.map_or(there, |steps| warmup_steps(job.warmup, steps));
            (there != here).then(|| {
                format!("the warm-up is a share of all steps, {there} there and {here} here: set warmup_steps: {there}")
            })
        }
        scheduler => Some(of_falling_curve(scheduler)),
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

fn of_falling_curve(scheduler: LrScheduler) -> String {
    let falls = match scheduler {
        LrScheduler::Cosine | LrScheduler::Linear => "falls to 0 at the last step",
        _ => "follows the number of steps",
    };
    format!(
        "with lr_scheduler: {} the learning rate {falls}, so that the steps that were done are not its own (only a run with \
         constant, constant_with_warmup, inverse_sqrt, or warmup_stable_decay with both of its numbers of steps can be made longer)",
        scheduler.name()
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use common::job::{JobSources, load};

    use super::super::RunIdentity;
    use super::*;

    fn job(fields: &[(&str, &str)]) -> JobSpec {
        let base = [("base_model", "m"), ("dataset", "d"), ("sequence_len", "8")];
        let flags = base.iter().chain(fields);
        let flags = flags.map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        load(JobSources {
            flags: flags.collect(),
            ..JobSources::default()
        })
        .unwrap()
    }

    /// What becomes of a run of 40 steps of which 30 were made, where the job has `fields` and then these epochs.
    fn fate(
        fields: &[(&str, &str)],
        epochs: &str,
        total_steps: Option<u64>,
    ) -> Result<bool, String> {
        let with = |epochs| job(&[fields, &[("num_epochs", epochs)]].concat());
        let identity = RunIdentity {
            job: with("4"),
            data_digest: None,
            base_model_digest: None,
            total_steps: Some(40),
        };
        let record = RunRecord::new(&identity, 40, 30, None);
        goes_on(&record, &with(epochs), total_steps)
    }

    #[test]
    fn a_run_goes_on_as_a_longer_one_where_its_steps_would_be_the_same() {
        let constant = [("lr_scheduler", "constant")];
        assert_eq!(fate(&constant, "8", None), Ok(true));
        assert_eq!(fate(&constant, "8", Some(80)), Ok(true));
        assert_eq!(fate(&constant, "3", Some(30)), Ok(true));
        let shorter = fate(&constant, "2", Some(20)).unwrap_err();
        assert_eq!(shorter, "30 steps are done already, and it has 20");

        let by_steps = [
            ("lr_scheduler", "constant_with_warmup"),
            ("warmup_steps", "3"),
        ];
        assert_eq!(fate(&by_steps, "8", Some(80)), Ok(true));
        let by_share = [
            ("lr_scheduler", "constant_with_warmup"),
            ("warmup_ratio", "0.1"),
        ];
        let message = fate(&by_share, "8", Some(80)).unwrap_err();
        assert!(
            message.contains("4 there and 8 here: set warmup_steps: 4"),
            "{message}"
        );

        let by_square_root = [("lr_scheduler", "inverse_sqrt"), ("warmup_steps", "3")];
        assert_eq!(fate(&by_square_root, "8", Some(80)), Ok(true));

        for curve in ["cosine", "linear", "rex", "warmup_stable_decay"] {
            let message = fate(&[("lr_scheduler", curve)], "8", None).unwrap_err();
            assert!(
                message.contains(curve) && message.contains("constant"),
                "{message}"
            );
        }
    }

    #[test]
    fn a_job_that_differs_in_more_than_its_length_is_another_one() {
        let identity = RunIdentity {
            job: job(&[("lr_scheduler", "constant")]),
            data_digest: None,
            base_model_digest: None,
            total_steps: None,
        };
        let record = RunRecord::new(&identity, 40, 30, None);
        let other = job(&[
            ("lr_scheduler", "constant"),
            ("num_epochs", "2"),
            ("seed", "1"),
        ]);
        assert_eq!(goes_on(&record, &other, Some(80)), Ok(false));
    }

    #[test]
    fn the_record_of_a_longer_run_names_the_shorter_ones() {
        let identity = |epochs| RunIdentity {
            job: job(&[("lr_scheduler", "constant"), ("num_epochs", epochs)]),
            data_digest: None,
            base_model_digest: None,
            total_steps: None,
        };
        let (one, two, three) = (identity("1"), identity("2"), identity("3"));
        let first = RunRecord::new(&one, 10, 0, None);
        let second = RunRecord::new(&two, 20, 10, Some(&first));
        let third = RunRecord::new(&three, 30, 20, Some(&second));
        let digests = [&one, &two, &three].map(|identity| identity.job.digest());
        assert_eq!(third.jobs(), digests);
        assert_eq!(RunRecord::new(&three, 30, 25, Some(&third)).jobs(), digests);
    }
}
