//! Why the output folder cannot be used, or its files not be written.

use std::path::{Path, PathBuf};

use common::files::FileError;

use crate::store::layout::RUN;

/// Why the output folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    #[error("{path}: cannot {action}: {source}")]
    Io {
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{path} is not a run record ({reason}); move it away, or name another output_dir")]
    BrokenRecord { path: PathBuf, reason: String },
    #[error(
        "output_dir {dir} holds another job: {digests}{differences}{length}; name another output_dir, or move that folder away"
    )]
    OtherJob {
        dir: PathBuf,
        /// Which digests differ, there and here.
        digests: String,
        /// Which fields of the job differ, or nothing.
        differences: String,
        /// Why a job that differs only in its number of steps cannot go on from the steps that were done, or nothing.
        length: String,
    },
    #[error("output_dir {dir} is also {what}, which must stay as it is; name another output_dir")]
    Input { dir: PathBuf, what: &'static str },
    #[error("output_dir {dir} is not a folder; name another output_dir")]
    NotAFolder { dir: PathBuf },
    #[error(
        "output_dir {dir} was removed or renamed while the run goes on: the run saves its newest state there and stops"
    )]
    Removed { dir: PathBuf },
}

impl OutputError {
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

impl From<OutputError> for FileError {
    fn from(error: OutputError) -> Self {
        match error {
            OutputError::File(error) => error,
            OutputError::Io {
                action,
                path,
                source,
            } => Self::io(action, &path)(source),
            other => Self::io("record the result in", Path::new(RUN))(std::io::Error::other(
                other.to_string(),
            )),
        }
    }
}
