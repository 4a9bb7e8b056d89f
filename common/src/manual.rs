//! The command line told to others: completions for a shell, and manual pages. The command goes in, text comes out.

use clap::Command;
use clap_complete::Shell;

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
