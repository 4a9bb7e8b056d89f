//! Prepares the data, once: rows become examples, examples become blocks, blocks become one file.
//!
//! Enters: the job, the model's tokenizer and template. Leaves: the block file, counts for people, samples; or every
//! problem of every row. Never drops text without counting it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::blockfile::{self, BlockFile, BlockFileError};
use super::collect::Source;
use super::counts::DataCounts;
use super::filter::Filter;
use super::packer::Packer;
use super::record::DataErrors;
use super::rows::file_of_rows;
use super::sample::{Sample, sample_of};
use super::template::ChatTemplate;
use super::tokenize::{Tokenizer, read_json};
use crate::failpoint;
use crate::files::file_digest_watched;
use crate::job::{DatasetSpec, JobSpec, MixtureSpec, STANDARD_INPUT, Selection, ValSetSize};
use crate::plan::{settle, settle_sequence_len};
use crate::progress::Progress;

/// Version of the packing; it changes whenever equal inputs may give other blocks.
const PACKING_VERSION: u64 = 4;

/// The data, ready for training.
#[derive(Debug)]
pub struct PreparedData {
    /// The job as training follows it, with what it left to the data decided.
    pub job: JobSpec,
    pub file: BlockFile,
    pub counts: DataCounts,
    /// The first example, for people: at most one.
    pub samples: Vec<Sample>,
    /// BLAKE3 over the dataset files in order, hex.
    pub data_digest: String,
    /// Whether the block file was there already.
    pub is_found: bool,
    /// What the user should know of prepared data that could not be used, a line each.
    pub notices: Vec<String>,
}

/// Makes the block file in `out_dir`, or takes the one that was made there from the same inputs. Stops with an error once
/// `progress` is cancelled, and leaves nothing behind then.
pub fn prepare_blocks(
    job: &JobSpec,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    out_dir: &Path,
    progress: &Progress,
) -> Result<PreparedData, DataErrors> {
    prepare_blocks_or_find(job, tokenizer, template, out_dir, &[], progress)
}

/// [`prepare_blocks`], and a block file from the same inputs may also be in one of `others`.
pub fn prepare_blocks_or_find(
    job: &JobSpec,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    out_dir: &Path,
    others: &[PathBuf],
    progress: &Progress,
) -> Result<PreparedData, DataErrors> {
    progress.begin("reading the data", bytes_of(job));
    let data_digest = data_digest(job, progress)?;
    let positions = model_positions(job)?;
    let inputs_of = |job: &JobSpec| inputs_digest(job, &data_digest, tokenizer, template);
    // What cannot be used is told where nothing else can be.
    let mut damaged = Vec::new();
    for folder in std::iter::once(out_dir).chain(others.iter().map(PathBuf::as_path)) {
        let found = reuse(folder, job, positions, inputs_of, &mut damaged);
        if let Some((job, file, counts)) = found {
            return Ok(PreparedData {
                job: settle(&job, counts.size(positions), counts.blocks),
                file,
                counts,
                samples: samples(&job, tokenizer, template, 1)?,
                data_digest,
                is_found: true,
                notices: Vec::new(),
            });
        }
    }
    let source = Source::new(job, tokenizer, template)?.watched_by(progress);
    progress.begin("tokenising the data", bytes_of(job));
    failpoint::reached("pack");
    let mut packer = Packer::new(out_dir);
    let mut filter = Filter::new(&job.mixture);
    let (mut first, mut failed) = (None, None);
    let reading = source.read(|batch| {
        for example in filter.keep(batch) {
            first.get_or_insert_with(|| {
                source.drop_texts();
                sample_of(&example, tokenizer)
            });
            failed = failed.take().or(packer.add(&example).err());
        }
        failed.is_none()
    })?;
    if let Some(reason) = failed {
        return Err(DataErrors::one(None, reason));
    }
    packer.counts.rows = reading.rows;
    packer.unlearned = reading.unlearned;
    packer.counts.notes = reading.notes;
    packer.counts.short_examples = filter.short_examples;
    packer.counts.duplicate_rows = filter.duplicate_rows;
    packer.counts.dated_template = template.is_some_and(ChatTemplate::uses_the_date);
    packer
        .mix(job)
        .map_err(|reason| DataErrors::one(None, reason))?;
    let job = &settle_sequence_len(job, packer.size(positions));
    let inputs = inputs_of(job);
    let packed = packer
        .pack(job)
        .map_err(|reason| DataErrors::one(None, reason))?;
    let path = out_dir.join(file_name(&inputs));
    let file = packed
        .write(&path, job, inputs, source.pad_id(), progress)
        .map_err(|error| DataErrors::one(None, error.to_string()))?;
    Ok(PreparedData {
        job: settle(job, packed.counts.size(positions), packed.counts.blocks),
        file,
        counts: packed.counts,
        samples: first.into_iter().collect(),
        data_digest,
        is_found: false,
        notices: damaged,
    })
}

/// Removes the block files beside `current`, which were made from other inputs. For the owner of the folder. Whatever
/// else is there stays, and so does what cannot be removed: it only takes up room.
pub fn prune_blocks(current: &BlockFile) {
    let folder = current.path().parent();
    let Some(entries) = folder.and_then(|folder| std::fs::read_dir(folder).ok()) else {
        return;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().and_then(OsStr::to_str);
        let is_other = path.file_name() != current.path().file_name();
        if is_other && name.is_some_and(is_file_name) {
            let _ = std::fs::remove_file(&path);
        }
    }
}

/// Most block files of a folder that are looked at for one that will do.
const MAX_CANDIDATES: usize = 1000;

const NAME_START: &str = "blocks-";
const NAME_END: &str = ".bin";
/// Digits of the digest in the name of a block file.
const NAME_DIGITS: usize = 16;

fn file_name(inputs: &blake3::Hash) -> String {
    format!("{NAME_START}{}{NAME_END}", &inputs.to_hex()[..NAME_DIGITS])
}

fn is_file_name(name: &str) -> bool {
    let digits = name.strip_prefix(NAME_START);
    let digits = digits.and_then(|rest| rest.strip_suffix(NAME_END));
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    digits.is_some_and(|digits| digits.len() == NAME_DIGITS && digits.bytes().all(is_digit))
}

/// The first `count` examples of the data.
pub fn samples(
    job: &JobSpec,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    count: usize,
) -> Result<Vec<Sample>, DataErrors> {
    let source = Source::new(job, tokenizer, template)?;
    let mut found = Vec::new();
    let mut filter = Filter::new(&job.mixture);
    source.read(|batch| {
        found.extend(filter.keep(batch));
        found.len() < count
    })?;
    found.truncate(count);
    Ok(found
        .iter()
        .map(|example| sample_of(example, tokenizer))
        .collect())
}

/// The block file of this job in the folder, if there is one, and the job with the length of its blocks. One that cannot be used
/// is told in `notices`.
fn reuse(
    folder: &Path,
    job: &JobSpec,
    positions: Option<usize>,
    inputs_of: impl Fn(&JobSpec) -> blake3::Hash,
    notices: &mut Vec<String>,
) -> Option<(JobSpec, BlockFile, DataCounts)> {
    let mut usable = |path: &Path| {
        let claims = match blockfile::claims(path) {
            Ok(claims) => claims,
            Err(BlockFileError::File(_)) => return None,
            Err(damaged) => {
                notices.push(format!("{damaged}; the data is prepared anew"));
                return None;
            }
        };
        let counts: DataCounts = serde_json::from_slice(&claims.info).ok()?;
        let job = settle_sequence_len(job, counts.size(positions));
        if claims.inputs != *inputs_of(&job).as_bytes() {
            return None;
        }
        let file = match BlockFile::open(path) {
            Ok(file) => file,
            Err(damaged) => {
                notices.push(format!("{damaged}; the data is prepared anew"));
                return None;
            }
        };
        let usable = file.inputs() == inputs_of(&job).as_bytes()
            && file.sequence_len() == job.sequence_len
            && file.train_blocks() == counts.blocks
            && file.train_blocks() > 0
            && file.eval_blocks() == counts.eval_blocks
            && (job.datasets.len() == 1 || counts.sets.len() == job.datasets.len());
        usable.then_some((job, file, counts))
    };
    if !job.reading.left_to_data.sequence_len {
        return usable(&folder.join(file_name(&inputs_of(job))));
    }
    // Only what the data came to says how long the blocks are, and only the file of the blocks knows that.
    let entries = std::fs::read_dir(folder).ok()?;
    let paths = entries.flatten().map(|entry| entry.path());
    let is_ours = |path: &PathBuf| {
        let name = path.file_name().and_then(OsStr::to_str);
        name.is_some_and(is_file_name)
    };
    let mut paths: Vec<PathBuf> = paths.filter(is_ours).take(MAX_CANDIDATES).collect();
    paths.sort_unstable();
    paths.iter().find_map(|path| usable(path))
}

/// How many positions the model was made for, as its `config.json` says.
fn model_positions(job: &JobSpec) -> Result<Option<usize>, DataErrors> {
    let path = job.base_model.join("config.json");
    let config = read_json(&path).map_err(|reason| DataErrors::one(Some(&path), reason))?;
    let positions = config.and_then(|config| config.get("max_position_embeddings")?.as_u64());
    Ok(positions.and_then(|positions| usize::try_from(positions).ok()))
}

/// Bytes of all dataset files, as far as they are there.
fn bytes_of(job: &JobSpec) -> u64 {
    let files = job.all_datasets().flat_map(DatasetSpec::read_files);
    let sizes = files.map(|file| std::fs::metadata(file).map_or(0, |metadata| metadata.len()));
    sizes.sum()
}

/// BLAKE3 over the dataset files in order, with the splits and datasets that they are of, hex.
fn data_digest(job: &JobSpec, progress: &Progress) -> Result<String, DataErrors> {
    let mut all = blake3::Hasher::new();
    let mut errors = DataErrors::default();
    // A file that moves from one dataset, list or split to another makes other data.
    all.update(&(job.datasets.len() as u64).to_le_bytes());
    for dataset in job.all_datasets() {
        for (name, files) in dataset.read_splits() {
            all.update(&(name.len() as u64).to_le_bytes());
            all.update(name.as_bytes());
            all.update(&(files.len() as u64).to_le_bytes());
            for file in files {
                match digest_of_file(&file, progress) {
                    Ok(digest) => drop(all.update(digest.as_bytes())),
                    Err(reason) => {
                        let copy = Path::new(STANDARD_INPUT);
                        let file = if dataset.is_stdin() { copy } else { &file };
                        errors.merge(DataErrors::one(Some(file), reason));
                    }
                }
            }
        }
        all.update(b"next dataset");
    }
    errors.or(all.finalize().to_hex().to_string())
}

fn digest_of_file(path: &Path, progress: &Progress) -> Result<String, String> {
    if file_of_rows(path)?.len() == 0 {
        return Err("the dataset is empty".to_owned());
    }
    file_digest_watched(path, progress).map_err(|error| error.to_string())
}

/// Digest of everything that decides what the blocks hold. A template's date does not count: a run that is resumed the next day
/// goes on with the blocks it began with.
fn inputs_digest(
    job: &JobSpec,
    data_digest: &str,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
) -> blake3::Hash {
    let described = |datasets: &[DatasetSpec]| {
        let described = datasets.iter().map(|dataset| {
            let rows = (&dataset.split, dataset.max_samples, &dataset.format);
            let shown = (dataset.has_system_column, dataset.drop_system_message);
            let shape = (dataset.kind, &dataset.fields, &dataset.prompt);
            let rows = (rows, &dataset.selection);
            serde_json::json!((shape, rows, &dataset.roles, shown, &dataset.mask))
        });
        serde_json::Value::Array(described.collect())
    };
    let datasets = described(&job.datasets);
    let held_out = (job.val_set_size, job.seed, job.shuffle);
    let mut description = serde_json::json!([
        PACKING_VERSION,
        crate::VERSION,
        data_digest,
        datasets,
        (job.val_set_size != ValSetSize::None).then_some(held_out),
        (job.sequence_len, job.sample_packing, job.train_on_inputs),
        tokenizer.digest(),
        template.map(ChatTemplate::source),
        (&job.chat_template_kwargs, &job.default_system_message),
        &job.eot_tokens,
        job.excess_length_strategy,
    ]);
    // What most jobs have not counts where it is not at its default.
    let selects = |dataset: &DatasetSpec| dataset.selection != Selection::default();
    let is_mixed = job.mixture != MixtureSpec::default() || job.all_datasets().any(selects);
    if let Some(parts) = description.as_array_mut() {
        if is_mixed {
            parts.push(serde_json::json!([job.mixture, job.seed]));
        }
        if !job.test_datasets.is_empty() {
            parts.push(described(&job.test_datasets));
        }
    }
    blake3::hash(description.to_string().as_bytes())
}
