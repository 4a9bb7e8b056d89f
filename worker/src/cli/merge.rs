//! `worker merge`: a model and an adapter become one model, for programs that take no adapters.

use std::path::PathBuf;

use clap::Args;
use worker::engine::inference::merge::{MergeError, merge};
use worker::engine::inference::merged_weights::FourBits;

#[derive(Args)]
pub struct MergeArgs {
    /// Folder of the base model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder of a PEFT adapter for it
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Add the adapter to what 4 bits (NF4) leave of the model, as a job with load_in_4bit trained it
    #[arg(long = "load-in-4bit")]
    load_in_4bit: bool,
    /// Where the merged model goes: a folder that is not there yet
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
}

pub fn run(args: MergeArgs) -> Result<(), MergeError> {
    let four_bits = args.load_in_4bit.then_some(FourBits::USUAL);
    merge(&args.model, &args.adapter, &args.output, four_bits)?;
    crate::print(format!("merged into {}\n", args.output.display()));
    Ok(())
}
