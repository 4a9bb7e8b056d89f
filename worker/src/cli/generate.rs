//! `worker generate`: the answer to a prompt on standard output, as it comes.

use std::borrow::Cow;
use std::io::{self, IsTerminal};
use std::path::PathBuf;

use clap::Args;
use worker::engine::inference::generate::{GenerateError, GenerateOptions, generate_text};
use worker::engine::inference::merged_weights::FourBits;

#[derive(Args)]
pub struct GenerateArgs {
    /// Folder of the model: config.json, safetensors and tokenizer
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder of a PEFT adapter for it
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Quantise the model's linears to 4 bits (NF4) first, as a job with load_in_4bit does
    #[arg(long = "load-in-4bit")]
    load_in_4bit: bool,
    /// What to answer: one user message of the model's chat template, or plain text where it has none
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: String,
    /// Longest answer, in tokens
    #[arg(long, value_name = "N", default_value_t = 256, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: u32,
    /// 0 takes the likeliest token each time; higher is more varied
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true, value_parser = temperature)]
    temperature: f64,
    /// Seed of the draws
    #[arg(
        long,
        value_name = "N",
        default_value_t = 42,
        allow_negative_numbers = true
    )]
    seed: u64,
}

pub fn run(args: GenerateArgs) -> Result<(), GenerateError> {
    let options = GenerateOptions {
        model_dir: args.model,
        adapter_dir: args.adapter,
        prompt: args.prompt,
        four_bits: args.load_in_4bit.then_some(FourBits::USUAL),
        max_new_tokens: args.max_new_tokens as usize,
        temperature: args.temperature,
        seed: args.seed,
    };
    generate_text(&options, &mut |piece| print(piece))?;
    print("\n");
    Ok(())
}

/// Prints a piece of the answer: as it is into a file or program; on a terminal, what a model says must not repaint that.
fn print(piece: &str) {
    let piece = match io::stdout().is_terminal() {
        true => Cow::Owned(common::text::visible(piece)),
        false => Cow::Borrowed(piece),
    };
    if !crate::print(piece.as_bytes()) {
        // Nobody reads any more.
        std::process::exit(0);
    }
}

fn temperature(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(temperature) if (0.0..=100.0).contains(&temperature) => Ok(temperature),
        _ => Err("a number from 0 to 100 is needed".to_owned()),
    }
}
