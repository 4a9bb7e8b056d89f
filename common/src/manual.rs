//! The command line read, and told to others: completions for a shell, and manual pages. The command goes in, text comes out.

use std::io::ErrorKind;

use clap::{Command, Parser};
use clap_complete::Shell;

use crate::streams::PrintError;

/// A script that completes this program's command line.
pub fn completions(mut command: Command, shell: Shell) -> Vec<u8> {
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut script);
    script
}

/// The manual page of the program, or of one of its commands.
///
/// # Errors
/// There is no such command.
pub fn page(mut command: Command, of: Option<&str>) -> Result<Vec<u8>, String> {
    command.build();
    let shown = match of {
        None => command,
        Some(name) => {
            let commands = command.get_subcommands();
            let known: Vec<&str> = commands.map(Command::get_name).collect();
            let wrong = || {
                format!(
                    "there is no command {name:?}: name one of {}",
                    known.join(", ")
                )
            };
            let found = command.find_subcommand(name).ok_or_else(wrong)?;
            found.clone()
        }
    };
    let mut page = Vec::new();
    let rendered = clap_mangen::Man::new(shown).render(&mut page);
    rendered.map_err(|error| error.to_string())?;
    Ok(page)
}

/// The command line of this process. Where it asks for help or the version, or is wrong, that is said and the process ends.
///
/// # Errors
/// What was asked for cannot be printed.
pub fn parse<P: Parser>() -> Result<P, PrintError> {
    let ended = match P::try_parse() {
        Ok(parsed) => return Ok(parsed),
        Err(ended) => ended,
    };
    match ended.print() {
        Err(error) if !ended.use_stderr() && error.kind() != ErrorKind::BrokenPipe => {
            Err(error.into())
        }
        _ => std::process::exit(ended.exit_code()),
    }
}
