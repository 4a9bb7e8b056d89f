//! `coordinator push`: the result in an output folder goes to the hub.

use std::path::PathBuf;

use clap::Args;
use common::job::{HubStrategy, PushSpec};
use common::progress::Progress;

use crate::run::push::{PushError, push};

#[derive(Debug, Args)]
pub struct PushArguments {
    /// Folder of a run that is done
    #[arg(value_name = "OUTPUT_DIR")]
    output_dir: PathBuf,
    /// Where it goes on the hub: OWNER/NAME, or NAME for the token's own account
    #[arg(value_name = "REPO")]
    repo: String,
    /// Make a repository that is not there yet public instead of private
    #[arg(long)]
    public: bool,
}

/// Pushes, and returns what to say of it.
pub fn run(arguments: &PushArguments) -> Result<String, PushError> {
    let spec = PushSpec {
        repo: arguments.repo.clone(),
        is_private: !arguments.public,
        token: None,
        strategy: HubStrategy::End,
    };
    push(&arguments.output_dir, &spec, &Progress::default()).map(|pushed| told(&pushed))
}

/// A line on what was pushed.
pub fn told(pushed: &crate::run::push::Pushed) -> String {
    let commit = &pushed.commit;
    match commit.is_new {
        true => format!(
            "pushed {} files to {}{}: {}",
            pushed.files,
            pushed.repo,
            match pushed.is_new {
                true => "",
                false => " (which was there, and stays as public or private as it was)",
            },
            commit.url
        ),
        false => format!("{} has these files already: {}", pushed.repo, commit.url),
    }
}
