//! The worker's command line.

mod cli;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use cli::show::Show;
use cli::{bench, generate, merge, show, version};
use common::files::token::read_token;
use common::{logging, manual, streams};
use tokio_util::sync::CancellationToken;
use worker::join;
use worker::rpc::connect::ConnectError;
use worker::{Device, Finished, JoinOptions, WorkerError};

/// Exit codes, the same as the coordinator's.
const FAILED: u8 = 1;
const USAGE: u8 = 2;
const PREFLIGHT: u8 = 3;
const INTERRUPTED: u8 = 130;

const EXAMPLES: &str = "\
Examples:
  worker join machine1:7077
  worker join machine1:7077 --threads 8 --token-file token
  worker generate --model MODEL --adapter OUTPUT --prompt Hello
  worker merge --model MODEL --adapter OUTPUT --output merged
  worker bench --config MODEL/config.json";

const EXIT_CODES: &str = "\
Exit codes:
    0  done, or left as it was asked to
    1  failed
    2  wrong usage
    3  coordinator and worker do not fit
  130  Ctrl-C";

/// Muster's worker: joins a coordinator and computes its share of every step
#[derive(Parser)]
#[command(
    version,
    long_version = version::long(),
    about,
    after_help = EXAMPLES,
    after_long_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"),
    max_term_width = 100
)]
struct Cli {
    /// What of the log is shown: off, error, warn, info, debug, trace, or MODULE=LEVEL [default: info, or as MUSTER_LOG or
    /// RUST_LOG says]
    #[arg(long, global = true, value_name = "LEVEL", value_parser = logging::parse_level)]
    log_level: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Join a coordinator and work until its job is done
    ///
    /// Job, data and base model come from the coordinator; nothing else is needed on this machine. Workers may join and
    /// leave at any time. At Ctrl-C, SIGTERM or SIGHUP it hands over and leaves, within 25 s; a second one stops it at once.
    #[command(after_long_help = EXIT_CODES)]
    Join(JoinArgs),
    /// Answer a prompt with a model, fine-tuned or not
    ///
    /// Exit codes: 0 done, 1 failed, 2 usage.
    Generate(generate::GenerateArgs),
    /// Measure how fast this machine trains a model of a given shape
    ///
    /// Random weights and tokens, real steps. Exit codes: 0 done, 1 failed, 2 usage.
    Bench(bench::BenchArgs),
    /// Measure how fast workers on this machine sum their gradients over the loopback
    ///
    /// Exit codes: 0 done, 1 failed, 2 usage.
    BenchExchange(bench::exchange::ExchangeArgs),
    /// Check that a device trains right, and how fast
    ///
    /// Small models are trained on it and on the processor and compared; results that must be the same to the bit are; then
    /// the speeds of large models. Minutes. Exit codes: 0 all passed, 1 something failed, 2 usage.
    SelfCheck(bench::self_check::SelfCheckArgs),
    /// Write a model with an adapter merged into its weights
    ///
    /// Exit codes: 0 done, 1 failed, 2 usage.
    Merge(merge::MergeArgs),
    /// Print a script that completes this command line in a shell
    ///
    /// For bash: source <(worker completions bash)
    Completions {
        #[arg(value_name = "SHELL")]
        shell: Shell,
    },
    /// Print the manual page of this program, or of one of its commands
    ///
    /// To read it: worker man join | man -l -
    Man {
        #[arg(value_name = "COMMAND")]
        command: Option<String>,
    },
}

#[derive(Args)]
struct JoinArgs {
    /// Where the coordinator listens; without a port at 7077
    #[arg(value_name = "HOST[:PORT]")]
    address: String,
    /// Threads to compute with [default: all cores]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// What to compute on: `auto` takes the first GPU where this program can use one, and the processor elsewhere
    #[arg(long, value_name = "auto|cpu|cuda|cuda:N", default_value_t = Device::Auto)]
    device: Device,
    /// File with the token that the coordinator asks for
    #[arg(long, value_name = "FILE", env = "MUSTER_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// Where fetched models are kept [default: ~/.cache/muster]
    #[arg(long, value_name = "DIR", env = "MUSTER_CACHE_DIR")]
    cache_dir: Option<PathBuf>,
    /// Address of this machine for other workers [default: the one that the coordinator sees]
    #[arg(long, value_name = "HOST")]
    exchange_host: Option<String>,
    /// Port of this machine for other workers, to be opened in firewalls [default: any that is free]
    #[arg(long, value_name = "PORT", allow_negative_numbers = true, value_parser = clap::value_parser!(u16).range(1..))]
    exchange_port: Option<u16>,
    /// What to call this worker [default: host name and process number]
    #[arg(long)]
    name: Option<String>,
    /// How long to try to reach the coordinator at first
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 60,
        allow_negative_numbers = true
    )]
    connect_timeout: u64,
    /// How long to keep the state and wait for a coordinator that was lost
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = worker::RECONNECT_TIMEOUT.as_secs(),
        allow_negative_numbers = true
    )]
    reconnect_timeout: u64,
}

fn main() -> ExitCode {
    if let Err(error) = common::instruction_set::check() {
        end_with(USAGE, &error);
    }
    let cli: Cli = match manual::parse() {
        Ok(cli) => cli,
        Err(error) => end_with(FAILED, &error.to_string()),
    };
    logging::begin(cli.log_level.as_deref(), "info", show::log_writer);
    match common::failpoint::arm() {
        Ok(Some(warning)) => tracing::warn!("{warning}"),
        Ok(None) => {}
        Err(error) => {
            end_with(USAGE, &error.to_string());
        }
    }
    let code = match cli.command {
        Command::Join(args) => run_join(args),
        Command::Generate(args) => finish(generate::run(args)),
        Command::Bench(args) => finish(bench::run(args)),
        Command::BenchExchange(args) => finish(bench::exchange::run(args)),
        Command::SelfCheck(args) => finish(bench::self_check::run(args)),
        Command::Merge(args) => finish(merge::run(args)),
        Command::Completions { shell } => {
            print(manual::completions(Cli::command(), shell));
            ExitCode::SUCCESS
        }
        Command::Man { command } => match manual::page(Cli::command(), command.as_deref()) {
            Ok(page) => {
                print(page);
                ExitCode::SUCCESS
            }
            Err(error) => fail(USAGE, &error),
        },
    };
    streams::finish();
    code
}

/// Prints what the user asked for. Returns false where nobody reads any more; where it cannot be written, the process ends.
fn print(text: impl AsRef<[u8]>) -> bool {
    streams::print(text).unwrap_or_else(|error| end_with(FAILED, &error.to_string()))
}

fn end_with(code: u8, message: &str) -> ! {
    fail(code, message);
    streams::finish();
    std::process::exit(code.into());
}

fn finish<E: std::fmt::Display>(result: Result<(), E>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(FAILED, &error.to_string()),
    }
}

fn run_join(args: JoinArgs) -> ExitCode {
    let threads = args.threads.map(usize::from);
    let options = match join_options(args) {
        Ok(options) => options,
        Err(error) => return fail(USAGE, &format!("{error:#}")),
    };
    if let Some(threads) = threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        // Fails only where there is a pool already, and nothing has run yet.
        let _ = pool.build_global();
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(FAILED, &error.to_string()),
    };
    let shutdown = CancellationToken::new();
    let interrupted = Arc::new(AtomicBool::new(false));
    let show = Show::begin(options.status.clone(), options.address.clone());
    let joined = runtime.block_on(async {
        tokio::spawn(watch_signals(shutdown.clone(), interrupted.clone()));
        join(options, shutdown).await
    });
    let interrupted = interrupted.load(Ordering::SeqCst);
    // An engine thread that is still loading is not waited for.
    runtime.shutdown_background();
    show.end();
    match joined {
        Ok(Finished::Left) if interrupted => ExitCode::from(INTERRUPTED),
        Ok(Finished::Left) => ExitCode::SUCCESS,
        Ok(Finished::Job { reason }) if reason.is_empty() => {
            tracing::info!("the job is done");
            ExitCode::SUCCESS
        }
        Ok(Finished::Job { reason }) => {
            tracing::info!("the job has ended: {reason}");
            ExitCode::SUCCESS
        }
        Err(error) => fail(exit_code(&error), &error.to_string()),
    }
}

fn join_options(args: JoinArgs) -> anyhow::Result<JoinOptions> {
    let token = match &args.token_file {
        Some(path) => {
            let token = read_token(path)
                .with_context(|| format!("cannot read the token file {}", path.display()))?;
            let empty = || format!("the token file {} is empty", path.display());
            Some(token.with_context(empty)?)
        }
        None => None,
    };
    Ok(JoinOptions {
        threads: args.threads.map(usize::from),
        device: args.device,
        token,
        exchange_host: args.exchange_host,
        exchange_port: args.exchange_port,
        cache_dir: args.cache_dir,
        name: args.name,
        connect_timeout: Duration::from_secs(args.connect_timeout),
        reconnect_timeout: Duration::from_secs(args.reconnect_timeout),
        ..JoinOptions::new(args.address)
    })
}

fn exit_code(error: &WorkerError) -> u8 {
    match error {
        WorkerError::Address(_)
        | WorkerError::Connect(ConnectError::Address(_) | ConnectError::Token) => USAGE,
        WorkerError::Refused { .. }
        | WorkerError::OtherJob { .. }
        | WorkerError::Coordinator { .. } => PREFLIGHT,
        _ => FAILED,
    }
}

/// Cancels `shutdown` at the first signal and ends the process at the second. Notes whether the first was Ctrl-C.
async fn watch_signals(shutdown: CancellationToken, interrupted: Arc<AtomicBool>) {
    let ctrl_c = async || {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => true,
            () = terminated() => false,
        }
    };
    let first = tokio::select! {
        is_ctrl_c = ctrl_c() => is_ctrl_c,
        () = hung_up() => false,
    };
    interrupted.store(first, Ordering::SeqCst);
    streams::hurry();
    match first {
        true => tracing::info!("Ctrl-C: stopping; press it again to stop at once"),
        false => tracing::info!("asked to stop by a signal: stopping; a second one stops at once"),
    }
    shutdown.cancel();
    ctrl_c().await;
    let code = if interrupted.load(Ordering::SeqCst) {
        INTERRUPTED.into()
    } else {
        0
    };
    streams::finish();
    std::process::exit(code);
}

#[cfg(unix)]
async fn terminated() {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut signal) => {
            signal.recv().await;
        }
        Err(_) => std::future::pending().await,
    }
}

/// Waits until the terminal is closed. Counts once: a shell passes on what the system has told everybody.
#[cfg(unix)]
async fn hung_up() {
    use tokio::signal::unix::{SignalKind, signal};
    let listens = !common::hangup::is_ignored();
    match listens.then(|| signal(SignalKind::hangup())) {
        Some(Ok(mut signal)) => {
            signal.recv().await;
        }
        _ => std::future::pending().await,
    }
}

#[cfg(not(unix))]
async fn terminated() {
    std::future::pending().await
}

#[cfg(not(unix))]
async fn hung_up() {
    std::future::pending().await
}

fn fail(code: u8, message: &str) -> ExitCode {
    // What rows, models and peers have to do with it may hold anything.
    let message = common::text::error(message);
    // A terminal that is gone takes no words.
    streams::stderr().say(&format!("error: {message}"));
    ExitCode::from(code)
}
