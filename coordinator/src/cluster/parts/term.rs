//! The term: when this life of the coordinator began, whom it waits for at its beginning, and why it shall end early.

use std::time::{Duration, Instant};

use super::rejoin_window::{ABSENT, RejoinWindow, Returned};

/// How long a new term admits only workers of the numerics class that computed so far: those that outlived the coordinator could
/// not join a run of another class, and what they hold would be lost.
const CLASS_KEPT: Duration = Duration::from_secs(15);

/// Why the run shall end before the last step.
#[derive(Clone, Debug)]
pub struct Stop {
    pub reason: String,
    /// Whether the run is to be started again, so that its workers shall wait for the next term.
    pub resumable: bool,
}

/// One life of the coordinator.
#[derive(Debug)]
pub struct Term {
    /// When its first event was handled.
    began: Option<Instant>,
    /// The time in which workers of an earlier term may come back; None once it is over.
    rejoin_window: Option<RejoinWindow>,
    stop: Option<Stop>,
}

impl Term {
    /// A term that has yet to begin.
    pub fn new(rejoin_window: Option<RejoinWindow>) -> Self {
        Self {
            began: None,
            rejoin_window,
            stop: None,
        }
    }

    /// Notes that something happens; the first time, the term begins.
    pub fn begin(&mut self, now: Instant) {
        self.began.get_or_insert(now);
    }

    /// Until when only workers of the numerics class that computed so far are admitted. None before the term began.
    pub fn class_kept_until(&self) -> Option<Instant> {
        Some(self.began? + CLASS_KEPT)
    }

    /// Asks for an early end. What was asked for first counts.
    pub fn request_stop(&mut self, reason: String, resumable: bool) {
        self.stop.get_or_insert(Stop { reason, resumable });
    }

    /// Whether an early end was asked for.
    pub fn is_stopping(&self) -> bool {
        self.stop.is_some()
    }

    /// The early end that was asked for.
    pub fn stop(&self) -> Option<&Stop> {
        self.stop.as_ref()
    }

    /// Whether workers of an earlier term are waited for.
    pub fn is_rejoin_window_open(&self) -> bool {
        self.rejoin_window.is_some()
    }

    /// When the run begins without those workers of an earlier term who are not back by then. `is_one_busy`: one is back and has
    /// yet to say what it holds. None where they are not waited for.
    pub fn rejoin_window_ends_at(&self, is_one_busy: bool) -> Option<Instant> {
        let window = self.rejoin_window.as_ref()?;
        window.ends_at(self.began, is_one_busy)
    }

    /// Time before which nobody is told that workers are missing: they may be about to come back.
    pub fn first_reminder_at(&self) -> Option<Instant> {
        let began = self.began.filter(|_| self.is_rejoin_window_open());
        began.map(|began| began + ABSENT)
    }

    /// Notes how many workers are back with more than the newest checkpoint. None where they are not waited for.
    pub fn note_returned(&mut self, now: Instant, back: usize) -> Option<Returned> {
        let window = self.rejoin_window.as_mut()?;
        Some(window.note_returned(now, back))
    }

    /// Ends the waiting for workers of an earlier term. False where it was over.
    pub fn close_rejoin_window(&mut self) -> bool {
        self.rejoin_window.take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::settings::PreviousTerms;

    #[test]
    fn of_two_stops_the_first_one_counts() {
        let mut term = Term::new(None);
        assert!(!term.is_stopping());
        term.request_stop("first".to_owned(), true);
        term.request_stop("second".to_owned(), false);
        let stop = term
            .stop()
            .map(|stop| (stop.reason.as_str(), stop.resumable));
        assert_eq!(stop, Some(("first", true)));
    }

    #[test]
    fn those_who_may_come_back_are_waited_for_from_the_first_of_them_on() {
        let earlier = PreviousTerms {
            recorded: 3,
            workers: 2,
            ..PreviousTerms::default()
        };
        let (mut term, began) = (Term::new(RejoinWindow::of(&earlier, 0)), Instant::now());
        term.begin(began);
        assert_eq!(term.rejoin_window_ends_at(false), Some(began + ABSENT));
        let later = began + ABSENT / 2;
        term.begin(later);
        let returned = term.note_returned(later, 1);
        assert!(returned.is_some_and(|returned| returned.is_untold && !returned.is_complete));
        assert_eq!(term.rejoin_window_ends_at(false), Some(later + ABSENT));
        let returned = term.note_returned(later, 2);
        assert!(returned.is_some_and(|returned| !returned.is_untold && returned.is_complete));
        assert!(term.close_rejoin_window() && !term.is_rejoin_window_open());
    }
}
