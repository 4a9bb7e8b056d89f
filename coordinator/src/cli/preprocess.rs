//! `coordinator preprocess`: the data of a job is read, tokenised and packed, and kept where later runs find it.
//!
//! Enters: a job. Leaves: a block file in the folder of prepared data, and on stdout what it holds, where it is and how to
//! remove it. Trains nothing, and writes nothing into the output folder.

use std::io;
use std::path::Path;

use common::job::JobErrors;
use common::progress::Progress;
use common::streams;
use thiserror::Error;

use super::arguments::PreprocessArguments;
use super::check;
use crate::exit;
use crate::prepare::{PreflightError, Prepared, USUAL_PREPARED_DIR, prepare_in};
use crate::report::terminal::{bytes, showing};
use crate::run::signals::Signals;

/// Why the data was not prepared.
#[derive(Debug, Error)]
pub enum PreprocessError {
    #[error(transparent)]
    Job(#[from] JobErrors),
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    #[error("cannot listen to signals: {0}")]
    Signals(#[from] io::Error),
    #[error("the data is prepared, but this cannot be told: {0}")]
    Output(#[from] streams::PrintError),
}

impl PreprocessError {
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Job(_) => exit::USAGE,
            Self::Preflight(_) => exit::PREFLIGHT,
            Self::Signals(_) | Self::Output(_) => exit::JOB_FAILED,
        }
    }
}

/// Prepares the data and gives back the exit code.
pub fn run(arguments: &PreprocessArguments) -> Result<u8, PreprocessError> {
    let progress = Progress::default();
    let signals = Signals::listen(progress.clone())?;
    let job = showing(&progress, || arguments.job.load(&progress))?;
    let folder = job.reading.prepared_dir.clone();
    let folder = folder.unwrap_or_else(|| USUAL_PREPARED_DIR.into());
    let prepared = showing(&progress, || prepare_in(&job, &folder, false, &progress));
    signals.finish(true);
    match (prepared, signals.first()) {
        (Err(_), Some(signal)) if progress.is_cancelled() => {
            streams::stdout().say(&signal.stopped_early(&progress));
            Ok(signal.code)
        }
        (prepared, _) => {
            streams::print(&told(&prepared?)?)?;
            Ok(exit::DONE)
        }
    }
}

/// What was prepared, for people.
fn told(prepared: &Prepared) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    check::write_data(&mut text, prepared)?;
    let file = prepared.data.file.path();
    let size = std::fs::metadata(file).map_or(0, |metadata| metadata.len());
    let how = match prepared.data.is_found {
        true => "was there already",
        false => "written",
    };
    let folder = file.parent().unwrap_or(Path::new("."));
    for (name, value) in [
        ("prepared", format!("{} ({}, {how})", file.display(), bytes(size))),
        (
            "next",
            "coordinator start finds it, with this job and with others that read the same data in the same way".to_owned(),
        ),
        (
            "to remove it",
            format!("delete that file, or all of {}: it is made again when it is needed", folder.display()),
        ),
    ] {
        check::write_row(&mut text, name, &value)?;
    }
    Ok(text)
}
