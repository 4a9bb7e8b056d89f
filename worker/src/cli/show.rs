//! What `worker join` shows of itself: on a terminal one line that changes, in a log a line now and then, and at the end
//! what it did. A thread of its own reads the [`Status`]; the log goes through here, so that both fit on one terminal.

use std::collections::VecDeque;
use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::streams;
use tracing::Level;
use worker::status::{Doing, State, Status};

/// Time between two pictures on a terminal.
const PICTURE_EVERY: Duration = Duration::from_millis(500);
/// Time between two lines in a log.
const STATUS_LINE_INTERVAL: Duration = Duration::from_secs(30);
/// How long a worker must be at something before its line says so.
const SHORT: Duration = Duration::from_secs(2);
/// Number of readings over which the speed is taken: 15 s on a terminal.
const READINGS: usize = 30;
const USUAL_COLUMNS: usize = 80;
/// Characters that take a picture away from a terminal.
const CLEAR: &str = "\r\x1b[2K";

/// Whether there is a picture on the terminal. Held while something is written there, which never waits for long.
static IS_DRAWN: Mutex<bool> = Mutex::new(false);

fn is_drawn() -> MutexGuard<'static, bool> {
    IS_DRAWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes the log to standard error: a line first takes the picture away, which comes back with the next one.
pub struct LogWriter;

pub fn log_writer() -> LogWriter {
    LogWriter
}

impl Write for LogWriter {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let mut is_drawn = is_drawn();
        match std::mem::take(&mut *is_drawn) {
            true => streams::stderr().write_all(&[CLEAR.as_bytes(), buffer].concat())?,
            false => streams::stderr().write_all(buffer)?,
        }
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The thread that shows a worker.
pub struct Show {
    stop: mpsc::Sender<()>,
    thread: Option<JoinHandle<()>>,
    status: Status,
    began: Instant,
}

impl Show {
    /// Begins to show a worker. `address` is the coordinator's.
    pub fn begin(status: Status, address: String) -> Self {
        let (stop, stopped) = mpsc::channel();
        let shown = status.clone();
        let is_wanted = tracing::enabled!(Level::INFO);
        let thread = is_wanted.then(|| {
            let is_terminal = io::stderr().is_terminal()
                && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
            std::thread::spawn(move || match is_terminal {
                true => draw(&shown, &address, &stopped),
                false => tell(&shown, &address, &stopped),
            })
        });
        Self {
            stop,
            thread,
            status,
            began: Instant::now(),
        }
    }

    /// Takes the picture away and says what this worker did.
    pub fn end(mut self) {
        // A thread that is gone needs no word.
        let _ = self.stop.send(());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let state = self.status.now();
        if state.slots > 0 {
            tracing::info!("{}", summary(&state, self.began.elapsed()));
        }
    }
}

fn draw(status: &Status, address: &str, stopped: &mpsc::Receiver<()>) {
    let mut speed = Speed::default();
    while stopped.recv_timeout(PICTURE_EVERY) == Err(RecvTimeoutError::Timeout) {
        let state = status.now();
        let now = Instant::now();
        let tokens_per_second = speed.read(now, state.tokens);
        let columns = console::Term::stderr().size_checked();
        let columns = columns.map_or(USUAL_COLUMNS, |(_, columns)| columns.into());
        let line = line(&state, now, tokens_per_second, address);
        // The last column would break the line on some terminals.
        let line: String = line.chars().take(columns.saturating_sub(1)).collect();
        let mut is_drawn = is_drawn();
        streams::stderr().draw(format!("{CLEAR}{line}").as_bytes());
        *is_drawn = true;
    }
    if std::mem::take(&mut *is_drawn()) {
        streams::stderr().draw(CLEAR.as_bytes());
    }
}

fn tell(status: &Status, address: &str, stopped: &mpsc::Receiver<()>) {
    let mut speed = Speed::default();
    speed.read(Instant::now(), status.now().tokens);
    while stopped.recv_timeout(STATUS_LINE_INTERVAL) == Err(RecvTimeoutError::Timeout) {
        let state = status.now();
        let now = Instant::now();
        let tokens_per_second = speed.read(now, state.tokens);
        // Whoever tries to connect says so itself.
        if !matches!(state.doing, Doing::Connecting | Doing::Preparing) {
            tracing::info!("{}", line(&state, now, tokens_per_second, address));
        }
    }
}

/// Tokens over the last readings, for the speed.
#[derive(Default)]
struct Speed(VecDeque<(Instant, u64)>);

impl Speed {
    /// Takes a reading and returns the tokens a second; None at first.
    fn read(&mut self, now: Instant, tokens: u64) -> Option<f64> {
        self.0.push_back((now, tokens));
        if self.0.len() > READINGS {
            self.0.pop_front();
        }
        let (since, before) = *self.0.front()?;
        let seconds = now.duration_since(since).as_secs_f64();
        (seconds > 0.0).then(|| tokens.saturating_sub(before) as f64 / seconds)
    }
}

/// The line that is shown: `step 12/100  34 slots  1,234 tokens/s  2 workers  waiting for slots 0:05`.
fn line(state: &State, now: Instant, tokens_per_second: Option<f64>, address: &str) -> String {
    let since = now.duration_since(state.since);
    let doing = match state.doing {
        Doing::Connecting => format!("connecting to {address}"),
        Doing::Preparing => format!("the coordinator is preparing: {}", state.moment),
        Doing::Fetching => "fetching model and data".to_owned(),
        Doing::Loading => "loading the model".to_owned(),
        Doing::WaitingToBegin => match &state.aside {
            Some(reason) => format!("takes no part for now, because {reason}"),
            None => "waiting for others to join or load, or for a place".to_owned(),
        },
        Doing::WaitingForSlots => "waiting for slots".to_owned(),
        Doing::Computing => "computing a slot".to_owned(),
        Doing::Exchanging => "exchanging gradients".to_owned(),
        Doing::Copying => "copying the state of another worker".to_owned(),
    };
    let doing = format!("{doing} {}", minutes(since));
    if state.total_steps == 0 || state.workers == 0 {
        return doing;
    }
    let mut parts = vec![
        format!("step {}/{}", state.step, state.total_steps),
        counted(state.slots, "slot"),
    ];
    parts.extend(tokens_per_second.map(|speed| format!("{speed:.0} tokens/s")));
    parts.push(counted(state.workers as u64, "worker"));
    if since >= SHORT {
        parts.push(doing);
    }
    parts.join("  ")
}

fn summary(state: &State, elapsed: Duration) -> String {
    let speed = state.tokens as f64 / elapsed.as_secs_f64().max(1e-9);
    format!(
        "computed {} with {} tokens in {}: {speed:.0} tokens/s",
        counted(state.slots, "slot"),
        state.tokens,
        minutes(elapsed)
    )
}

fn counted(number: u64, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {noun}{plural}")
}

/// Writes a duration in minutes and seconds: `0:07`, `75:12`.
fn minutes(duration: Duration) -> String {
    let seconds = duration.as_secs();
    format!("{}:{:02}", seconds / 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(doing: Doing) -> State {
        State {
            doing,
            step: 12,
            total_steps: 100,
            workers: 2,
            slots: 34,
            tokens: 5000,
            ..State::default()
        }
    }

    fn after(seconds: u64, state: &State, speed: Option<f64>) -> String {
        let now = state.since + Duration::from_secs(seconds);
        line(state, now, speed, "host:7077")
    }

    #[test]
    fn a_worker_says_its_steps_its_speed_and_what_it_waits_for() {
        let computing = state(Doing::Computing);
        assert_eq!(
            after(1, &computing, Some(1234.4)),
            "step 12/100  34 slots  1234 tokens/s  2 workers"
        );
        let waiting = state(Doing::WaitingForSlots);
        let waits = after(65, &waiting, Some(0.0));
        assert_eq!(
            waits,
            "step 12/100  34 slots  0 tokens/s  2 workers  waiting for slots 1:05"
        );
        assert!(waits.len() < 80);
        let first = State {
            workers: 0,
            ..state(Doing::Connecting)
        };
        assert_eq!(after(5, &first, None), "connecting to host:7077 0:05");
        let aside = State {
            workers: 0,
            aside: Some("worker b cannot reach it".to_owned()),
            ..state(Doing::WaitingToBegin)
        };
        assert_eq!(
            after(5, &aside, None),
            "takes no part for now, because worker b cannot reach it 0:05"
        );
    }

    #[test]
    fn the_speed_is_that_of_the_last_moments() {
        let began = Instant::now();
        let mut speed = Speed::default();
        assert_eq!(speed.read(began, 1000), None);
        let mut last = None;
        for second in 1..=100_u64 {
            // Ten times as fast in the second half.
            let tokens = 1000 + 10 * second + 90 * second.saturating_sub(50);
            last = speed.read(began + Duration::from_secs(second), tokens);
        }
        assert_eq!(last, Some(100.0));
    }

    #[test]
    fn at_the_end_it_says_what_it_did() {
        let told = summary(&state(Doing::Computing), Duration::from_secs(50));
        let expected = "computed 34 slots with 5000 tokens in 0:50: 100 tokens/s";
        assert_eq!(told, expected);
    }
}
