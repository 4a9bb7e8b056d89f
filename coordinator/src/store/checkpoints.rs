//! Checkpoints and the result: received states become folders that appear whole or not at all.
//!
//! In: the folder of a finished upload. Out: `checkpoint-<step>/` with its manifest, or the result's files in the output
//! folder. What was there before stays until the new is durable.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use common::failpoint;
use common::files::adapter::{ADAPTER_CONFIG, ADAPTER_WEIGHTS};
use common::files::atomic::AtomicDir;
use common::files::checkpoint::{self, MANIFEST, Manifest};
use common::files::durable;
use common::files::model::{CONFIG, ModelFolder};
use common::files::snapshot::OPTIMIZER;
use common::files::{FileEntry, FileError};
use common::job::NewToken;

use crate::cluster::WorkerId;

/// A state whose files are complete, in a folder that is not committed yet.
pub struct Received {
    pub worker: WorkerId,
    pub step: u64,
    pub weights_digest: String,
    /// Name, size and digest of each file that arrived.
    pub files: Vec<FileEntry>,
    pub folder: AtomicDir,
}

/// A state on disk that workers can start from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// Number of optimizer updates that it has seen.
    pub step: u64,
    /// Folder that has its files. None: the base model as it is.
    pub folder: Option<PathBuf>,
    pub files: Vec<FileEntry>,
    /// Digest of its trainable weights; None where nobody has said it.
    pub weights_digest: Option<String>,
}

/// What the cluster knows about a state beyond its files.
#[derive(Clone, Debug)]
pub struct Facts {
    pub layout_digest: String,
    pub numerics_class: String,
    /// Step of the weights with the best evaluation, whose checkpoint is kept whatever the limit is.
    pub best_step: Option<u64>,
}

/// Why a checkpoint was not made the result.
#[derive(Debug)]
pub enum NotMade {
    /// It is damaged, or not there any more.
    Checkpoint(FileError),
    Disk(FileError),
}

/// Writes `trainer_state.json` for a step into a folder.
pub type WriteTrainerState = Box<dyn Fn(&Path, u64) -> Result<(), FileError> + Send + Sync>;

/// Writes down for good that the run is done, with the digest of its weights.
pub type RecordResult = Box<dyn Fn(u64, &str) -> Result<(), FileError> + Send + Sync>;

/// Is called with the step of each checkpoint that is on disk; waits for nothing.
pub type Saved = Box<dyn Fn(u64) + Send + Sync>;

/// Stores the states of a run: checkpoints and the result.
pub struct Store {
    pub output_dir: PathBuf,
    pub model: ModelFolder,
    /// Chat template that the job brought in place of the model's own.
    pub template: Option<String>,
    /// All tokens that end a text of the result; none where the job adds none to the model's.
    pub end_tokens: Vec<u32>,
    /// The token that ends texts, where it is not the tokenizer's own.
    pub eos_token: Option<String>,
    /// Tokens that the job added.
    pub tokens: Vec<NewToken>,
    /// Texts that the job gives tokens of the tokenizer, by their ids.
    pub renamed_tokens: BTreeMap<u32, String>,
    pub job_digest: String,
    pub base_model_digest: String,
    pub save_total_limit: Option<usize>,
    pub write_trainer_state: WriteTrainerState,
    pub record_result: RecordResult,
    pub saved: Saved,
}

impl Store {
    /// Creates the folder that an upload goes to, on the file system of the result.
    pub fn begin(&self, step: u64) -> Result<AtomicDir, FileError> {
        AtomicDir::create(&checkpoint::checkpoint_dir(&self.output_dir, step))
    }

    /// Makes a checkpoint of a received state and removes those over the limit.
    pub fn commit(&self, received: Received, facts: &Facts) -> Result<State, FileError> {
        let folder = received.folder;
        self.complete(folder.path(), received.step)?;
        let head = Manifest {
            step: received.step,
            job_digest: self.job_digest.clone(),
            base_model_digest: self.base_model_digest.clone(),
            layout_digest: facts.layout_digest.clone(),
            weights_digest: received.weights_digest.clone(),
            numerics_class: facts.numerics_class.clone(),
            files: received.files,
        };
        failpoint::reached("checkpoint-write");
        let manifest = checkpoint::seal(folder.path(), head)?;
        failpoint::reached("checkpoint-write");
        folder.commit_with_last(MANIFEST)?;
        failpoint::reached("checkpoint-write");
        if let Some(limit) = self.save_total_limit {
            checkpoint::prune(&self.output_dir, limit, received.step, facts.best_step)?;
        }
        (self.saved)(received.step);
        Ok(State {
            step: received.step,
            folder: Some(checkpoint::checkpoint_dir(&self.output_dir, received.step)),
            files: manifest.files,
            weights_digest: Some(received.weights_digest),
        })
    }

    /// Moves the result into the output folder, and records it before anyone is told to end. The optimizer's state is left out.
    pub fn commit_last(&self, received: Received) -> Result<State, FileError> {
        let folder = received.folder;
        self.complete(folder.path(), received.step)?;
        folder.sync_files(OPTIMIZER)?;
        let entries = fs::read_dir(folder.path()).map_err(FileError::io("read", folder.path()))?;
        for entry in entries {
            let path = entry.map_err(FileError::io("read", folder.path()))?.path();
            match path.file_name() {
                Some(name) if path.is_dir() => replace_files(&path, &self.output_dir.join(name))?,
                Some(name) if name != OPTIMIZER => {
                    replace(&path, &self.output_dir.join(name))?;
                    failpoint::reached("result-write");
                }
                _ => {}
            }
        }
        durable::sync_folder(&self.output_dir)
            .map_err(FileError::io("make durable", &self.output_dir))?;
        (self.record_result)(received.step, &received.weights_digest)?;
        failpoint::reached("result-recorded");
        Ok(State {
            step: received.step,
            folder: Some(self.output_dir.clone()),
            files: Vec::new(),
            weights_digest: Some(received.weights_digest),
        })
    }

    /// Makes the checkpoint of step `best` the result of a run that ends after `step` updates. The checkpoint stays.
    pub fn commit_best(&self, best: u64, step: u64) -> Result<State, NotMade> {
        let from = checkpoint::checkpoint_dir(&self.output_dir, best);
        let manifest = checkpoint::verify(&from).map_err(NotMade::Checkpoint)?;
        failpoint::reached("result-from-best");
        let folder = self.begin(step).map_err(NotMade::Disk)?;
        let of_state = |file: &&FileEntry| is_weights(&file.path);
        for file in manifest.files.iter().filter(of_state) {
            let to = folder.path().join(&file.path);
            fs::copy(from.join(&file.path), &to)
                .map_err(|error| NotMade::Disk(FileError::io("write", &to)(error)))?;
        }
        let received = Received {
            worker: WorkerId(0),
            step,
            weights_digest: manifest.weights_digest,
            files: Vec::new(),
            folder,
        };
        self.commit_last(received).map_err(NotMade::Disk)
    }

    fn complete(&self, folder: &Path, step: u64) -> Result<(), FileError> {
        self.model
            .copy_tokenizer_files(folder, self.template.as_deref())?;
        ModelFolder::rename_tokens(folder, &self.renamed_tokens)?;
        ModelFolder::add_tokens(folder, &self.tokens)?;
        if let Some(eos) = &self.eos_token {
            ModelFolder::name_eos_token(folder, eos)?;
        }
        if !self.end_tokens.is_empty() {
            ModelFolder::add_end_tokens(folder, &self.end_tokens)?;
        }
        (self.write_trainer_state)(folder, step)
    }
}

/// Whether a file of a checkpoint is what a worker hands over of its weights: what else is there, the store adds.
fn is_weights(name: &str) -> bool {
    let of_model = name.starts_with("model") || name == CONFIG;
    let of_adapter = [ADAPTER_WEIGHTS, ADAPTER_CONFIG].contains(&name);
    of_adapter || of_model
}

/// Moves each file of a flat folder (the chat templates beside the default one) to `to`: what else is there stays.
fn replace_files(from: &Path, to: &Path) -> Result<(), FileError> {
    fs::create_dir_all(to).map_err(FileError::io("create", to))?;
    for entry in fs::read_dir(from).map_err(FileError::io("read", from))? {
        let entry = entry.map_err(FileError::io("read", from))?;
        replace(&entry.path(), &to.join(entry.file_name()))?;
    }
    durable::sync_folder(to).map_err(FileError::io("make durable", to))
}

/// Renames a file that is durable already to its final name.
fn replace(from: &Path, to: &Path) -> Result<(), FileError> {
    durable::rename(from, to).map_err(FileError::io("write", to))
}
