//! One thread tells the files and the terminal what happens, so that the driver never waits for a disk. Whether anybody reads
//! what the terminal is told holds neither up.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use common::files::{FileError, atomic};
use common::plan::BestSoFar;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::cluster::run_event::{RunEnd, RunEvent};
use crate::report::terminal::Terminal;
use crate::store::layout::TRAINER_STATE;
use crate::store::output::{OutputError, RunFiles, RunState};

/// Most events that may wait for the terminal or the disk.
const EVENTS: usize = 4096;
/// How long a checkpoint waits for the record of its own step.
const RECORD_DEADLINE: Duration = Duration::from_secs(10);

/// The files of the run, shared with whoever writes checkpoints.
#[derive(Clone)]
pub struct Recorder(Arc<Shared>);

struct Shared {
    files: Mutex<RunFiles>,
    changed: Condvar,
    /// Whether the files could not be written, as the user was told.
    failing: AtomicBool,
    /// Whether a worker has joined since this coordinator began.
    joined: AtomicBool,
    removed: CancellationToken,
}

impl Recorder {
    pub fn new(files: RunFiles) -> Self {
        Self(Arc::new(Shared {
            files: Mutex::new(files),
            changed: Condvar::new(),
            failing: AtomicBool::new(false),
            joined: AtomicBool::new(false),
            removed: CancellationToken::new(),
        }))
    }

    /// Starts the thread. It ends, and gives the terminal back, when the sender is dropped.
    pub fn listen(&self, mut terminal: Terminal) -> (mpsc::Sender<RunEvent>, JoinHandle<Terminal>) {
        let (sender, mut events) = mpsc::channel(EVENTS);
        let recorder = self.clone();
        let thread = std::thread::spawn(move || {
            while let Some(event) = events.blocking_recv() {
                recorder.observe(&event, &mut terminal);
            }
            terminal
        });
        (sender, thread)
    }

    /// Tells the files, then the terminal: what it says is on record. A full disk is said once, and once more when it is over;
    /// training goes on.
    pub fn observe(&self, event: &RunEvent, terminal: &mut Terminal) {
        self.record(event, terminal);
        terminal.observe(event);
    }

    /// Tells the files alone; the terminal hears where that fails.
    pub fn record(&self, event: &RunEvent, terminal: &mut Terminal) {
        if matches!(event, RunEvent::WorkerJoined { .. }) {
            self.0.joined.store(true, Ordering::Relaxed);
        }
        let mut files = self.files();
        let mut result = files.observe(event);
        if let RunEvent::Started { numerics_class, .. } = event {
            result = result.and(files.set_numerics_class(numerics_class));
        }
        drop(files);
        self.0.changed.notify_all();
        self.say_failure(event, result, terminal);
    }

    fn say_failure(
        &self,
        event: &RunEvent,
        result: Result<(), OutputError>,
        terminal: &mut Terminal,
    ) {
        let is_end = matches!(event, RunEvent::Ended(_));
        match result {
            Err(error @ OutputError::Removed { .. }) => {
                if !self.0.removed.is_cancelled() {
                    terminal.say(&error.to_string());
                }
                self.0.removed.cancel();
            }
            Err(error) if is_end => terminal.say(&error.to_string()),
            Err(error) if !self.0.failing.swap(true, Ordering::Relaxed) => {
                terminal.say(&format!(
                    "{error}; training goes on, and what is missing is written as soon as that works"
                ));
            }
            Ok(())
                if RunFiles::concerns(event) && self.0.failing.swap(false, Ordering::Relaxed) =>
            {
                terminal.say("the files of the run are written again");
            }
            _ => {}
        }
    }

    /// Whether a worker has joined since this coordinator began.
    pub fn somebody_joined(&self) -> bool {
        self.0.joined.load(Ordering::Relaxed)
    }

    /// A token that is cancelled once it was noticed that the output folder is gone.
    pub fn removed(&self) -> CancellationToken {
        self.0.removed.clone()
    }

    /// Updates that the newest evaluated weights have seen, in this term or an earlier one.
    pub fn last_evaluated(&self) -> Option<u64> {
        self.files().last_evaluated()
    }

    /// What the evaluations on record amount to, where the job goes by them.
    pub fn best(&self) -> Option<BestSoFar> {
        self.files().best()
    }

    /// Writes `trainer_state.json` as it is after `step` updates. Blocks until the record of that step has come, or for
    /// `RECORD_DEADLINE`.
    pub fn write_trainer_state(&self, folder: &Path, step: u64) -> Result<(), FileError> {
        let recorded = |files: &mut RunFiles| files.record().step < step;
        let waited = self
            .0
            .changed
            .wait_timeout_while(self.files(), RECORD_DEADLINE, recorded);
        let text = match waited {
            Ok((files, _)) => files.trainer_state_at(step),
            Err(poisoned) => poisoned.into_inner().0.trainer_state_at(step),
        };
        atomic::write(&folder.join(TRAINER_STATE), text.as_bytes())
    }

    /// Writes down for good that the run is done: from then on, no crash makes it begin again.
    pub fn record_result(&self, step: u64, weights_digest: &str) -> Result<(), FileError> {
        let end = RunEvent::Ended(RunEnd::Done {
            step,
            weights_digest: weights_digest.to_owned(),
        });
        Ok(self.files().observe(&end)?)
    }

    /// Writes down that the run was stopped, unless its end is on record. Gives back the step that it had come to; None where
    /// nothing was to be written, or it could not be.
    pub fn record_stopped(&self, reason: String) -> Option<u64> {
        let mut files = self.files();
        let record = files.record();
        if record.state != RunState::Running {
            return None;
        }
        let step = record.step;
        let end = RunEvent::Ended(RunEnd::Stopped { step, reason });
        files.observe(&end).is_ok().then_some(step)
    }

    fn files(&self) -> MutexGuard<'_, RunFiles> {
        self.0.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
