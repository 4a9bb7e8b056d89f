//! Checkpoint folders, `checkpoint-<step>/`: a snapshot, the trainer's state, and a manifest with the digest of every
//! file and of itself. A checkpoint that does not verify to the last bit does not count.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::adapter::ADAPTER_WEIGHTS;
use super::json::{json_text, read_json, write_json};
use super::snapshot::OPTIMIZER;
use super::{FileEntry, FileError, atomic, durable};

pub const MANIFEST: &str = "manifest.json";
const MAX_MANIFEST_BYTES: u64 = 64 << 20;
const PREFIX: &str = "checkpoint-";
const TENSORS: &str = ".safetensors";

/// The manifest of a checkpoint: which job, model and step it is of, and its files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Number of optimizer updates that the state has seen.
    pub step: u64,
    pub job_digest: String,
    pub base_model_digest: String,
    pub layout_digest: String,
    pub weights_digest: String,
    pub numerics_class: String,
    /// Entries of every file but the manifest itself.
    pub files: Vec<FileEntry>,
}

#[derive(Serialize, Deserialize)]
struct SealedManifest {
    #[serde(flatten)]
    manifest: Manifest,
    /// BLAKE3 of the fields above as compact JSON, so that a flipped bit in the manifest shows too.
    manifest_digest: String,
}

impl SealedManifest {
    fn of(manifest: Manifest) -> Self {
        Self {
            manifest_digest: digest(&manifest),
            manifest,
        }
    }
}

/// A checkpoint that was passed over because it does not verify.
#[derive(Debug)]
pub struct Damaged {
    pub path: PathBuf,
    pub reason: FileError,
}

/// The checkpoints that [`newest_valid`] found.
#[derive(Debug, Default)]
pub struct Found {
    pub newest: Option<(PathBuf, Manifest)>,
    /// Newer checkpoints that do not verify.
    pub damaged: Vec<Damaged>,
}

/// Folder of the checkpoint of a step.
pub fn checkpoint_dir(output_dir: &Path, step: u64) -> PathBuf {
    output_dir.join(format!("{PREFIX}{step}"))
}

/// Digests every file in `dir` and writes the manifest: the last thing before the folder is committed, which makes the
/// manifest durable after everything else. `head.files` is replaced by what is there; tensors that are listed in it were
/// digested when they were written, and are not read again.
pub fn seal(dir: &Path, head: Manifest) -> Result<Manifest, FileError> {
    let mut manifest = head;
    let known = std::mem::take(&mut manifest.files);
    for entry in fs::read_dir(dir).map_err(FileError::io("read", dir))? {
        let entry = entry.map_err(FileError::io("read", dir))?;
        let name = entry.file_name().into_string().map_err(|name| {
            FileError::malformed(dir, format!("the file name {name:?} is not UTF-8"))
        })?;
        if name != MANIFEST && entry.path().is_file() {
            let path = entry.path();
            let size = fs::metadata(&path)
                .map_err(FileError::io("read", &path))?
                .len();
            // Nobody but who wrote them writes tensors; other files may have been replaced since.
            let is_known = |file: &&FileEntry| {
                file.path == name && file.size == size && name.ends_with(TENSORS)
            };
            manifest.files.push(match known.iter().find(is_known) {
                Some(file) => file.clone(),
                None => FileEntry::of(dir, &name)?,
            });
        }
    }
    manifest.files.sort_by(|a, b| a.path.cmp(&b.path));
    let sealed = SealedManifest::of(manifest);
    write_json(&dir.join(MANIFEST), &sealed)?;
    Ok(sealed.manifest)
}

/// The manifest's own file for a copy of its checkpoint in which the file `name` has other content.
pub fn manifest_of_copy(
    manifest: &Manifest,
    name: &str,
    content: &[u8],
) -> Result<Vec<u8>, FileError> {
    let mut manifest = manifest.clone();
    for file in manifest.files.iter_mut().filter(|file| file.path == name) {
        file.size = content.len() as u64;
        file.digest = blake3::hash(content).to_hex().to_string();
    }
    json_text(MANIFEST, &SealedManifest::of(manifest))
}

/// Verifies a checkpoint: reads its manifest and compares every file with it, by size and digest.
pub fn verify(dir: &Path) -> Result<Manifest, FileError> {
    let path = dir.join(MANIFEST);
    let sealed: SealedManifest = read_json(&path, MAX_MANIFEST_BYTES)?;
    let manifest = sealed.manifest;
    if digest(&manifest) != sealed.manifest_digest {
        return Err(FileError::Digest {
            path,
            expected: sealed.manifest_digest,
        });
    }
    let names: BTreeSet<&str> = manifest.files.iter().map(|f| f.path.as_str()).collect();
    if names.len() != manifest.files.len() {
        return Err(FileError::malformed(&path, "lists a file twice"));
    }
    let has_weights = names.contains(ADAPTER_WEIGHTS)
        || names
            .iter()
            .any(|name| name.starts_with("model") && name.ends_with(TENSORS));
    if !has_weights || !names.contains(OPTIMIZER) {
        return Err(FileError::malformed(
            &path,
            "lists no weights or no optimizer state",
        ));
    }
    for file in &manifest.files {
        file.verify(dir)?;
    }
    if dir.file_name() != checkpoint_dir(dir, manifest.step).file_name() && is_checkpoint_name(dir)
    {
        let reason = format!(
            "is of step {}, not what its folder is called",
            manifest.step
        );
        return Err(FileError::malformed(&path, reason));
    }
    Ok(manifest)
}

/// Renames all checkpoints of an output folder, so that no run goes on from them. What was set aside before is removed.
pub fn set_aside(output_dir: &Path) -> Result<Vec<PathBuf>, FileError> {
    let mut aside = Vec::new();
    for (_, path) in list(output_dir)? {
        let mut name = path.clone().into_os_string();
        name.push(".old");
        let to = PathBuf::from(name);
        if to.exists() {
            atomic::remove_dir(&to)?;
        }
        durable::rename(&path, &to).map_err(FileError::io("set aside", &path))?;
        aside.push(to);
    }
    Ok(aside)
}

/// The newest checkpoint that verifies, and the newer ones that do not. An output folder that is not there has none.
pub fn newest_valid(output_dir: &Path) -> Result<Found, FileError> {
    let mut found = Found::default();
    for (_, path) in list(output_dir)?.into_iter().rev() {
        match verify(&path) {
            Ok(manifest) => {
                found.newest = Some((path, manifest));
                break;
            }
            Err(reason) => found.damaged.push(Damaged { path, reason }),
        }
    }
    Ok(found)
}

/// Removes all but the newest `limit` of the checkpoints up to `step`, at least one of which stays. Gives back what was
/// removed. Those of later steps are left alone: the run went on from an earlier one because they are damaged, or the one
/// of `step` was late.
///
/// That of step `best` stays whatever the limit is. As in Transformers it is one of the `limit`, but never the only one.
pub fn prune(
    output_dir: &Path,
    limit: usize,
    step: u64,
    best: Option<u64>,
) -> Result<Vec<PathBuf>, FileError> {
    let mut checkpoints = list(output_dir)?;
    checkpoints.retain(|(of, _)| *of <= step);
    let newest = checkpoints.last().map(|(of, _)| *of);
    let older = checkpoints.iter().position(|(of, _)| Some(*of) == best);
    let mut kept = limit.max(1);
    if let Some(position) = older.filter(|_| best != newest) {
        checkpoints.remove(position);
        kept = (kept - 1).max(1);
    }
    checkpoints.truncate(checkpoints.len().saturating_sub(kept));
    let mut removed = Vec::new();
    for (_, path) in checkpoints {
        // A removal that is cut short must not leave what looks like a checkpoint.
        atomic::remove_dir(&path)?;
        removed.push(path);
    }
    Ok(removed)
}

/// Every checkpoint folder by step, oldest first.
pub fn list(output_dir: &Path) -> Result<Vec<(u64, PathBuf)>, FileError> {
    let entries = match fs::read_dir(output_dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(FileError::io("read", output_dir))?,
    };
    let mut checkpoints = Vec::new();
    for entry in entries {
        let path = entry.map_err(FileError::io("read", output_dir))?.path();
        if let Some(step) = step_of(&path)
            && path.is_dir()
        {
            checkpoints.push((step, path));
        }
    }
    checkpoints.sort();
    Ok(checkpoints)
}

fn is_checkpoint_name(dir: &Path) -> bool {
    step_of(dir).is_some()
}

fn step_of(path: &Path) -> Option<u64> {
    let number = path.file_name()?.to_str()?.strip_prefix(PREFIX)?;
    let step = number.parse::<u64>().ok()?;
    (step.to_string() == number).then_some(step)
}

fn digest(manifest: &Manifest) -> String {
    // Serialising strings and integers into memory cannot fail.
    let compact = serde_json::to_vec(manifest).unwrap_or_default();
    blake3::hash(&compact).to_hex().to_string()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::atomic::AtomicDir;
    use super::super::snapshot::tests::{adapter, snapshot};
    use super::*;

    fn save(output_dir: &Path, step: u64) -> PathBuf {
        let target = checkpoint_dir(output_dir, step);
        let dir = AtomicDir::create(&target).unwrap();
        let mut snapshot = snapshot();
        snapshot.step = step;
        snapshot.write_files(dir.path(), &adapter()).unwrap();
        fs::write(dir.path().join("trainer_state.json"), "{}").unwrap();
        let head = Manifest {
            step,
            job_digest: "job".into(),
            base_model_digest: "model".into(),
            layout_digest: snapshot.layout.digest(),
            weights_digest: snapshot.weights_digest(),
            numerics_class: "test".into(),
            files: Vec::new(),
        };
        seal(dir.path(), head).unwrap();
        dir.commit().unwrap();
        target
    }

    fn newest_step(output_dir: &Path) -> Option<u64> {
        newest_valid(output_dir)
            .unwrap()
            .newest
            .map(|(_, manifest)| manifest.step)
    }

    #[test]
    fn what_is_set_aside_is_no_checkpoint_any_more() {
        let folder = tempfile::tempdir().unwrap();
        for round in 0..2 {
            let path = save(folder.path(), 4);
            let aside = set_aside(folder.path()).unwrap();
            assert_eq!(aside, [folder.path().join("checkpoint-4.old")], "{round}");
            assert!(aside[0].join(MANIFEST).is_file() && !path.exists());
            assert!(newest_valid(folder.path()).unwrap().newest.is_none());
        }
    }

    #[test]
    fn the_newest_checkpoint_is_found_by_number() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(newest_step(&folder.path().join("absent")), None);
        for step in [2, 9, 10] {
            save(folder.path(), step);
        }
        fs::create_dir(folder.path().join("checkpoint-011")).unwrap();
        fs::create_dir(folder.path().join("checkpoint-best")).unwrap();
        assert_eq!(newest_step(folder.path()), Some(10));
    }

    #[test]
    fn a_bit_flipped_anywhere_is_found() {
        let folder = tempfile::tempdir().unwrap();
        save(folder.path(), 1);
        let newest = save(folder.path(), 2);
        for entry in fs::read_dir(&newest).unwrap() {
            let path = entry.unwrap().path();
            let original = fs::read(&path).unwrap();
            for position in [
                0,
                original.len() / 3,
                original.len() / 2,
                original.len() - 2,
            ] {
                let mut bytes = original.clone();
                bytes[position] ^= 1;
                fs::write(&path, &bytes).unwrap();
                let found = newest_valid(folder.path()).unwrap();
                let step = found.newest.map(|(_, manifest)| manifest.step);
                assert_eq!(step, Some(1), "{path:?} byte {position}");
                assert_eq!(found.damaged[0].path, newest);
            }
            fs::write(&path, original).unwrap();
        }
        assert_eq!(newest_step(folder.path()), Some(2));
    }

    #[test]
    fn a_truncated_or_missing_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = save(folder.path(), 3);
        let optimizer = path.join(OPTIMIZER);
        let bytes = fs::read(&optimizer).unwrap();
        fs::write(&optimizer, &bytes[..bytes.len() - 1]).unwrap();
        let message = verify(&path).unwrap_err().to_string();
        assert!(message.contains(OPTIMIZER), "{message}");
        fs::remove_file(&optimizer).unwrap();
        let message = verify(&path).unwrap_err().to_string();
        assert!(message.contains(OPTIMIZER), "{message}");
    }

    #[test]
    fn a_hostile_manifest_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = save(folder.path(), 3);
        let honest = verify(&path).unwrap();
        let refuse = |change: &dyn Fn(&mut Manifest)| {
            let mut manifest = honest.clone();
            change(&mut manifest);
            let sealed = SealedManifest {
                manifest_digest: digest(&manifest),
                manifest,
            };
            write_json(&path.join(MANIFEST), &sealed).unwrap();
            verify(&path).unwrap_err();
        };
        refuse(&|m| m.files[0].path = "../checkpoint-3/optimizer.safetensors".into());
        refuse(&|m| m.files[0].path = "/etc/passwd".into());
        refuse(&|m| m.files[0].size = u64::MAX);
        refuse(&|m| m.files.push(m.files[0].clone()));
        refuse(&|m| m.files.clear());
        refuse(&|m| m.step = 4);
        // Nothing but the digest guards what no file shows.
        let sealed = SealedManifest {
            manifest_digest: digest(&honest),
            manifest: Manifest {
                numerics_class: "another".into(),
                ..honest.clone()
            },
        };
        write_json(&path.join(MANIFEST), &sealed).unwrap();
        verify(&path).unwrap_err();
        fs::write(path.join(MANIFEST), "{}").unwrap();
        verify(&path).unwrap_err();
    }

    #[test]
    fn tensors_keep_the_digest_they_were_written_with_and_other_files_may_be_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = save(folder.path(), 3);
        let head = verify(&path).unwrap();
        fs::write(path.join("trainer_state.json"), "[]").unwrap();
        seal(&path, head.clone()).unwrap();
        verify(&path).unwrap();
        // What a disk made of tensors since they were written is not taken for what was written.
        let mut bytes = fs::read(path.join(OPTIMIZER)).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(path.join(OPTIMIZER), bytes).unwrap();
        seal(&path, head).unwrap();
        verify(&path).unwrap_err();
    }

    #[test]
    fn pruning_keeps_the_newest() {
        let folder = tempfile::tempdir().unwrap();
        for step in [1, 2, 10] {
            save(folder.path(), step);
        }
        let steps = || -> Vec<u64> { list(folder.path()).unwrap().iter().map(|c| c.0).collect() };
        // A damaged one of a later step must not cost the newest that is sound.
        assert_eq!(prune(folder.path(), 1, 2, None).unwrap().len(), 1);
        assert_eq!(steps(), [2, 10]);
        save(folder.path(), 1);
        assert_eq!(prune(folder.path(), 2, 10, None).unwrap().len(), 1);
        assert_eq!(steps(), [2, 10]);
        prune(folder.path(), 0, 10, None).unwrap();
        assert_eq!(newest_step(folder.path()), Some(10));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn pruning_keeps_the_best_beside_the_newest() {
        let folder = tempfile::tempdir().unwrap();
        let steps = || -> Vec<u64> { list(folder.path()).unwrap().iter().map(|c| c.0).collect() };
        for step in [1, 2, 3, 4] {
            save(folder.path(), step);
        }
        prune(folder.path(), 3, 4, Some(1)).unwrap();
        assert_eq!(steps(), [1, 3, 4]);
        prune(folder.path(), 1, 4, Some(1)).unwrap();
        assert_eq!(steps(), [1, 4], "two are kept where one is the best");
        prune(folder.path(), 1, 4, Some(4)).unwrap();
        assert_eq!(steps(), [4]);
    }
}
