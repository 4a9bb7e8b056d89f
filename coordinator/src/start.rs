//! `coordinator start`: from the command line to the result, phase by phase.

use std::net::TcpListener;
use std::path::PathBuf;

use common::data::prune_blocks;
use common::files::FileError;
use common::job::{JobErrors, JobSpec, Method, Resume};
use thiserror::Error;

use crate::args::{StartArguments, exit};
use crate::claim::claim;
use crate::cluster::{Earlier, Outcome};
use crate::door::{LOCK_PATIENCE, listen, lock, reachable, read_token};
use crate::events::{RunEnd, RunEvent};
use crate::farewell::let_workers_go;
use crate::journal::Journal;
use crate::output::{OutputError, RunFiles, RunIdentity, RunPlan, RunRecord, RunState};
use crate::prepare::{PreflightError, Prepared, prepare};
use crate::recorder::Recorder;
use crate::resume::{Past, ResumeError, Start};
#[cfg(feature = "single-node")]
use crate::single_node::{self, DevicesError, LocalWorkers};
use crate::test_prompts::{ask_after, ask_before};
use crate::train::{Ended, Training};
use crate::ui::{NextView, PlanView, Programs, Terminal, quoted};
use crate::words::{job_words, resume_words};

#[derive(Debug, Error)]
pub enum StartError {
    #[error(transparent)]
    Job(#[from] JobErrors),
    #[error("cannot read the token file {path}: {reason}")]
    Token { path: PathBuf, reason: String },
    #[error("cannot listen on {address}: {reason}")]
    Listen { address: String, reason: String },
    #[error("cannot listen on {address}: the port is in use; name another with --listen HOST:PORT")]
    PortInUse { address: String },
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    #[error(transparent)]
    Output(#[from] OutputError),
    #[error(transparent)]
    Resume(#[from] ResumeError),
    #[error("the journal cannot be used: {0}")]
    Journal(FileError),
    #[error("another coordinator is at work in output_dir {dir}")]
    InUse { dir: PathBuf },
    #[error(
        "this build has no engine: start workers with `worker join`, or build with the feature single-node"
    )]
    NoEngine,
    #[cfg(feature = "single-node")]
    #[error(transparent)]
    Devices(#[from] single_node::DevicesError),
    #[error("cannot start: {0}")]
    Runtime(#[from] std::io::Error),
    /// The job began and failed.
    #[error("{0}")]
    Failed(String),
}

impl StartError {
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Job(_) | Self::Token { .. } | Self::NoEngine => exit::USAGE,
            #[cfg(feature = "single-node")]
            Self::Devices(DevicesError::TooMany { .. }) => exit::USAGE,
            // What passes is worth another try with the same command, unlike what the job itself gets wrong.
            Self::PortInUse { .. } | Self::InUse { .. } | Self::Journal(_) => exit::JOB_FAILED,
            Self::Runtime(_) | Self::Failed(_) => exit::JOB_FAILED,
            _ => exit::PREFLIGHT,
        }
    }
}

/// Runs a job and gives back the exit code.
pub fn run(arguments: &StartArguments) -> Result<u8, StartError> {
    if arguments.single_node && !cfg!(feature = "single-node") {
        return Err(StartError::NoEngine);
    }
    #[cfg(feature = "single-node")]
    single_node::check(&arguments.device, arguments.local_workers())?;
    let mut job = arguments.job.load()?;
    let token = read_token(arguments.token_file.as_deref())?;
    // Before the data is packed, because a port in use is found at once.
    let listener = listen(arguments.listen_address())?;
    let mut terminal = Terminal::stdout(job.logging_steps);
    if let Some(notice) = cap_min_workers(arguments, &mut job) {
        terminal.say(&notice);
    }

    let prepared = prepare(&job)?;
    let identity = identity(&prepared);
    if is_done_already(&mut terminal, arguments, &identity)? {
        let_workers_go(prepared, listener, token, &mut |line| terminal.say(line))?;
        return Ok(exit::DONE);
    }
    let lock = lock(&job.output_dir, LOCK_PATIENCE, &mut |line| {
        terminal.say(line)
    })?;
    if lock.waited && is_done_already(&mut terminal, arguments, &identity)? {
        return Ok(exit::DONE);
    }
    prune_blocks(&prepared.data.file);
    let start = Start::choose(&prepared)?;
    let past = Past::find(&prepared, &start).map_err(StartError::Journal)?;
    show(&mut terminal, &prepared, &start, &past);
    if let Some(notice) = claim(&identity)?.notice {
        terminal.say(&notice);
    }
    let before = ask_before(arguments, &prepared, &mut terminal);
    announce(&mut terminal, arguments, &listener, &start, token.is_some());

    let plan = RunPlan {
        total_steps: prepared.total_steps(),
        steps_per_epoch: prepared.schedule.steps_per_epoch(),
    };
    let (recorded, known) = (past.recorded(&start), past.history.lines());
    let recorder = Recorder::new(RunFiles::open(&identity, plan, recorded, known)?);
    let (observer, thread) = recorder.listen(terminal);
    let earlier = earlier(arguments, &past);
    let journal = Journal::begin(
        &job.output_dir,
        past.history,
        past.term.clone(),
        local_count(arguments),
        observer.clone(),
    )
    .map_err(StartError::Journal)?;
    let ended = train(Training {
        prepared,
        start,
        term: past.term,
        earlier,
        journal,
        listener,
        token,
        #[cfg(feature = "single-node")]
        local: local_workers(arguments),
        recorder: recorder.clone(),
        observer,
    })?;
    let stopped = |_| StartError::Failed("the terminal thread stopped".to_owned());
    let mut terminal = thread.join().map_err(stopped)?;

    recorder.observe(&RunEvent::Ended(run_end(&ended.outcome)), &mut terminal);
    if let Outcome::Finished { .. } = ended.outcome {
        ask_after(&job, before, &mut terminal);
        show_next(&mut terminal, arguments, &job);
    }
    exit_code(ended, &job, &mut terminal)
}

/// Says how to go on where the job is not done.
fn exit_code(ended: Ended, job: &JobSpec, terminal: &mut Terminal) -> Result<u8, StartError> {
    match ended.outcome {
        Outcome::Finished { .. } => Ok(exit::DONE),
        Outcome::Stopped { .. } => {
            let begins_anew = !matches!(job.resume, Resume::Auto);
            terminal.say(&format!("to go on: {}", resume_command(begins_anew)));
            Ok(ended.stopped_by.unwrap_or(exit::RESUMABLE))
        }
        Outcome::Failed { reason, .. } => Err(StartError::Failed(reason)),
    }
}

fn train(training: Training) -> std::io::Result<Ended> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let ended = runtime.block_on(training.run());
    // What still runs then would only hold the result back.
    runtime.shutdown_background();
    ended
}

fn identity(prepared: &Prepared) -> RunIdentity {
    RunIdentity {
        job: JobSpec::clone(&prepared.job),
        data_digest: Some(prepared.data.file.digest().to_owned()),
        base_model_digest: Some(prepared.model_digest.clone()),
    }
}

/// Where nobody else can join, waiting for more workers than there are would never end.
fn cap_min_workers(arguments: &StartArguments, job: &mut JobSpec) -> Option<String> {
    let local = arguments.local_workers();
    let wanted = job.cluster.min_workers;
    if !arguments.single_node || arguments.listen.is_some() || wanted <= local {
        return None;
    }
    job.cluster.min_workers = local;
    Some(format!(
        "cluster.min_workers is {wanted}, but without --listen no other worker can join: going on with {local}"
    ))
}

/// Says it, and how to go on from the result. An error where the folder holds another job.
fn is_done_already(
    terminal: &mut Terminal,
    arguments: &StartArguments,
    identity: &RunIdentity,
) -> Result<bool, OutputError> {
    let job = &identity.job;
    let record = claim(identity)?
        .record
        .filter(|record| is_finished(job, record));
    let Some(record) = record else {
        return Ok(false);
    };
    terminal.say(&format!(
        "this job is done already: step {} of {}, weights {}; set `resume: never` to train it again",
        record.step,
        record.total_steps,
        record.weights_digest.as_deref().unwrap_or("unknown")
    ));
    show_next(terminal, arguments, job);
    Ok(true)
}

fn is_finished(job: &JobSpec, record: &RunRecord) -> bool {
    let auto = job.resume == common::job::Resume::Auto;
    auto && record.state == RunState::Done && record.step == record.total_steps
}

fn run_end(outcome: &Outcome) -> RunEnd {
    match outcome.clone() {
        Outcome::Finished {
            step,
            weights_digest,
        } => RunEnd::Done {
            step,
            weights_digest,
        },
        Outcome::Stopped { step, reason, .. } => RunEnd::Stopped { step, reason },
        Outcome::Failed { reason, .. } => RunEnd::Failed { reason },
    }
}

fn show(terminal: &mut Terminal, prepared: &Prepared, start: &Start, past: &Past) {
    terminal.show_plan(&PlanView::of(prepared));
    if let Some(sample) = prepared.data.samples.first() {
        terminal.show_sample(sample);
    }
    for notice in start.notices.iter().chain(&past.notices) {
        terminal.say(notice);
    }
}

/// Where workers can join, and where the run goes on from.
fn announce(
    terminal: &mut Terminal,
    arguments: &StartArguments,
    listener: &TcpListener,
    start: &Start,
    has_token: bool,
) {
    if let Some(path) = start.state.folder.clone().filter(|_| start.state.step > 0) {
        let step = start.state.step;
        terminal.observe(&RunEvent::Resumed { step, path });
    }
    let Ok(address) = listener.local_addr() else {
        return;
    };
    if !arguments.single_node || arguments.listen.is_some() {
        let option = if has_token { " --token-file FILE" } else { "" };
        terminal.say(&format!(
            "workers join with: worker join {}{option}",
            reachable(address)
        ));
    }
    if !address.ip().is_loopback() && !has_token {
        terminal.say("anyone who reaches this port can join and read the data; use --token-file to prevent that");
    }
}

/// What the cluster must know of the terms before this one.
fn earlier(arguments: &StartArguments, past: &Past) -> Earlier {
    let mut earlier = past.history.earlier();
    if arguments.single_node && arguments.listen.is_none() {
        // Nobody else can join, so nobody can come back.
        earlier.workers = 0;
    }
    earlier
}

/// Workers in this process.
fn local_count(arguments: &StartArguments) -> usize {
    match arguments.single_node {
        true => arguments.local_workers(),
        false => 0,
    }
}

#[cfg(feature = "single-node")]
fn local_workers(arguments: &StartArguments) -> Option<LocalWorkers> {
    arguments.single_node.then(|| LocalWorkers {
        count: arguments.local_workers(),
        threads: arguments.threads,
        devices: arguments.device.clone(),
    })
}

fn show_next(terminal: &mut Terminal, arguments: &StartArguments, job: &JobSpec) {
    terminal.show_next(&NextView {
        output_dir: &job.output_dir,
        base_model: &job.base_model,
        is_adapter: matches!(job.method, Method::Lora(_)),
        job_words: &job_words(std::env::args_os()),
        has_token: arguments.token_file.is_some(),
        prompt: job.test_prompts.first().map(String::as_str),
        programs: Programs::find(),
    });
}

/// The command that goes on where this process stopped.
fn resume_command(begins_anew: bool) -> String {
    let words = resume_words(std::env::args_os(), begins_anew);
    let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    words.join(" ")
}
