//! Learning rates are those of Transformers, Axolotl and PyTorch at every step (golden rates in `schedules.json`, and the script that
//! makes them beside it).
#![allow(clippy::unwrap_used)]

use common::job::{JobSources, JobSpec, load};
use common::plan::{highest_rate, learning_rate};
use serde_json::{Value as Json, json};

/// The jobs of the golden file with their rates.
fn cases() -> Vec<(JobSpec, Vec<f64>)> {
    let golden: Json = serde_json::from_str(include_str!("schedules.json")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("job.yaml");
    let case = |case: &Json| {
        let mut job = case["job"].clone();
        job["base_model"] = json!("m");
        job["datasets"] = json!("d");
        std::fs::write(&path, job.to_string()).unwrap();
        let sources = JobSources {
            file: Some(path.clone()),
            ..JobSources::default()
        };
        let job = load(sources).unwrap_or_else(|errors| panic!("{errors}"));
        assert_eq!(job.reading.notices, [""; 0], "{}", case["job"]);
        let rates = case["rates"].as_array().unwrap();
        let rates = rates.iter().map(|rate| rate.as_f64().unwrap());
        (job, rates.collect())
    };
    golden["cases"]
        .as_array()
        .unwrap()
        .iter()
        .map(case)
        .collect()
}

#[test]
fn rates_are_those_of_the_schedules_own_libraries() {
    let cases = cases();
    assert!(cases.len() > 150);
    let names: std::collections::BTreeSet<&str> = cases
        .iter()
        .map(|(job, _)| job.lr_scheduler.name())
        .collect();
    assert_eq!(names.len(), 11, "all but constant: {names:?}");
    for (job, rates) in cases {
        let total_steps = rates.len() as u64;
        for (step, golden) in (0..total_steps).zip(rates) {
            let rate = learning_rate(&job, step, total_steps);
            // What is left of a cosine near its end is the rounding of a number near 1.
            let tolerance = 1e-12 * golden + 1e-15 * job.learning_rate;
            assert!(
                (rate - golden).abs() <= tolerance,
                "{:?}, {:?}: {rate} at step {step} of {total_steps}, where {golden} is expected",
                job.lr_scheduler,
                job.warmup
            );
        }
    }
}

#[test]
fn the_highest_rate_is_that_of_some_step_and_no_step_has_more() {
    for (job, rates) in cases() {
        let total_steps = rates.len() as u64;
        let rates = (0..total_steps).map(|step| learning_rate(&job, step, total_steps));
        let highest = rates.fold(0.0, f64::max);
        let told = highest_rate(&job, total_steps);
        assert_eq!(told, highest, "{:?}, {:?}", job.lr_scheduler, job.warmup);
    }
}

#[test]
fn a_job_with_any_curve_survives_the_wire() {
    for (job, _) in cases() {
        let text = serde_json::to_string(&job).unwrap();
        let received: JobSpec = serde_json::from_str(&text).unwrap();
        assert_eq!(received.lr_scheduler, job.lr_scheduler);
        assert_eq!(received.digest(), job.digest());
        assert_eq!(received.check_received(), Ok(()));
    }
}
