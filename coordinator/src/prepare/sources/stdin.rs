//! Rows from standard input: read once, into a file that a run which goes on finds again.
//!
//! Enters: standard input, and the digest of the rows that the run in the output folder began with. Leaves: a file of its
//! content and its digest, or why there is none. What a run began with is never replaced by something else in silence.

use std::fs::{self, File};
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};

use common::files::atomic::AtomicFile;
use common::progress::Progress;

const NAME_START: &str = "stdin-";
/// Characters of the digest in the name of the copy.
const NAME_DIGITS: usize = 16;
/// Most bytes that are read.
const MAX_BYTES: u64 = 1 << 42;
const READ_BYTES: usize = 1 << 20;

/// The copy of the rows in `folder`, and the digest of all of them. `known`: that of the rows that the run began with.
pub fn obtain(
    folder: &Path,
    known: Option<&str>,
    progress: &Progress,
) -> Result<(PathBuf, String), String> {
    let input = io::stdin();
    match input.is_terminal() {
        true => kept(folder, known, "a terminal, which gives no rows"),
        false => copy(&mut input.lock(), folder, known, progress),
    }
}

/// Reads all rows, where there are some; else the run's own copy is taken.
fn copy(
    input: &mut dyn Read,
    folder: &Path,
    known: Option<&str>,
    progress: &Progress,
) -> Result<(PathBuf, String), String> {
    let mut buffer = vec![0; READ_BYTES];
    let failed = |error: io::Error| format!("standard input cannot be read: {error}");
    let mut count = input.read(&mut buffer).map_err(failed)?;
    if count == 0 {
        return kept(folder, known, "empty");
    }
    fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    progress.begin("reading standard input", 0);
    // Its name follows from its content, which is known at its end.
    let part = folder.join(format!("{NAME_START}part"));
    let mut file = AtomicFile::create(&part).map_err(|error| error.to_string())?;
    let mut hasher = blake3::Hasher::new();
    let mut bytes = 0;
    while count > 0 {
        progress
            .check()
            .map_err(|cancelled| cancelled.to_string())?;
        bytes += count as u64;
        if bytes > MAX_BYTES {
            return Err(format!("standard input has more than {MAX_BYTES} bytes"));
        }
        hasher.update(&buffer[..count]);
        file.write_all(&buffer[..count])
            .map_err(|error| format!("{}: {error}", part.display()))?;
        count = input.read(&mut buffer).map_err(failed)?;
    }
    let digest = hasher.finalize().to_hex().to_string();
    if known.is_some_and(|known| known != digest) {
        return Err(
            "standard input has other rows than those that the run in output_dir began with: give it the same ones, or none (< /dev/null), \
             since it has a copy of them; or name another output_dir"
                .to_owned(),
        );
    }
    let path = path_of(folder, &digest);
    file.commit_as(&path).map_err(|error| error.to_string())?;
    Ok((path, digest))
}

/// The copy that an earlier start of the run made. `found`: what standard input is instead.
fn kept(folder: &Path, known: Option<&str>, found: &str) -> Result<(PathBuf, String), String> {
    let Some(known) = known else {
        return Err(format!(
            "standard input is {found}: give it the rows, as in `coordinator start job.yaml < rows.jsonl`"
        ));
    };
    let path = path_of(folder, known);
    let again = |what: &str| {
        format!(
            "standard input is {found}, and the copy of the rows that the run began with, {}, {what}: give it the same rows again",
            path.display()
        )
    };
    let file = File::open(&path).map_err(|_| again("is not there"))?;
    let mut hasher = blake3::Hasher::new();
    hasher
        .update_reader(file)
        .map_err(|error| again(&format!("cannot be read ({error})")))?;
    match hasher.finalize().to_hex().as_str() == known {
        true => Ok((path, known.to_owned())),
        false => Err(again("has other rows now")),
    }
}

fn path_of(folder: &Path, digest: &str) -> PathBuf {
    let digits = digest.get(..NAME_DIGITS).unwrap_or(digest);
    folder.join(format!("{NAME_START}{digits}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn give(rows: &str, folder: &Path, known: Option<&str>) -> Result<(PathBuf, String), String> {
        copy(&mut rows.as_bytes(), folder, known, &Progress::default())
    }

    #[test]
    fn rows_are_kept_by_their_digest_and_served_where_none_come() {
        let folder = tempfile::tempdir().unwrap();
        let (path, digest) = give("rows\n", folder.path(), None).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"rows\n");
        assert_eq!(digest, blake3::hash(b"rows\n").to_hex().to_string());
        let again = give("rows\n", folder.path(), Some(&digest)).unwrap();
        assert_eq!(again, (path.clone(), digest.clone()));
        let none = give("", folder.path(), Some(&digest)).unwrap();
        assert_eq!(none, (path, digest));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn other_rows_a_lost_copy_and_no_rows_at_all_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = give("", folder.path(), None).unwrap_err();
        assert!(error.contains("empty: give it the rows"), "{error}");
        let (path, digest) = give("rows\n", folder.path(), None).unwrap();
        let error = give("others\n", folder.path(), Some(&digest)).unwrap_err();
        assert!(error.contains("other rows than those"), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        fs::write(&path, "changed").unwrap();
        let error = give("", folder.path(), Some(&digest)).unwrap_err();
        assert!(error.contains("has other rows now"), "{error}");
        fs::remove_file(&path).unwrap();
        let error = give("", folder.path(), Some(&digest)).unwrap_err();
        assert!(
            error.contains("is not there: give it the same rows again"),
            "{error}"
        );
    }
}
