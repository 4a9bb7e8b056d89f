//! The test prompts, answered by the base model before training and by the result after it.
//!
//! In: the job, and where its models are. Out: answers on the terminal, or why there are none; a run never fails for them.

use std::path::Path;

use common::job::{InitWeights, JobSpec, Method};

use crate::prepare::Prepared;
use crate::report::terminal::{Answer, Terminal};
#[cfg(feature = "single-node")]
use crate::run::local_workers;

/// The base model's answers to the test prompts, or none where they cannot be had. `has_engine`: this process trains, too.
pub fn ask_before(
    has_engine: bool,
    prepared: &Prepared,
    terminal: &mut Terminal,
) -> Vec<Option<String>> {
    let job = &prepared.job;
    let unasked = vec![None; job.test_prompts.len()];
    if !has_engine || job.init_weights == InitWeights::Random {
        return unasked;
    }
    let adapter = match &job.method {
        Method::Lora(lora) => lora.model_dir.clone(),
        Method::Full => None,
    };
    match answer(&job.base_model, adapter.as_deref(), job) {
        Ok(answers) => answers.into_iter().map(Some).collect(),
        Err(reason) => {
            terminal.say(&format!("the test prompts were not answered: {reason}"));
            unasked
        }
    }
}

/// Shows the result's answers beside the base model's. Asks only where the base model answered before, or where weights were
/// initialised at random, so that it was not asked.
pub fn ask_after(job: &JobSpec, before: Vec<Option<String>>, terminal: &mut Terminal) {
    if before.iter().all(Option::is_none) && job.init_weights != InitWeights::Random {
        return;
    }
    let output = Some(job.output_dir.as_path());
    let (model, adapter) = match &job.method {
        Method::Lora(_) => (job.base_model.as_path(), output),
        Method::Full => (job.output_dir.as_path(), None),
    };
    match answer(model, adapter, job) {
        Ok(answers) => {
            let answer = |((prompt, before), after): ((&String, _), _)| Answer {
                prompt: prompt.clone(),
                before,
                after,
            };
            let asked = job.test_prompts.iter().zip(before).zip(answers);
            terminal.show_answers(&asked.map(answer).collect::<Vec<_>>());
        }
        Err(reason) => terminal.say(&format!("the test prompts were not answered: {reason}")),
    }
}

fn answer(model: &Path, adapter: Option<&Path>, job: &JobSpec) -> Result<Vec<String>, String> {
    #[cfg(feature = "single-node")]
    return local_workers::answer(model, adapter, job);
    #[cfg(not(feature = "single-node"))]
    {
        let _ = (model, adapter, job);
        Err("this build has no engine".to_owned())
    }
}
