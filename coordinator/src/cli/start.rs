//! `coordinator start`: from the command line to the result, phase by phase.

mod error;
mod telling;

use common::data::prune_blocks;
use common::job::{JobSpec, Resume};
use common::progress::Progress;
use common::streams;
use tokio::runtime::Runtime;

use crate::cli::arguments::StartArguments;
use crate::cli::push::told;
use crate::cli::replay::recorded_args;
use crate::cluster::run_event::{RunEnd, RunEvent};
use crate::cluster::{Outcome, PreviousTerms};
use crate::exit;
use crate::prepare::{Prepared, prepare};
use crate::report::recorder::Recorder;
use crate::report::terminal::{Terminal, quoted, showing};
use crate::rpc::addresses::how_to_join;
use crate::rpc::listener::{listen, read_token};
use crate::rpc::server::Server;
#[cfg(feature = "single-node")]
use crate::run::local_workers::{self, LocalWorkers};
use crate::run::notify_finished::let_workers_go;
use crate::run::push::{CheckpointPushes, PushError, destination, push};
use crate::run::resume::{Past, Start, bring_best, evaluations_of};
use crate::run::signals::Signals;
use crate::run::test_prompts::{ask_after, ask_before};
use crate::run::train::{Parted, Training};
use crate::store::checkpoints::Saved;
use crate::store::claim::claim;
use crate::store::journal::Journal;
use crate::store::lock::{Lock, OUTPUT_LOCK_TIMEOUT, lock};
use crate::store::output::{
    OutputError, RunFiles, RunIdentity, RunPlan, RunRecord, RunState, set_record_aside,
};
use crate::store::result::missing_file;

pub use error::StartError;
use telling::{announce, resume_command, show, show_next};

/// Runs a job and gives back the exit code.
pub fn run(arguments: &StartArguments) -> Result<u8, StartError> {
    let preparation = Progress::default();
    let signals = Signals::listen(preparation.clone())?;
    let ended = run_until_stopped(arguments, &preparation, &signals);
    match (&ended, signals.first()) {
        (Err(_), Some(signal)) if preparation.is_cancelled() => {
            streams::stdout().say(&signal.stopped_early(&preparation));
            Ok(signal.code)
        }
        _ => ended,
    }
}

/// A cancelled preparation is an error like any other.
fn run_until_stopped(
    arguments: &StartArguments,
    preparation: &Progress,
    signals: &Signals,
) -> Result<u8, StartError> {
    check_usage(arguments)?;
    let mut job = showing(preparation, || arguments.job.load(preparation))?;
    let token = read_token(arguments.token_file.as_deref())?;
    let mut terminal = Terminal::stdout(job.logging_steps).logging_first(job.logging_first_step);
    if let Some(notice) = cap_min_workers(arguments, &mut job) {
        terminal.say(&notice);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    // Before the data is packed: a port in use is found at once, and whoever comes is told to wait.
    let listener = listen(arguments.listen_address())?;
    let server = {
        let _entered = runtime.enter();
        Server::begin(listener, token, preparation.clone())?
    };
    let opened = get_ready(arguments, &job, preparation, &server, &mut terminal);
    let (opening, before, _lock) = match opened {
        Ok(Ready::Train {
            opening,
            before,
            lock,
        }) => {
            // From here on the model is a folder, even where the job names an id on the hub.
            job.base_model.clone_from(&opening.prepared.job.base_model);
            (*opening, before, lock)
        }
        Ok(Ready::Done(prepared)) => {
            signals.finish(true);
            let say = &mut |line: &str| terminal.say(line);
            let told = let_workers_go(*prepared, server.clone(), &runtime, say);
            runtime.block_on(server.turn_away("its job is done already"));
            told?;
            // It may be what is left to do.
            let failed = push_result(&job, None, signals, &mut terminal);
            return Ok(failed.unwrap_or(exit::DONE));
        }
        Err(error) => {
            let reason = match signals.first() {
                Some(signal) if preparation.is_cancelled() => signal.stopped_early(preparation),
                _ => format!("it cannot begin the run: {error}"),
            };
            runtime.block_on(server.turn_away(&reason));
            return Err(error);
        }
    };
    let course = Course {
        server,
        signals: signals.clone(),
    };
    let (parted, pushes, mut terminal) = train(arguments, opening, course, &runtime, terminal)?;
    // What still runs then would only hold the result back.
    runtime.shutdown_background();
    if let Outcome::Finished { .. } = parted.outcome {
        ask_after(&job, before, &mut terminal);
        show_next(&mut terminal, arguments, &job);
        if let Some(code) = push_result(&job, pushes, signals, &mut terminal) {
            return Ok(code);
        }
    } else if let Some(pushes) = pushes {
        let untold = pushes.give_up();
        untold.iter().for_each(|line| terminal.say(line));
    }
    exit_code(parted, &job, &mut terminal)
}

/// What is left to do when everything is prepared.
enum Ready {
    Train {
        opening: Box<Opening>,
        /// What the base model answers to the test prompts.
        before: Vec<Option<String>>,
        /// Held to the end of the process.
        lock: Lock,
    },
    /// Nothing: the run was done before.
    Done(Box<Prepared>),
}

/// Prepares the run, and takes its output folder.
fn get_ready(
    arguments: &StartArguments,
    job: &JobSpec,
    preparation: &Progress,
    server: &Server,
    terminal: &mut Terminal,
) -> Result<Ready, StartError> {
    if let Some(spec) = &job.reading.push {
        // A run whose result has no place to go would end in vain.
        match destination(spec, preparation) {
            Ok(_) => {}
            Err(PushError::Hub(error)) if error.is_unreachable() => terminal.say(&format!(
                "the result is to be pushed at the end, but now {error}"
            )),
            Err(error) => return Err(error.into()),
        }
    }
    let prepared = showing(preparation, || prepare(job, preparation))?;
    let identity = identity(&prepared);
    if is_done_already(terminal, arguments, &identity)? {
        return Ok(Ready::Done(Box::new(prepared)));
    }
    let lock = lock(&job.output_dir, OUTPUT_LOCK_TIMEOUT, &mut |line| {
        terminal.say(line)
    })?;
    if lock.waited && is_done_already(terminal, arguments, &identity)? {
        return Ok(Ready::Done(Box::new(prepared)));
    }
    let opening = open(arguments, prepared, identity, server, terminal)?;
    preparation.begin("answering the test prompts", 0);
    let before = ask_before(arguments.single_node, &opening.prepared, terminal);
    preparation.check()?;
    Ok(Ready::Train {
        opening: Box::new(opening),
        before,
        lock,
    })
}

/// What can be said of the command line alone.
fn check_usage(arguments: &StartArguments) -> Result<(), StartError> {
    if arguments.single_node && !cfg!(feature = "single-node") {
        return Err(StartError::NoEngine);
    }
    #[cfg(feature = "single-node")]
    local_workers::check(&arguments.device, arguments.local_workers())?;
    Ok(())
}

/// A run that is prepared, and where it begins.
struct Opening {
    prepared: Prepared,
    identity: RunIdentity,
    start: Start,
    past: Past,
}

/// Takes the output folder, chooses where the run begins, and shows what will be trained. Needs the folder's lock.
fn open(
    arguments: &StartArguments,
    prepared: Prepared,
    identity: RunIdentity,
    server: &Server,
    terminal: &mut Terminal,
) -> Result<Opening, StartError> {
    // In a folder that runs share, those of other jobs stay.
    if prepared.has_own_data() {
        prune_blocks(&prepared.data.file);
    }
    let claimed = claim(&identity)?;
    let jobs = claimed.jobs();
    let start = Start::choose(&prepared, &jobs)?;
    let past = Past::find(&prepared, &start, &jobs).map_err(StartError::Journal)?;
    show(terminal, &prepared, &start, &past);
    if let Some(notice) = &claimed.notice {
        terminal.say(notice);
    }
    if claimed.replaces {
        set_record_aside(&identity.job.output_dir)?;
    }
    announce(terminal, arguments, server, &start);
    Ok(Opening {
        prepared,
        identity,
        start,
        past,
    })
}

/// What is left of a run that has ended: how, the pushes of its checkpoints, and the terminal, when all is said.
type Over = (Parted, Option<CheckpointPushes>, Terminal);

/// What the run goes through with.
struct Course {
    server: Server,
    signals: Signals,
}

/// Opens the files of the run and trains to its end, whatever that is.
fn train(
    arguments: &StartArguments,
    opening: Opening,
    course: Course,
    runtime: &Runtime,
    mut terminal: Terminal,
) -> Result<Over, StartError> {
    let Opening {
        prepared,
        identity,
        start,
        past,
    } = opening;
    let plan = RunPlan {
        total_steps: prepared.total_steps(),
        steps_per_epoch: prepared.schedule.steps_per_epoch(),
    };
    let evaluations = evaluations_of(&prepared, &start);
    if let Some(notice) = bring_best(&prepared, &start, &evaluations) {
        terminal.say(&notice);
    }
    let known = past.history.lines().chain(&evaluations);
    let files = RunFiles::open(&identity, plan, past.recorded(&start), known)?;
    let recorder = Recorder::new(files.with_command(recorded_args(std::env::args_os())));
    let (observer, thread) = recorder.listen(terminal);
    let earlier = earlier(arguments, &past);
    let journal = Journal::begin(
        &prepared.job.output_dir,
        past.history,
        past.term.clone(),
        local_count(arguments),
        observer.clone(),
    )
    .map_err(StartError::Journal)?;
    let how_to_join = (!arguments.single_node).then(|| {
        let server = &course.server;
        how_to_join(server.address(), server.token().is_some())
    });
    let (job, run) = (&prepared.job, &past.term.run);
    let pushes = CheckpointPushes::begin(job, run, start.state.step, observer.downgrade())?;
    let saved: Saved = match &pushes {
        Some(pushes) => Box::new(pushes.saved()),
        None => Box::new(|_| ()),
    };
    let training = Training {
        prepared,
        start,
        term: past.term,
        earlier,
        journal,
        server: course.server,
        signals: course.signals,
        #[cfg(feature = "single-node")]
        local: local_workers(arguments),
        recorder: recorder.clone(),
        observer,
        saved,
        how_to_join,
    };
    let ended = runtime.block_on(training.run())?;
    let stopped = |_| StartError::Failed("the terminal thread stopped".to_owned());
    let mut terminal = thread.join().map_err(stopped)?;
    // Before anybody is waited for: a second signal must not leave a record of a run that goes on.
    let end = RunEvent::Ended(run_end(&ended.outcome));
    recorder.record(&end, &mut terminal);
    let parted = runtime.block_on(ended.part())?;
    let told = RunEvent::Ended(run_end(&parted.outcome));
    if told != end {
        recorder.record(&told, &mut terminal);
    }
    terminal.observe(&told);
    Ok((parted, pushes, terminal))
}

/// Pushes the result where the job asks for it, after what of its checkpoints is under way. The exit code where that failed;
/// nothing is lost then.
fn push_result(
    job: &JobSpec,
    pushes: Option<CheckpointPushes>,
    signals: &Signals,
    terminal: &mut Terminal,
) -> Option<u8> {
    let spec = job.reading.push.as_ref()?;
    let progress = pushes
        .as_ref()
        .map_or_else(Progress::default, CheckpointPushes::progress);
    signals.begin_push(progress.clone());
    if let Some(pushes) = pushes {
        if let Some(step) = pushes.current() {
            let repo = &spec.repo;
            terminal.say(&format!(
                "checkpoint-{step} is still being pushed to {repo}"
            ));
        }
        let untold = pushes.finish();
        untold.iter().for_each(|line| terminal.say(line));
    }
    terminal.say(&format!("pushing the result to {} on the hub", spec.repo));
    let error = match push(&job.output_dir, spec, &progress) {
        Ok(pushed) => {
            signals.finish(true);
            terminal.say(&told(&pushed));
            return None;
        }
        Err(error) => error,
    };
    let output_dir = quoted(&job.output_dir.to_string_lossy());
    let public = if spec.is_private { "" } else { " --public" };
    let token = match &spec.token {
        Some(_) => " (with the token in HF_TOKEN)",
        None => "",
    };
    terminal.say(&format!(
        "the result is in {}, but it was not pushed: {error}; to push it again: the same command, or coordinator push {output_dir} {}{public}{token}",
        job.output_dir.display(),
        quoted(&spec.repo)
    ));
    let stopped = signals.first().filter(|_| progress.check().is_err());
    Some(stopped.map_or(exit::JOB_FAILED, |signal| signal.code))
}

/// Says how to go on where the job is not done.
fn exit_code(parted: Parted, job: &JobSpec, terminal: &mut Terminal) -> Result<u8, StartError> {
    match parted.outcome {
        Outcome::Finished { .. } => Ok(exit::DONE),
        Outcome::Stopped { .. } => {
            let begins_anew = !matches!(job.resume, Resume::Auto);
            terminal.say(&format!("to go on: {}", resume_command(begins_anew)));
            Ok(parted.stopped_by.unwrap_or(exit::RESUMABLE))
        }
        Outcome::Failed { reason, .. } => Err(StartError::Failed(reason)),
    }
}

fn identity(prepared: &Prepared) -> RunIdentity {
    RunIdentity {
        data_digest: Some(prepared.data.file.digest().to_owned()),
        base_model_digest: Some(prepared.model_digest.clone()),
        total_steps: Some(prepared.total_steps()),
        ..RunIdentity::of(&prepared.job)
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

/// Says it, and how to go on from the result; where a file of that is gone, there is still something to do. An error where the
/// folder holds another job.
fn is_done_already(
    terminal: &mut Terminal,
    arguments: &StartArguments,
    identity: &RunIdentity,
) -> Result<bool, OutputError> {
    let job = &identity.job;
    let record = claim(identity)?
        .record
        .filter(|record| is_finished(identity, record));
    let Some(record) = record else {
        return Ok(false);
    };
    if let Some(missing) = missing_file(job) {
        terminal.say(&format!(
            "this job was done, but {} is not there any more: the result is made again, from the newest checkpoint that is left",
            missing.display()
        ));
        return Ok(false);
    }
    terminal.say(&format!(
        "this job is done already: step {} of {}, weights {}; set `resume: never` to train it again",
        record.step,
        record.total_steps,
        record.weights_digest.as_deref().unwrap_or("unknown")
    ));
    show_next(terminal, arguments, job);
    Ok(true)
}

/// A run that was made longer is not, unless it had stopped early: it would again.
fn is_finished(identity: &RunIdentity, record: &RunRecord) -> bool {
    let auto = identity.job.resume == common::job::Resume::Auto;
    let steps = identity.total_steps.unwrap_or(record.total_steps);
    auto && record.state == RunState::Done && (record.step == steps || record.stopped_early)
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

/// What the cluster must know of the terms before this one.
fn earlier(arguments: &StartArguments, past: &Past) -> PreviousTerms {
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
