//! What a worker says while its coordinator prepares the run: its [`Status`] on a terminal, and in a log a line every so
//! often. It waits for nothing itself.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use crate::status::Status;

/// Time between two lines of a log while the coordinator prepares.
const WAITING_LINE_INTERVAL: Duration = Duration::from_secs(30);

/// What was told so far while the coordinator prepares the run.
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

    /// Shows what the coordinator is at: `tokenising the data, 41%`.
    pub fn show(&mut self, moment: &str) {
        self.has_waited = true;
        let moment: String = moment.chars().filter(|c| !c.is_control()).collect();
        self.status.preparing(moment.clone());
        if std::io::stderr().is_terminal() {
            return;
        }
        if self
            .told
            .is_none_or(|told| told.elapsed() >= WAITING_LINE_INTERVAL)
        {
            self.told = Some(Instant::now());
            tracing::info!("the coordinator is preparing: {moment}; waiting for it");
        }
    }

    /// Ends the wait: the coordinator has answered, or is gone.
    pub fn end(&mut self) {
        self.told = None;
    }

    /// Returns whether the coordinator was waited for since the last call: it was there, so losses before that count no more.
    pub fn take_waited(&mut self) -> bool {
        std::mem::take(&mut self.has_waited)
    }
}
