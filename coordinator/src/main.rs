//! The coordinator's command line.

use std::process::ExitCode;

use clap::Parser;
use common::failpoint;
use coordinator::args::{Arguments, Command, exit};
use coordinator::check::{self, CheckError, CheckOptions};
use coordinator::start;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // What ails a worker of this process comes back as a run event; its own log would say it twice.
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn,worker=off"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    match failpoint::arm() {
        Ok(Some(warning)) => tracing::warn!("{warning}"),
        Ok(None) => {}
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(exit::USAGE);
        }
    }
    let code = match arguments.command {
        Command::Start(arguments) => start::run(&arguments).unwrap_or_else(|error| {
            eprintln!("error: {error}");
            error.exit_code()
        }),
        Command::Check(arguments) => {
            let options = CheckOptions {
                show: arguments.show,
                json: arguments.json,
            };
            match arguments.job.load() {
                Err(errors) => {
                    eprintln!("error: {errors}");
                    exit::USAGE
                }
                Ok(job) => check_job(&job, &options),
            }
        }
    };
    ExitCode::from(code)
}

fn check_job(job: &common::job::JobSpec, options: &CheckOptions) -> u8 {
    match check::run(job, options, &mut std::io::stdout().lock()) {
        Ok(()) => exit::DONE,
        Err(error) => {
            eprintln!("error: {error}");
            match error {
                CheckError::Preflight(_) => exit::PREFLIGHT,
                _ => exit::JOB_FAILED,
            }
        }
    }
}
