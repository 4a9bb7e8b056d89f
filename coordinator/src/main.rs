//! The coordinator's command line.

use std::io::ErrorKind;
use std::process::ExitCode;

use clap::CommandFactory;
use common::progress::Progress;
use common::{failpoint, logging, manual, streams};
use coordinator::cli::arguments::{Arguments, Command};
use coordinator::cli::check::{self, CheckError, CheckOptions};
use coordinator::cli::{config, preprocess, push, start};
use coordinator::exit;
use coordinator::run::signals::Signals;
use mimalloc::MiMalloc;

/// Rendering chats and tokenising them take and give back small pieces of memory all the time.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> ExitCode {
    if let Err(error) = common::instruction_set::check() {
        complain(&error);
        streams::finish();
        return ExitCode::from(exit::USAGE);
    }
    let arguments: Arguments = match manual::parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            complain(&error);
            streams::finish();
            return ExitCode::from(exit::JOB_FAILED);
        }
    };
    // What ails a worker of this process comes back as a run event; its own log would say it twice.
    let usual = "warn,worker=off";
    logging::begin(arguments.log_level.as_deref(), usual, streams::stderr);
    match failpoint::arm() {
        Ok(Some(warning)) => tracing::warn!("{warning}"),
        Ok(None) => {}
        Err(error) => {
            complain(&error);
            streams::finish();
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
            match arguments.job.load(&Progress::default()) {
                Err(errors) => {
                    complain(&errors);
                    exit::USAGE
                }
                Ok(job) => check_job(&job, &options),
            }
        }
        Command::Preprocess(arguments) => preprocess::run(&arguments).unwrap_or_else(|error| {
            complain(&error);
            error.exit_code()
        }),
        Command::Config(command) => match config::run(&command) {
            Ok(text) => print(text.as_bytes()),
            Err(errors) => {
                complain(&errors);
                exit::USAGE
            }
        },
        Command::Push(arguments) => match push::run(&arguments) {
            Ok(told) => print(format!("{told}\n").as_bytes()),
            Err(error) => {
                complain(&error);
                exit::JOB_FAILED
            }
        },
        Command::Completions { shell } => print(&manual::completions(Arguments::command(), shell)),
        Command::Man { command } => match manual::page(Arguments::command(), command.as_deref()) {
            Ok(page) => print(&page),
            Err(error) => {
                complain(&error);
                exit::USAGE
            }
        },
    };
    streams::finish();
    ExitCode::from(code)
}

fn print(text: &[u8]) -> u8 {
    match streams::print(text) {
        Ok(_) => exit::DONE,
        Err(error) => {
            complain(&error);
            exit::JOB_FAILED
        }
    }
}

fn check_job(job: &common::job::JobSpec, options: &CheckOptions) -> u8 {
    let progress = Progress::default();
    let signals = match Signals::listen(progress.clone()) {
        Ok(signals) => signals,
        Err(error) => {
            complain(&format!("cannot listen to signals: {error}"));
            return exit::JOB_FAILED;
        }
    };
    let checked = check::run(job, options, &progress, &mut std::io::stdout().lock());
    if let (Err(_), Some(signal)) = (&checked, signals.first())
        && progress.is_cancelled()
    {
        streams::stderr().say(&signal.stopped_early(&progress));
        return signal.code;
    }
    match checked {
        Ok(()) => exit::DONE,
        // Whoever reads the report has seen enough.
        Err(CheckError::Output(error)) if error.kind() == ErrorKind::BrokenPipe => exit::DONE,
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
    streams::finish();
    streams::stderr().say(&common::text::error_lines(&error));
}
