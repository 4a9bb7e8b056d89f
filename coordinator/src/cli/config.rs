//! `coordinator config`: a job file in Muster's own spelling, and the schema of job files.

use std::path::PathBuf;

use clap::Subcommand;
use common::job::{JobErrors, convert, schema};
use common::progress::Progress;

use crate::prepare::obtain_adapter;

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print a job file of Axolotl, TRL or LLaMA-Factory in Muster's own spelling
    Convert {
        #[arg(value_name = "JOB")]
        file: PathBuf,
    },
    /// Print a JSON Schema of job files
    ///
    /// An editor takes it from a first line: # yaml-language-server: $schema=FILE
    Schema,
}

/// What the command prints.
pub fn run(command: &ConfigCommand) -> Result<String, JobErrors> {
    match command {
        ConfigCommand::Convert { file } => convert(file, &|request| {
            obtain_adapter(request, &Progress::default())
        }),
        ConfigCommand::Schema => Ok(format!("{:#}\n", schema())),
    }
}
