//! What a worker says while its coordinator prepares the run: one line that changes on a terminal, and in a log a line
//! every so often. It waits for nothing itself.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use common::streams;

/// Between two lines of a log.
const LINE_EVERY: Duration = Duration::from_secs(30);

/// What was said so far.
#[derive(Default)]
pub struct Waits {
    /// When a line was written last, in a log.
    told: Option<Instant>,
    /// The line on the terminal changes still.
    is_open: bool,
    has_waited: bool,
}

impl Waits {
    /// The coordinator is at this: `tokenising the data, 41%`.
    pub fn show(&mut self, moment: &str) {
        self.has_waited = true;
        let moment: String = moment.chars().filter(|c| !c.is_control()).collect();
        if tracing::enabled!(tracing::Level::INFO) && std::io::stderr().is_terminal() {
            self.is_open = true;
            let line = format!("\r\x1b[2Kthe coordinator is preparing: {moment}");
            return streams::stderr().draw(line.as_bytes());
        }
        if self.told.is_none_or(|told| told.elapsed() >= LINE_EVERY) {
            self.told = Some(Instant::now());
            tracing::info!("the coordinator is preparing: {moment}; waiting for it");
        }
    }

    /// It has answered, or is gone.
    pub fn end(&mut self) {
        self.told = None;
        if std::mem::take(&mut self.is_open) {
            streams::stderr().say("");
        }
    }

    /// Whether it was waited for since this was asked last: it was there, so what came before counts no more.
    pub fn take_waited(&mut self) -> bool {
        std::mem::take(&mut self.has_waited)
    }
}
