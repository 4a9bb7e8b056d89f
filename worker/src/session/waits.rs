//! What a worker says while its coordinator prepares the run: its [`Status`] on a terminal, and in a log a line every so often. It waits for nothing itself.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use crate::status::Status;

/// Between two lines of a log.
const LINE_EVERY: Duration = Duration::from_secs(30);

/// What was said so far.
pub struct Waits {
    status: Status,
    /// When a line was written last, in a log.
    told: Option<Instant>,
    has_waited: bool,
}

impl Waits {
    pub fn new(status: Status) -> Self {
        Self {
            status,
            told: None,
            has_waited: false,
        }
    }

    /// The coordinator is at this: `tokenising the data, 41%`.
    pub fn show(&mut self, moment: &str) {
        self.has_waited = true;
        let moment: String = moment.chars().filter(|c| !c.is_control()).collect();
        self.status.preparing(moment.clone());
        if std::io::stderr().is_terminal() {
            return;
        }
        if self.told.is_none_or(|told| told.elapsed() >= LINE_EVERY) {
            self.told = Some(Instant::now());
            tracing::info!("the coordinator is preparing: {moment}; waiting for it");
        }
    }

    /// It has answered, or is gone.
    pub fn end(&mut self) {
        self.told = None;
    }

    /// Whether it was waited for since this was asked last: it was there, so what came before counts no more.
    pub fn take_waited(&mut self) -> bool {
        std::mem::take(&mut self.has_waited)
    }
}
