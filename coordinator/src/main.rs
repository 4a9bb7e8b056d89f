//! The coordinator's command line.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use common::{failpoint, streams};
use coordinator::args::{Arguments, Command, exit};
use coordinator::check::{self, CheckError, CheckOptions};
use coordinator::start;
use tracing_subscriber::EnvFilter;

/// How long the last words may take to be read.
const FAREWELL: Duration = Duration::from_secs(3);

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // What ails a worker of this process comes back as a run event; its own log would say it twice.
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn,worker=off"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(streams::stderr)
        // They would go to the same place.
        .log_internal_errors(false)
        .init();
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
    };
    streams::finish(FAREWELL);
    ExitCode::from(code)
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

/// After everything else that was said. A terminal that is gone takes no words.
fn complain(error: &dyn std::fmt::Display) {
    streams::finish(FAREWELL);
    streams::stderr().say(&format!("error: {error}"));
}
