//! The coordinator's command line.

use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser};
use common::{failpoint, logging, manual, streams};
use coordinator::args::{Arguments, Command, exit};
use coordinator::check::{self, CheckError, CheckOptions};
use coordinator::start;

/// How long the last words may take to be read.
const FAREWELL: Duration = Duration::from_secs(3);

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // What ails a worker of this process comes back as a run event; its own log would say it twice.
    let usual = "warn,worker=off";
    logging::begin(arguments.log_level.as_deref(), usual, streams::stderr);
    match failpoint::arm() {
        Ok(Some(warning)) => tracing::warn!("{warning}"),
        Ok(None) => {}
        Err(error) => {
            complain(&error);
            streams::finish(FAREWELL);
            return ExitCode::from(exit::USAGE);
        }
    }
    let code = match arguments.command {
        Command::Start(arguments) => start::run(&arguments).unwrap_or_else(|error| {
            complain(&error);
            error.exit_code()
        }),
        Command::Check(arguments) => {
            let options = CheckOptions {
                show: arguments.show,
                json: arguments.json,
            };
            match arguments.job.load() {
                Err(errors) => {
                    complain(&errors);
                    exit::USAGE
                }
                Ok(job) => check_job(&job, &options),
            }
        }
        Command::Completions { shell } => print(&manual::completions(Arguments::command(), shell)),
        Command::Man { command } => match manual::page(Arguments::command(), command.as_deref()) {
            Ok(page) => print(&page),
            Err(error) => {
                complain(&error);
                exit::USAGE
            }
        },
    };
    streams::finish(FAREWELL);
    ExitCode::from(code)
}

fn print(text: &[u8]) -> u8 {
    // Nobody reads any more.
    let _ = std::io::Write::write_all(&mut std::io::stdout(), text);
    exit::DONE
}

fn check_job(job: &common::job::JobSpec, options: &CheckOptions) -> u8 {
    match check::run(job, options, &mut std::io::stdout().lock()) {
        Ok(()) => exit::DONE,
        Err(error) => {
            complain(&error);
            match error {
                CheckError::Preflight(_) => exit::PREFLIGHT,
                _ => exit::JOB_FAILED,
            }
        }
    }
}

/// After everything else that was said. What rows, templates and peers have to do with the error may hold anything. A terminal
/// that is gone takes no words.
fn complain(error: &dyn std::fmt::Display) {
    let error = common::text::error(&error.to_string());
    streams::finish(FAREWELL);
    streams::stderr().say(&format!("error: {error}"));
}
