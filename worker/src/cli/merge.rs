//! `worker merge`: a model and an adapter become one model, for programs that take no adapters.

use std::path::PathBuf;

use clap::Args;
use worker::engine::inference::merge::{MergeError, merge};

#[derive(Args)]
pub struct MergeArgs {
    /// Folder of the base model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder of a PEFT adapter for it
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Where the merged model goes: a folder that is not there yet
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
}

pub fn run(args: MergeArgs) -> Result<(), MergeError> {
    merge(&args.model, &args.adapter, &args.output)?;
    crate::print(format!("merged into {}\n", args.output.display()));
    Ok(())
}
