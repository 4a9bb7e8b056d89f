//! Pushes checkpoints while the run goes on, on a thread of its own: one at a time, never waited for by training.
//!
//! In: steps whose checkpoint is on disk. Out: commits on the hub, a line to the user on each, and in the output folder what was
//! pushed. A push that fails is said in a line, and the run goes on.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use common::files::checkpoint::{self, checkpoint_dir};
use common::hub::{Hub, RepoId};
use common::job::{HubStrategy, JobSpec, PushSpec};
use common::progress::Progress;
use tokio::sync::mpsc;

use super::files::of_checkpoint;
use super::held::{Held, clear};
use super::queue::Queue;
use super::record::PushRecord;
use super::{BRANCH, PushError, destination};
use crate::cluster::run_event::RunEvent;
use crate::store::layout::WORK_FOLDER;
use crate::store::output::RunRecord;

/// Folder in the work folder for the checkpoint that is being pushed.
const HELD: &str = "push";
/// How long a push that is given up may take to notice.
const GIVE_UP_TIMEOUT: Duration = Duration::from_millis(300);

/// The pushes of a run's checkpoints.
pub struct CheckpointPushes(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    progress: Progress,
    output_dir: PathBuf,
    spec: PushSpec,
    observer: mpsc::WeakSender<RunEvent>,
}

struct State {
    queue: Queue,
    /// The checkpoint that is being pushed.
    current: Option<u64>,
    /// No more checkpoints come.
    is_finishing: bool,
    /// The thread has ended.
    is_over: bool,
    /// Checkpoints whose push was stopped.
    stopped: Vec<u64>,
    /// Lines that came when nobody listened any more.
    untold: Vec<String>,
}

impl CheckpointPushes {
    /// Begins where the job wants checkpoints pushed. `run` is the run's identifier, and `step` where it begins: checkpoints up to
    /// there that an earlier process of the run did not push any more are pushed now.
    pub fn begin(
        job: &JobSpec,
        run: &str,
        step: u64,
        observer: mpsc::WeakSender<RunEvent>,
    ) -> Result<Option<Self>, PushError> {
        let wanted = |spec: &&PushSpec| spec.strategy != HubStrategy::End;
        let Some(spec) = job.reading.push.as_ref().filter(wanted) else {
            return Ok(None);
        };
        clear(&job.output_dir.join(WORK_FOLDER).join(HELD))?;
        let keeps_all = spec.strategy == HubStrategy::AllCheckpoints;
        let known = PushRecord::of(&job.output_dir, run, &spec.repo);
        let record = known.clone().unwrap_or_else(|| PushRecord {
            run: run.to_owned(),
            repo: spec.repo.clone(),
            ..PushRecord::default()
        });
        record.write(&job.output_dir)?;
        let mut queue = Queue::new(keeps_all, record.begun);
        // What another run left here may be older than what that has pushed.
        if known.is_some() {
            for (of, _) in checkpoint::list(&job.output_dir)? {
                if of > record.done && of <= step {
                    queue.add(of);
                }
            }
        }
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                queue,
                current: None,
                is_finishing: false,
                is_over: false,
                stopped: Vec::new(),
                untold: Vec::new(),
            }),
            changed: Condvar::new(),
            progress: Progress::default(),
            output_dir: job.output_dir.clone(),
            spec: spec.clone(),
            observer,
        });
        let pushing = Pushing {
            shared: shared.clone(),
            record,
            destination: None,
        };
        thread::Builder::new()
            .name("push".to_owned())
            .spawn(move || pushing.run())
            .map_err(|error| PushError::File {
                path: job.output_dir.clone(),
                reason: format!("no thread for the pushes: {error}"),
            })?;
        Ok(Some(Self(shared)))
    }

    /// What is to be called with each step whose checkpoint is on disk. Waits for nothing.
    pub fn saved(&self) -> impl Fn(u64) + Send + Sync + use<> {
        let shared = self.0.clone();
        move |step| {
            let dropped = shared.state().queue.add(step);
            shared.changed.notify_all();
            if let Some(dropped) = dropped {
                tracing::warn!("checkpoint-{dropped} is not pushed: too many wait");
            }
        }
    }

    /// What a push checks for being stopped.
    pub fn progress(&self) -> Progress {
        self.0.progress.clone()
    }

    /// The checkpoint that is being pushed now.
    pub fn current(&self) -> Option<u64> {
        self.0.state().current
    }

    /// No more checkpoints come, and the result is pushed next: waits for what is under way, and for checkpoints that are to be
    /// there whole. Returns what there is to say.
    pub fn finish(self) -> Vec<String> {
        let mut state = self.0.state();
        state.is_finishing = true;
        match self.0.spec.strategy {
            // The result takes the place of their weights.
            HubStrategy::EverySave | HubStrategy::End => state.queue.clear(),
            HubStrategy::Checkpoint | HubStrategy::AllCheckpoints => state.queue.finish(),
        }
        self.0.changed.notify_all();
        let waited = self.0.changed.wait_while(state, |state| !state.is_over);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        let mut untold = std::mem::take(&mut state.untold);
        // There is no later push that could make up for them.
        let left = state.stopped.iter().copied().chain(state.queue.waiting());
        untold.extend(
            left.map(|step| format!("checkpoint-{step} is not pushed: its push was stopped")),
        );
        untold
    }

    /// The run ends without a result: stops what is under way, which the next start makes up for. Returns what there is to say.
    pub fn give_up(self) -> Vec<String> {
        self.0.progress.cancel();
        let mut state = self.0.state();
        state.is_finishing = true;
        let waiting = state.queue.waiting().last();
        state.queue.clear();
        self.0.changed.notify_all();
        let is_running = |state: &mut State| !state.is_over;
        let waited = self
            .0
            .changed
            .wait_timeout_while(state, GIVE_UP_TIMEOUT, is_running);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        let mut untold = std::mem::take(&mut state.untold);
        let left = waiting
            .max(state.current)
            .max(state.stopped.last().copied());
        untold.extend(left.map(|step| {
            format!("checkpoint-{step} is not pushed any more: the next start of the run does it")
        }));
        untold
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The checkpoint to push next. None: no more come.
    fn next(&self) -> Option<u64> {
        let mut state = self.state();
        loop {
            if let Some(step) = state.queue.next() {
                state.current = Some(step);
                return Some(step);
            }
            if state.is_finishing {
                return None;
            }
            let waited = self.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn say(&self, line: String) {
        let event = RunEvent::Notice(line.clone());
        let observer = self.observer.upgrade();
        if observer.is_none_or(|observer| observer.blocking_send(event).is_err()) {
            self.state().untold.push(line);
        }
    }
}

/// Says that the thread of the pushes has ended.
struct Over(Arc<Shared>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.state().is_over = true;
        self.0.changed.notify_all();
    }
}

/// What the thread of the pushes has.
struct Pushing {
    shared: Arc<Shared>,
    record: PushRecord,
    /// The repository, once it is known and there.
    destination: Option<(Hub, RepoId)>,
}

impl Pushing {
    fn run(mut self) {
        // Whoever waits for the end is told of it, however it comes.
        let _over = Over(self.shared.clone());
        while let Some(step) = self.shared.next() {
            let result = self.push(step);
            let mut state = self.shared.state();
            state.current = None;
            let is_finishing = state.is_finishing;
            let is_settled = matches!(
                result,
                Ok(_) | Err(PushError::Gone { .. } | PushError::Damaged(_))
            );
            if !is_settled {
                match (self.shared.progress.is_cancelled(), is_finishing) {
                    (true, _) => state.stopped.push(step),
                    (false, false) => state.queue.put_back(step),
                    (false, true) => {}
                }
            }
            drop(state);
            if let Some(line) = self.told(step, result, is_finishing) {
                self.shared.say(line);
            }
        }
    }

    /// Pushes a checkpoint, and returns the address of its commit.
    fn push(&mut self, step: u64) -> Result<String, PushError> {
        let shared = self.shared.clone();
        let (spec, progress) = (&shared.spec, &shared.progress);
        progress.check().map_err(PushError::Stopped)?;
        let folder = checkpoint_dir(&shared.output_dir, step);
        let held = Held::new(&folder, &shared.output_dir.join(WORK_FOLDER).join(HELD))?;
        let manifest = checkpoint::verify(held.folder()).map_err(PushError::Damaged)?;
        let mut run = RunRecord::read(&shared.output_dir)?;
        if let Some(run) = &mut run {
            run.step = manifest.step;
            run.weights_digest = Some(manifest.weights_digest.clone());
        }
        let whole = match spec.strategy {
            HubStrategy::End | HubStrategy::EverySave => None,
            HubStrategy::Checkpoint => Some("last-checkpoint".to_owned()),
            HubStrategy::AllCheckpoints => Some(format!("checkpoint-{step}")),
        };
        let uploads = of_checkpoint(
            held.folder(),
            &manifest,
            &shared.output_dir,
            run.as_ref(),
            whole.as_deref(),
        )?;
        let (hub, repo) = match self.destination.take() {
            Some(known) => known,
            None => made(spec, progress)?,
        };
        // Before the first byte goes: no crash may forget that it is perhaps there.
        self.record.begun = step;
        self.record.write(&shared.output_dir)?;
        let summary = format!("Training in progress, step {step}");
        let commit = hub.commit(&repo, BRANCH, &summary, &uploads, progress)?;
        self.destination = Some((hub, repo));
        self.record.done = step;
        self.record.write(&shared.output_dir)?;
        Ok(commit.url)
    }

    /// The line on a push, if there is something to say.
    fn told(
        &self,
        step: u64,
        result: Result<String, PushError>,
        is_finishing: bool,
    ) -> Option<String> {
        let Shared { spec, progress, .. } = &*self.shared;
        let name = format!("checkpoint-{step}");
        let is_each_wanted = spec.strategy == HubStrategy::AllCheckpoints;
        match result {
            Ok(url) => Some(format!("pushed {name} to {}: {url}", spec.repo)),
            Err(_) if progress.is_cancelled() => None,
            // What took its place on the disk, or soon will, takes it on the hub.
            Err(PushError::Gone { .. }) if !is_each_wanted => None,
            Err(error @ (PushError::Gone { .. } | PushError::Damaged(_))) => {
                Some(format!("{name} is not pushed: {error}"))
            }
            Err(error) => {
                let rest = match is_finishing {
                    true => "the result is pushed all the same",
                    false => "the run goes on, and the next push makes up for it",
                };
                Some(format!(
                    "{name} was not pushed to {}: {error}; {rest}",
                    spec.repo
                ))
            }
        }
    }
}

/// The repository, made where there is none.
fn made(spec: &PushSpec, progress: &Progress) -> Result<(Hub, RepoId), PushError> {
    let (hub, repo) = destination(spec, progress)?;
    hub.create_repo(&repo, spec.is_private, progress)?;
    Ok((hub, repo))
}
