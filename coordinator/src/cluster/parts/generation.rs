//! The generation: which one it is, whether anything is computed in it, and which losses lead to the next one.

use std::time::{Duration, Instant};

/// Time between two reminders that workers are missing.
const REMINDER: Duration = Duration::from_secs(30);
/// A member lost within this time after a generation began waits for other losses, so that all share the next generation.
pub const LOSSES_GATHER: Duration = Duration::from_millis(150);
/// [`LOSSES_GATHER`] per member of a large cluster: to tell a thousand members of a generation takes a while, and so does to
/// hear of a hundred losses.
const LOSSES_GATHER_PER_MEMBER: Duration = Duration::from_millis(2);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Nothing can be computed: too few workers are ready.
    Waiting,
    Running,
    /// The run is over.
    Ended,
}

/// The newest generation, and what lasts from one to the next.
#[derive(Debug)]
pub struct Generation {
    stage: Stage,
    number: u64,
    /// When it began; None before the first one of this term.
    began: Option<Instant>,
    /// Number of members that it began with.
    size: usize,
    /// A member of it is gone and no new one has begun.
    member_lost: bool,
    /// Numerics class of the run's workers, fixed by the first generation; later joiners must match.
    numerics_class: Option<String>,
    /// When the user was last told that workers are missing, since too few were left.
    last_reminder: Option<Instant>,
}

impl Generation {
    /// No generation of this term yet; `number` and `numerics_class` are those of the last one of an earlier term.
    pub fn after(number: u64, numerics_class: Option<String>) -> Self {
        Self {
            stage: Stage::Waiting,
            number,
            began: None,
            size: 0,
            member_lost: false,
            numerics_class,
            last_reminder: None,
        }
    }

    pub fn number(&self) -> u64 {
        self.number
    }

    /// Whether too few workers are ready to compute anything.
    pub fn is_waiting(&self) -> bool {
        self.stage == Stage::Waiting
    }

    /// Whether its members compute.
    pub fn is_running(&self) -> bool {
        self.stage == Stage::Running
    }

    /// Whether this is the generation of that number and its members compute.
    pub fn is_at(&self, number: u64) -> bool {
        self.is_running() && self.number == number
    }

    /// Whether the run is over: no generation follows.
    pub fn is_over(&self) -> bool {
        self.stage == Stage::Ended
    }

    /// Whether no generation has begun in this term.
    pub fn is_before_first(&self) -> bool {
        self.began.is_none()
    }

    /// Number of members that it began with.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Begins the next generation with so many members.
    pub fn begin(&mut self, now: Instant, size: usize) {
        self.stage = Stage::Running;
        self.number += 1;
        self.began = Some(now);
        self.size = size;
    }

    /// Ends the generation without another, because too few are left to compute. False where nothing was computed before.
    pub fn suspend(&mut self) -> bool {
        if !self.is_running() {
            return false;
        }
        self.stage = Stage::Waiting;
        self.last_reminder = None;
        true
    }

    /// Ends the run.
    pub fn end(&mut self) {
        self.stage = Stage::Ended;
    }

    /// Notes that a member is gone.
    pub fn lose_member(&mut self) {
        self.member_lost = true;
    }

    /// Whether a member is gone and no new generation has begun.
    pub fn has_lost_member(&self) -> bool {
        self.member_lost
    }

    /// Forgets the losses so far, as the generation that begins is without the lost.
    pub fn forget_losses(&mut self) {
        self.member_lost = false;
    }

    /// Takes note of the losses so far. True where a member was lost while something was computed.
    pub fn take_losses(&mut self) -> bool {
        std::mem::take(&mut self.member_lost) && self.is_running()
    }

    /// Whether it has begun so lately that a loss waits for others; `members` are left.
    pub fn gathers_losses(&self, now: Instant, members: usize) -> bool {
        let is_new = |began: Instant| now.duration_since(began) < losses_gather(members);
        self.began.is_some_and(is_new)
    }

    /// When a loss that waits for others leads to a new generation.
    pub fn regroups_at(&self, members: usize) -> Option<Instant> {
        let waits = self.member_lost && self.is_running();
        let began = self.began.filter(|_| waits)?;
        Some(began + losses_gather(members))
    }

    /// Numerics class of the run's workers, once it is fixed.
    pub fn numerics_class(&self) -> Option<&str> {
        self.numerics_class.as_deref()
    }

    /// Fixes the numerics class of the run, where it is not fixed yet, and returns the fixed one.
    pub fn fix_numerics_class(&mut self, class: String) -> &str {
        self.numerics_class.get_or_insert(class)
    }

    /// Leaves it to the next generation again which numerics class the run has.
    pub fn open_numerics_class(&mut self) {
        self.numerics_class = None;
    }

    /// When the user is told next that workers are missing; the first time at `first`.
    pub fn reminds_at(&self, first: Option<Instant>) -> Option<Instant> {
        let again = self.last_reminder.map(|last| last + REMINDER);
        again.or(first)
    }

    /// Whether the user is to be told now that workers are missing. True once in [`REMINDER`].
    pub fn takes_reminder(&mut self, now: Instant) -> bool {
        let due = |last: Instant| now.duration_since(last) >= REMINDER;
        let is_due = self.last_reminder.is_none_or(due);
        if is_due {
            self.last_reminder = Some(now);
        }
        is_due
    }
}

/// How long after its beginning a generation of so many members gathers losses before the next one begins.
pub fn losses_gather(members: usize) -> Duration {
    LOSSES_GATHER.max(LOSSES_GATHER_PER_MEMBER * members as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_right_after_the_beginning_waits_for_others_and_a_later_one_does_not() {
        let (mut generation, began) = (Generation::after(7, None), Instant::now());
        generation.begin(began, 3);
        generation.lose_member();
        assert_eq!(generation.regroups_at(2), Some(began + LOSSES_GATHER));
        assert!(generation.take_losses() && generation.gathers_losses(began, 2));
        assert!(!generation.gathers_losses(began + LOSSES_GATHER, 2));
        assert_eq!(generation.number(), 8);
    }

    #[test]
    fn whoever_is_lost_while_nothing_is_computed_leads_to_no_generation() {
        let mut generation = Generation::after(0, None);
        generation.begin(Instant::now(), 1);
        assert!(generation.suspend() && !generation.suspend());
        generation.lose_member();
        assert!(!generation.take_losses() && !generation.has_lost_member());
    }

    #[test]
    fn a_reminder_comes_every_half_minute_and_anew_when_too_few_are_left() {
        let (mut generation, now) = (Generation::after(0, None), Instant::now());
        assert!(generation.takes_reminder(now) && !generation.takes_reminder(now));
        assert_eq!(generation.reminds_at(None), Some(now + REMINDER));
        generation.begin(now, 1);
        generation.suspend();
        assert!(generation.takes_reminder(now));
    }
}
