//! How often a piece of work is tried, and how long it waits in between. Nothing here waits itself.

use std::time::Duration;

use super::HubError;
use super::failure::Failure;

/// Most failures in a row.
const MAX_FAILURES: u32 = 5;
/// Most failures of one piece of work, however much came in between.
const MAX_FAILURES_IN_ALL: u32 = 100;
/// Most time that one piece of work waits, in all.
const MAX_WAIT: Duration = Duration::from_secs(300);
const FIRST_WAIT: Duration = Duration::from_millis(500);

/// How often a piece of work has failed, and how long it has waited.
#[derive(Debug, Default)]
pub struct Retries {
    in_a_row: u32,
    in_all: u32,
    waited: Duration,
    /// A hub that cannot be reached is given up at once.
    is_dispensable: bool,
}

impl Retries {
    pub(super) fn of_call(is_dispensable: bool) -> Self {
        Self {
            is_dispensable,
            ..Self::default()
        }
    }

    /// How long to wait before the next try, with the error to tell; or the error where there is no next try.
    pub(super) fn next(&mut self, failure: Failure) -> Result<(Duration, HubError), HubError> {
        let (error, after) = match failure {
            Failure::Final(error) => return Err(error),
            Failure::Passing { error, after } => (*error, after),
        };
        if self.is_dispensable && error.is_unreachable() {
            return Err(error);
        }
        match self.failed(after) {
            Some(wait) => Ok((wait, error)),
            None => Err(error),
        }
    }

    /// Counts a failure that may pass: how long to wait before the next try, or None where there is none. `after`: the time
    /// that the server asks to wait.
    pub fn failed(&mut self, after: Option<Duration>) -> Option<Duration> {
        self.in_a_row += 1;
        self.in_all += 1;
        let doubled = FIRST_WAIT * 2_u32.pow(self.in_a_row.min(MAX_FAILURES) - 1);
        let wait = after.map_or(doubled, |after| after.max(FIRST_WAIT));
        let is_over = self.in_a_row >= MAX_FAILURES || self.in_all >= MAX_FAILURES_IN_ALL;
        if is_over || self.waited.saturating_add(wait) > MAX_WAIT {
            return None;
        }
        self.waited += wait;
        Some(wait)
    }

    /// Something came in: failures are counted anew.
    pub fn progressed(&mut self) {
        self.in_a_row = 0;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn passing(after: Option<u64>) -> Failure {
        Failure::Passing {
            error: Box::new(HubError::RateLimited {
                subject: "a/b".to_owned(),
                seconds: after.unwrap_or(0),
            }),
            after: after.map(Duration::from_secs),
        }
    }

    #[test]
    fn waits_double_and_end_after_a_number_of_failures_in_a_row() {
        let mut retries = Retries::default();
        let waits: Vec<f64> = std::iter::from_fn(|| retries.next(passing(None)).ok())
            .map(|(wait, _)| wait.as_secs_f64())
            .collect();
        assert_eq!(waits, [0.5, 1.0, 2.0, 4.0]);
        retries.progressed();
        retries.next(passing(None)).unwrap();
    }

    #[test]
    fn no_work_waits_longer_than_five_minutes_in_all() {
        let mut retries = Retries::default();
        assert_eq!(retries.next(passing(Some(200))).unwrap().0.as_secs(), 200);
        let message = retries.next(passing(Some(101))).unwrap_err().to_string();
        assert!(message.contains("101 s"), "{message}");
    }

    #[test]
    fn failures_end_however_much_comes_in_between() {
        let mut retries = Retries::default();
        let count = std::iter::from_fn(|| {
            retries.progressed();
            retries.next(passing(Some(0))).ok()
        });
        assert_eq!(count.count() as u32, MAX_FAILURES_IN_ALL - 1);
    }
}
