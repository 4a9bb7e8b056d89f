//! Preflight: job, model and data become what training needs, or every reason why it would fail.
//!
//! Enters: a checked job. Leaves: the model folder, the block file, the schedule and an estimate of the memory. No worker has
//! started yet, and nothing is written but blocks, in `<output_dir>/.muster` or the folder that the job shares them in, and what
//! is fetched, in the hub's cache.

mod dtype;
mod estimate;
mod methods;
mod notices;
mod scratch;
mod sources;
mod tokens;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::data::rows::file_of_rows;
use common::data::template::ChatTemplate;
use common::data::tokenize::{SpecialTokens, Tokenizer};
use common::data::{DataErrors, PreparedData, prepare_blocks_or_find};
use common::files::adapter::{Adapted, check_adapter};
use common::files::manifest::entries_digest;
use common::files::model::{ModelFolder, WeightFiles};
use common::files::private;
use common::files::{FileEntry, FileError, checkpoint};
use common::job::{BaseDtype, DatasetSpec, InitWeights, JobSpec, Method, NewToken, Resume};
use common::model::{ModelConfig, adapted_modules, base_tensors, check_unfrozen, tensors_beside};
use common::plan::{Schedule, highest_rate, learns};
use common::progress::Progress;
use common::text::{count, rate};
use thiserror::Error;

use crate::store::claim::claim;
use crate::store::layout::WORK_FOLDER;
use crate::store::output::RunIdentity;

use dtype::with_dtype_of_model;
pub use estimate::{Estimate, Need};
pub use methods::{MethodNeed, advice, methods, told};
pub use scratch::{Scratch, remove_all as remove_scratch};
pub use sources::obtain_adapter;

/// Everything that training needs, checked.
#[derive(Debug)]
pub struct Prepared {
    pub job: Arc<JobSpec>,
    pub job_digest: String,
    pub model: ModelFolder,
    /// Lines for the user on what of the model folder is not used.
    pub model_notices: Vec<String>,
    /// Files that make up the model, with their digests; empty where these were not asked for.
    pub model_files: Vec<FileEntry>,
    /// BLAKE3 over `model_files`, hex.
    pub model_digest: String,
    pub model_config: ModelConfig,
    pub tokenizer: Tokenizer,
    pub template: Option<ChatTemplate>,
    pub data: PreparedData,
    pub schedule: Schedule,
    pub estimate: Estimate,
}

impl Prepared {
    /// Number of optimizer steps of the run.
    pub fn total_steps(&self) -> u64 {
        self.schedule.total_steps()
    }

    /// Number of slots of a step that is not an epoch's last.
    pub fn slots_per_step(&self) -> usize {
        let blocks = self
            .job
            .global_batch_size
            .min(self.data.file.train_blocks() as usize);
        blocks.div_ceil(self.job.micro_batch_size)
    }

    /// Trained tokens of a step (0-based): the divisor of its gradient.
    pub fn trained_tokens(&self, step: u64) -> u64 {
        self.count_tokens(step, |block| self.data.file.trained_tokens(block))
    }

    /// Tokens of a step (0-based) without padding.
    pub fn used_tokens(&self, step: u64) -> u64 {
        self.count_tokens(step, |block| self.data.file.used_tokens(block))
    }

    /// Whether the block file is in the output folder, where no other run looks for one.
    pub fn has_own_data(&self) -> bool {
        let own = self.job.output_dir.join(WORK_FOLDER);
        self.data.file.path().parent() == Some(own.as_path())
    }

    fn count_tokens(&self, step: u64, of_block: impl Fn(u64) -> u64) -> u64 {
        let slots = self.schedule.step_slots(step);
        slots.iter().flatten().map(|block| of_block(*block)).sum()
    }
}

/// Why the job cannot start: every reason, a line each.
#[derive(Debug, Default, Error)]
pub struct PreflightError {
    pub problems: Vec<String>,
}

impl fmt::Display for PreflightError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.problems.join("\n"))
    }
}

impl PreflightError {
    /// Unwraps a result. An error is kept, and the caller goes on to find the other problems.
    fn note<T>(&mut self, result: Result<T, impl fmt::Display>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(problem) => {
                self.add(problem.to_string());
                None
            }
        }
    }

    /// [`note`](Self::note) of a result with several problems.
    fn note_all<T>(&mut self, result: Result<T, impl Into<Self>>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(found) => {
                let found: Self = found.into();
                found
                    .problems
                    .into_iter()
                    .for_each(|problem| self.add(problem));
                None
            }
        }
    }

    /// Adds a problem, once: whoever else reads the same file finds the same.
    fn add(&mut self, problem: String) {
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }
}

impl From<DataErrors> for PreflightError {
    fn from(errors: DataErrors) -> Self {
        Self {
            problems: errors.to_string().lines().map(str::to_owned).collect(),
        }
    }
}

/// Folder of prepared data where the job names none, as in Axolotl.
pub const USUAL_PREPARED_DIR: &str = "last_run_prepared";

/// Checks everything and packs the data into `<output_dir>/.muster`, or into the folder that runs share. Ends soon with an
/// error once `progress` is cancelled.
pub fn prepare(job: &JobSpec, progress: &Progress) -> Result<Prepared, PreflightError> {
    let own = job.output_dir.join(WORK_FOLDER);
    let folder = job.reading.prepared_dir.as_deref().unwrap_or(&own);
    prepare_in(job, folder, true, progress)
}

/// Folders in which the data may have been prepared before, beside the one in which it is to be.
fn shared_folders(job: &JobSpec, blocks_dir: &Path) -> Vec<PathBuf> {
    let own = job.output_dir.join(WORK_FOLDER);
    let shared = job.reading.prepared_dir.clone();
    let shared = shared.unwrap_or_else(|| PathBuf::from(USUAL_PREPARED_DIR));
    let mut folders = vec![shared, own];
    folders.retain(|folder| folder != blocks_dir);
    folders
}

/// [`prepare`] with the block file in another folder. The digests of a big model take a while: `with_digests` off skips them.
pub fn prepare_in(
    job: &JobSpec,
    blocks_dir: &Path,
    with_digests: bool,
    progress: &Progress,
) -> Result<Prepared, PreflightError> {
    let mut errors = PreflightError::default();
    let job = sources::obtain(job, blocks_dir, progress)
        .map_err(|problems| PreflightError { problems })?;
    // Only now it is known which job it is: its splits, and which token ends texts.
    let job = &with_dtype_of_model(without_own_eos(job));
    progress.begin("reading the model", 0);
    let (model, config, mut model_notices) = read_model(job, &mut errors);
    let (tokenizer, template, new) = read_tokenizer(job, &mut errors, &mut model_notices);
    let job = &match &config {
        Some(config) => fit_to_model(job, config, new, &mut model_notices, &mut errors),
        None => job.clone(),
    };
    let config = config.map(|config| config.for_job(job));
    let scratch = match errors.note(check_output_dir(job)) {
        Some(()) => None,
        // What is there stays as it is, but the data is looked at all the same.
        None => errors.note(Scratch::new()),
    };
    let blocks_dir = scratch.as_ref().map_or(blocks_dir, Scratch::path);
    let data = match (&tokenizer, &template) {
        (Some(tokenizer), Some(template)) => {
            let others = shared_folders(job, blocks_dir);
            let template = template.as_ref();
            errors.note_all(prepare_blocks_or_find(
                job, tokenizer, template, blocks_dir, &others, progress,
            ))
        }
        _ => {
            errors.note(check_datasets(job));
            None
        }
    };
    // From here on the job is what the data made of it.
    let job = data.as_ref().map_or(job, |data| &data.job);
    if let Some(data) = data.as_ref().filter(|_| scratch.is_none()) {
        let schedule = Schedule::new(job, data.file.train_blocks());
        errors.note(check_claim(job, Some(schedule.total_steps())));
    }
    let estimate = config
        .as_ref()
        .and_then(|config| errors.note(Estimate::new(job, config)));
    let model_files = match &model {
        Some(model) if with_digests && errors.problems.is_empty() => {
            errors.note(model.entries_watched(progress))
        }
        _ => Some(Vec::new()),
    };
    let found = (
        model.map(|model| (model, model_notices)),
        config,
        estimate,
        tokenizer,
        template,
        data,
        model_files,
    );
    let prepared = assemble(found);
    if let Some(prepared) = &prepared {
        errors.note(check_learning_rate(prepared));
    }
    match prepared {
        Some(prepared) if errors.problems.is_empty() => Ok(prepared),
        _ => Err(errors),
    }
}

/// The job with what its model makes of it, of which `new` are the tokens that it adds; checks what else it says of the model.
fn fit_to_model(
    job: &JobSpec,
    config: &ModelConfig,
    new: Vec<NewToken>,
    notices: &mut Vec<String>,
    errors: &mut PreflightError,
) -> JobSpec {
    // With its tokens even where they cannot be trained so: they are no fault of the data.
    let added = JobSpec {
        tokens: new.clone(),
        ..job.clone()
    };
    let job = tokens::with_tokens(job.clone(), new, config, notices);
    let job = errors.note(job).unwrap_or(added);
    errors.note(tokens::check_ids(&job, config));
    errors.note(check_starting_adapter(&job, config));
    let of_job = config.clone().for_job(&job);
    let has_rows = of_job.check_vocabulary();
    errors.note(has_rows.map_err(|error| format!("{}: {error}", job.base_model.display())));
    let told = check_unfrozen(&of_job, &job);
    notices.extend(errors.note(told).unwrap_or_default());
    job
}

/// The job without `eos_token` where that is the tokenizer's own anyway: it is the same job then.
fn without_own_eos(job: JobSpec) -> JobSpec {
    // What is wrong with the files is told when the tokenizer is read.
    let own = SpecialTokens::load(&job.base_model).ok();
    let own = own.and_then(|tokens| tokens.get("eos_token").map(str::to_owned));
    match own == job.eos_token {
        true => JobSpec {
            eos_token: None,
            ..job
        },
        false => job,
    }
}

/// Loads the tokenizer and the chat template that the job asks for; adds what the user should know of them to `notices`.
fn read_tokenizer(
    job: &JobSpec,
    errors: &mut PreflightError,
    notices: &mut Vec<String>,
) -> (
    Option<Tokenizer>,
    Option<Option<ChatTemplate>>,
    Vec<NewToken>,
) {
    if !job.base_model.is_dir() {
        return (None, None, Vec::new());
    }
    let mut new = Vec::new();
    let mut tokenizer = errors.note(Tokenizer::load(&job.base_model));
    let template = errors.note(ChatTemplate::chosen_for(job));
    if let Some(tokenizer) = &mut tokenizer {
        notices.extend(tokenizer.made_from().map(|made_from| {
            format!("the tokenizer is made from {made_from}; the result has a tokenizer.json, too")
        }));
        let renamed = tokens::rename(tokenizer, job, template.as_ref().and_then(Option::as_ref));
        notices.extend(errors.note(renamed).into_iter().flatten());
        new = errors
            .note(tokens::add_to(tokenizer, job))
            .unwrap_or_default();
        if let Some(eos) = &job.eos_token
            && !tokenizer.end_texts_with(eos)
        {
            errors.add(format!(
                "eos_token: {eos} is no token of this tokenizer; name one that it has, or give it under special_tokens, which adds it"
            ));
        }
        let (unwritten, named): (Vec<_>, Vec<_>) = job
            .reading
            .special_tokens
            .iter()
            .cloned()
            .partition(|(name, _)| is_unwritten(tokenizer, &template, name));
        for problem in tokenizer.differing_tokens(&named) {
            errors.add(problem);
        }
        notices.extend(unwritten.iter().map(|(name, text)| {
            format!("special_tokens.{name}: {text} is put before no text: this tokenizer has none, and the chat template writes none")
        }));
        notices.extend(end_tokens(job, tokenizer));
    }
    let missing = template.iter().flatten();
    notices.extend(
        missing
            .flat_map(ChatTemplate::missing_tokens)
            .map(|name| format!("the tokenizer has no {name}, so the chat template writes none")),
    );
    (tokenizer, template, new)
}

/// Lets the job's `eot_tokens` end turns. Returns a line for the user where some are no tokens.
fn end_tokens(job: &JobSpec, tokenizer: &mut Tokenizer) -> Option<String> {
    let unknown = tokenizer.add_end_tokens(&job.eot_tokens);
    (!unknown.is_empty()).then(|| {
        let (which, verb) = match unknown.len() {
            1 => ("is no token", "it ends"),
            _ => ("are no tokens", "they end"),
        };
        format!(
            "eot_tokens: {} {which} of this tokenizer, so {verb} no turn; where the template writes such a text, it is learned as text",
            unknown.join(", ")
        )
    })
}

/// Whether nothing that is learned has a beginning token, whatever it is called: the tokenizer has none, and no template reads it.
fn is_unwritten(
    tokenizer: &Tokenizer,
    template: &Option<Option<ChatTemplate>>,
    name: &str,
) -> bool {
    const BOS: &str = "bos_token";
    let reads = |template: &ChatTemplate| template.missing_tokens().contains(&BOS);
    name == BOS
        && tokenizer.special_tokens().get(BOS).is_none()
        && !template.iter().flatten().any(reads)
}

/// Opens the model folder; returns also what of it is not used, in lines for the user.
fn read_model(
    job: &JobSpec,
    errors: &mut PreflightError,
) -> (Option<ModelFolder>, Option<ModelConfig>, Vec<String>) {
    let model = errors.note(ModelFolder::open(&job.base_model, job.init_weights));
    let config = model
        .as_ref()
        .and_then(|model| errors.note(ModelConfig::of(model)));
    let mut notices = Vec::new();
    if let (Some(model), Some(config)) = (&model, &config) {
        let unused = errors.note(check_weights(job, model, config));
        notices = [model.notices(), unused.unwrap_or_default()].concat();
        if config.is_four_bits && job.quantization.is_some() {
            notices
                .push("load_in_4bit: changes nothing: base_model is quantised as it is".to_owned());
        }
        errors.note(model.check_model_type());
        errors.note(check_quantised(job, config));
    }
    (model, config, notices)
}

type Found = (
    Option<(ModelFolder, Vec<String>)>,
    Option<ModelConfig>,
    Option<Estimate>,
    Option<Tokenizer>,
    Option<Option<ChatTemplate>>,
    Option<PreparedData>,
    Option<Vec<FileEntry>>,
);

/// Puts together what was found. None only where a problem was noted.
fn assemble(found: Found) -> Option<Prepared> {
    let (model, config, estimate, tokenizer, template, data, model_files) = found;
    let (data, model_files) = (data?, model_files?);
    let (model, model_notices) = model?;
    let job = Arc::new(data.job.clone());
    Some(Prepared {
        job_digest: job.digest(),
        model,
        model_notices,
        model_digest: entries_digest(&model_files),
        model_files,
        model_config: config?,
        tokenizer: tokenizer?,
        template: template?,
        schedule: Schedule::new(&job, data.file.train_blocks()),
        data,
        estimate: estimate?,
        job,
    })
}

/// Checks that the datasets exist, where there is no tokenizer and so nothing can be said about their rows.
fn check_datasets(job: &JobSpec) -> Result<(), String> {
    let missing: Vec<String> = job
        .all_datasets()
        .flat_map(DatasetSpec::read_files)
        .filter_map(|file| {
            let reason = file_of_rows(&file).err()?;
            Some(format!("{}: {reason}", file.display()))
        })
        .collect();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(missing.join("\n"))
    }
}

/// Checks that the output folder can be written and is no other job's, and that the checkpoint to resume from is whole.
fn check_output_dir(job: &JobSpec) -> Result<(), String> {
    let dir = &job.output_dir;
    if let Resume::Path(path) = &job.resume {
        checkpoint::verify(path).map_err(|error| format!("resume: {error}"))?;
    }
    check_claim(job, None)?;
    check_writable(dir)
}

/// Checks that something can be made where the run would make its files, by making a folder there. The mode of a folder does
/// not say it: the folder may be another user's, or on a file system that is read-only.
fn check_writable(dir: &Path) -> Result<(), String> {
    let own = dir.join(WORK_FOLDER);
    for path in own.ancestors() {
        let leads_nowhere = |target| {
            format!(
                "output_dir {}: {} is a link to nothing ({} is not there); make that folder, or name another output_dir",
                dir.display(),
                path.display(),
                Path::display(target)
            )
        };
        match std::fs::metadata(path) {
            Ok(found) if found.is_dir() => return probe(dir, path),
            Ok(_) => {
                let (dir, path) = (dir.display(), path.display());
                return Err(format!("output_dir {dir}: {path} is no folder"));
            }
            Err(error) => match path.read_link() {
                Ok(target) => return Err(leads_nowhere(&target)),
                Err(_) if error.kind() == io::ErrorKind::NotFound => {}
                Err(_) => return Err(format!("output_dir {}: {error}", dir.display())),
            },
        }
    }
    probe(dir, Path::new("."))
}

/// Makes a folder in `existing` and removes it again.
fn probe(output_dir: &Path, existing: &Path) -> Result<(), String> {
    private::create_folder(existing, ".muster-check-")
        .and_then(std::fs::remove_dir)
        .map_err(|error| {
            format!(
                "output_dir {} cannot be written: nothing can be made in {} ({error}); name another output_dir, or make \
                 that folder this user's",
                output_dir.display(),
                existing.display()
            )
        })
}

/// Checks that the output folder is no other job's.
fn check_claim(job: &JobSpec, total_steps: Option<u64>) -> Result<(), String> {
    let identity = RunIdentity {
        total_steps,
        ..RunIdentity::of(job)
    };
    claim(&identity)
        .map(drop)
        .map_err(|error| error.to_string())
}

/// Refuses a learning rate with which nothing is learned: the run would end as if all were well.
fn check_learning_rate(prepared: &Prepared) -> Result<(), String> {
    let steps = prepared.total_steps();
    let highest = highest_rate(&prepared.job, steps);
    if learns(&prepared.job, steps) {
        return Ok(());
    }
    let steps = count(steps, "step");
    Err(if highest > 0.0 {
        format!(
            "nothing would be learned: the learning rate is {} at most in {steps}, and float32, in which weights are updated, \
             has no such number; set a larger learning_rate",
            rate(highest)
        )
    } else {
        format!(
            "nothing would be learned: the learning rate is 0 throughout ({steps}), because the warm-up begins there; \
             set warmup_steps: 0, or make more steps (num_epochs, max_steps, a smaller global_batch_size or sequence_len)"
        )
    })
}

/// The adapter to start from has the job's rank, and the tensors of the linears that the job names.
fn check_starting_adapter(job: &JobSpec, config: &ModelConfig) -> Result<(), String> {
    let Method::Lora(lora) = &job.method else {
        return Ok(());
    };
    let Some(dir) = &lora.model_dir else {
        return Ok(());
    };
    let config = config.clone().for_job(job);
    let modules = adapted_modules(&config, lora).map_err(|error| error.to_string())?;
    let beside = tensors_beside(&config, &modules, lora);
    let linears: Vec<Adapted> = modules.iter().map(Adapted::from).collect();
    check_adapter(dir, lora, &linears, &beside, config.tied)
        .map_err(|error| format!("lora_model_dir {error}"))
}

/// Refuses to train all weights of a model of 4 bits.
fn check_quantised(job: &JobSpec, config: &ModelConfig) -> Result<(), String> {
    match (&job.method, config.is_four_bits) {
        (Method::Full, true) => Err(format!(
            "{}: the model is quantised to 4 bits, which full training cannot change; give adapter: lora, or the model before it was \
             quantised",
            job.base_model.display()
        )),
        _ => Ok(()),
    }
}

/// Checks that every tensor of the architecture is there in its shape, and none that would make it another model. Returns what
/// is not used, in lines for the user.
fn check_weights(
    job: &JobSpec,
    model: &ModelFolder,
    config: &ModelConfig,
) -> Result<Vec<String>, FileError> {
    if job.init_weights == InitWeights::Random {
        return Ok(Vec::new());
    }
    let tensors = base_tensors(config);
    let weights = WeightFiles::open(model, &tensors)?;
    if job.base_dtype == BaseDtype::Bfloat16 {
        weights.check_bfloat16(&tensors)?;
    }
    Ok(weights.notices().to_vec())
}
