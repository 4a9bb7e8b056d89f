//! Ctrl-C, SIGTERM and the end of the terminal, from the first moment of `start` to its last.
//!
//! In: signals, on a thread of their own that nothing else can hold up. Out: what the process is at is asked to stop, and
//! says so; a second signal ends the process at once. Where nothing would be lost, the first one does.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use common::progress::Progress;
use common::streams;
use tokio::sync::mpsc;

use crate::driver::control_loop::{Input, StopRequest};
use crate::exit;
use crate::prepare::remove_scratch;
use crate::report::recorder::Recorder;

/// How long preparation may take to notice that it is cancelled: what takes longer (a file system that hangs, a model
/// that answers the test prompts) leaves nothing behind that counts.
const CANCEL_PATIENCE: Duration = Duration::from_millis(700);

/// How long the record of a run that is ended at once may take.
const RECORD_PATIENCE: Duration = Duration::from_millis(300);

/// Stage of the process, which decides what a signal means.
enum Stage {
    /// The run is being prepared: nothing has begun yet that a next start could not begin as well.
    Preparing(Progress),
    /// The driver runs, and must save what there is. The recorder is for a second signal, which leaves it no time.
    Running(mpsc::Sender<Input>, Recorder),
    /// The run is done, and its result is being pushed: a push that is stopped is made up for by the next start.
    Pushing(Progress),
    /// The run is over, and on record; done, or to be resumed.
    Over { is_done: bool },
}

/// The signals that this process got, and what they do at each stage. Shared by all who must know of them.
#[derive(Clone)]
pub struct Signals(Arc<Mutex<State>>);

struct State {
    stage: Stage,
    first: Option<Signal>,
}

impl Signals {
    /// Listens from now on: the first signal cancels `preparation`.
    pub fn listen(preparation: Progress) -> std::io::Result<Self> {
        let signals = Self(Arc::new(Mutex::new(State {
            stage: Stage::Preparing(preparation),
            first: None,
        })));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let received = {
            // What is registered here misses nothing from here on.
            let _entered = runtime.enter();
            Received::register()
        };
        let obeying = signals.clone().obey(received);
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || runtime.block_on(obeying))?;
        Ok(signals)
    }

    /// The signal that came first, if any did.
    pub fn first(&self) -> Option<Signal> {
        self.lock().first
    }

    /// Lets signals ask the driver to stop from now on; at once where one came before it.
    pub fn begin(&self, inputs: mpsc::Sender<Input>, recorder: Recorder) {
        let mut state = self.lock();
        if let Some(signal) = state.first {
            // Nobody else has written into this queue yet.
            drop(inputs.try_send(Input::Stop(signal.request())));
        }
        state.stage = Stage::Running(inputs, recorder);
    }

    /// Lets a signal end the process at once from now on: what is still done, such as to answer the test prompts, changes no
    /// result.
    pub fn finish(&self, is_done: bool) {
        self.lock().stage = Stage::Over { is_done };
    }

    /// Lets the first signal cancel the push of the result from now on.
    pub fn begin_push(&self, push: Progress) {
        self.lock().stage = Stage::Pushing(push);
    }

    async fn obey(self, mut received: Received) {
        let signal = received.next().await;
        streams::hurry();
        {
            let mut state = self.lock();
            state.first = Some(signal);
            match &state.stage {
                Stage::Preparing(progress) => {
                    progress.cancel();
                    tokio::spawn(self.clone().end_preparation(signal));
                }
                Stage::Pushing(push) => push.cancel(),
                Stage::Running(inputs, _) => {
                    let (inputs, request) = (inputs.clone(), signal.request());
                    // A driver that is stuck must not hold the second signal back.
                    tokio::spawn(async move { drop(inputs.send(Input::Stop(request)).await) });
                }
                // There is nothing to go on with.
                Stage::Over { is_done: true } if signal.code == exit::RESUMABLE => end(exit::DONE),
                Stage::Over { .. } => end(signal.code),
            }
        }
        let second = received.next().await;
        self.record_the_end(signal);
        end(second.code);
    }

    /// Puts on record that a run was ended at once, unless its end is there already. Waits no longer for it than a moment.
    fn record_the_end(&self, signal: Signal) {
        // The lock is not held while the record is waited for.
        let recorder = match &self.lock().stage {
            Stage::Running(_, recorder) => recorder.clone(),
            Stage::Preparing(_) | Stage::Pushing(_) | Stage::Over { .. } => return,
        };
        let (done, recorded) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let reason = format!("{}, twice: nothing more was saved", signal.reason);
            let _ = done.send(recorder.record_stopped(reason));
        });
        if let Ok(Some(step)) = recorded.recv_timeout(RECORD_PATIENCE) {
            streams::stdout().say(&format!(
                "stopped at once at step {step}: nothing more was saved; the same command goes on from what waiting workers hold, \
                 or from the newest checkpoint"
            ));
        }
    }

    /// Ends the process where a cancelled preparation does not end by itself.
    async fn end_preparation(self, signal: Signal) {
        tokio::time::sleep(CANCEL_PATIENCE).await;
        if let Stage::Preparing(progress) = &self.lock().stage {
            streams::stdout().say(&signal.stopped_early(progress));
            end(signal.code);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn end(code: u8) -> ! {
    streams::finish();
    remove_scratch();
    std::process::exit(code.into());
}

/// A signal, and what it asks for.
#[derive(Clone, Copy, Debug)]
pub struct Signal {
    /// Exit code of the process.
    pub code: u8,
    /// Why the run stopped, for its record.
    reason: &'static str,
    /// What the user can do to end the process at once, in words.
    again: &'static str,
}

impl Signal {
    fn request(&self) -> StopRequest {
        StopRequest {
            reason: self.reason.to_owned(),
            resumable: self.code == exit::RESUMABLE,
            again: self.again,
        }
    }

    /// What the user is told where the signal came before the run began.
    pub fn stopped_early(&self, progress: &Progress) -> String {
        let at = match progress.now().to_string() {
            at if at.is_empty() => String::new(),
            at => format!(" while {at}"),
        };
        let reason = self.reason;
        format!("stopped{at}: {reason}; nothing had begun, and the same command starts over")
    }
}

const INTERRUPTED: Signal = Signal {
    code: exit::INTERRUPTED,
    reason: "interrupted with Ctrl-C",
    again: "press Ctrl-C again to stop at once",
};

/// The signals that came. None that comes between two waits is missed.
#[cfg(unix)]
struct Received {
    interrupt: Option<tokio::signal::unix::Signal>,
    terminate: Option<tokio::signal::unix::Signal>,
    /// The end of the terminal. It counts once: a shell passes on what the system has told everybody.
    hangup: Option<tokio::signal::unix::Signal>,
}

#[cfg(unix)]
impl Received {
    fn register() -> Self {
        use tokio::signal::unix::{SignalKind, signal};
        Self {
            interrupt: signal(SignalKind::interrupt()).ok(),
            terminate: signal(SignalKind::terminate()).ok(),
            hangup: match common::hangup::is_ignored() {
                true => None,
                false => signal(SignalKind::hangup()).ok(),
            },
        }
    }

    async fn next(&mut self) -> Signal {
        async fn receive(signal: &mut Option<tokio::signal::unix::Signal>) {
            match signal {
                Some(signal) => drop(signal.recv().await),
                None => std::future::pending().await,
            }
        }
        let resumable = |reason| Signal {
            code: exit::RESUMABLE,
            reason,
            again: "a second signal stops it at once",
        };
        let received = tokio::select! {
            () = receive(&mut self.interrupt) => INTERRUPTED,
            () = receive(&mut self.terminate) => resumable("terminated by a signal"),
            () = receive(&mut self.hangup) => resumable("its terminal was closed"),
        };
        // The process goes on catching it.
        self.hangup = None;
        received
    }
}

#[cfg(not(unix))]
struct Received;

#[cfg(not(unix))]
impl Received {
    fn register() -> Self {
        Self
    }

    async fn next(&mut self) -> Signal {
        let _ = tokio::signal::ctrl_c().await;
        INTERRUPTED
    }
}
