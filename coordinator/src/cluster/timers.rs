//! What happens because time passed: silence, broken exchanges, losses that are gathered, reminders.

use std::time::{Duration, Instant};

use super::command::Command;
use super::failure_detector;
use super::run_event::RunEvent;
use super::{Cluster, Stage};

/// Time between two reminders that workers are missing.
const REMINDER: Duration = Duration::from_secs(30);
/// Time after a broken exchange in which the blamed peer's connection to the coordinator may break too, before it is judged.
pub const PEER_LOST_GRACE: Duration = Duration::from_millis(500);
/// A member lost within this time after a generation began waits for other losses, so that all share the next generation.
pub const LOSSES_GATHER: Duration = Duration::from_millis(150);
/// [`LOSSES_GATHER`] per member of a large cluster: to tell a thousand members of a generation takes a while, and so does to
/// hear of a hundred losses.
const LOSSES_GATHER_PER_MEMBER: Duration = Duration::from_millis(2);

impl Cluster {
    /// When something is due even if nothing happens. None where nothing is.
    pub fn wakes_at(&self) -> Option<Instant> {
        if self.stage == Stage::Ended {
            return None;
        }
        let reminder = self.reminds_at();
        let silence = self.failure_detector.wakes_at(self.deadline());
        let due = [
            silence,
            self.probing.wakes_at(),
            self.nccl_is_judged_at(),
            self.regroups_at(),
            self.recheck_at,
            self.patience_ends_at(),
            self.exchange_ends_at(),
            self.joining.wakes_at(),
            reminder,
            self.grace_ends_at(),
            self.saving.retries_at(),
        ];
        due.into_iter().flatten().min()
    }

    /// How long a worker may be silent before it is given up.
    pub(super) fn deadline(&self) -> Duration {
        failure_detector::deadline(self.stats.mean_step_seconds())
    }

    /// Does what is due at `now` because time passed.
    pub(super) fn tick(&mut self, now: Instant, commands: &mut Vec<Command>) {
        self.expel_the_silent(now, commands);
        self.expel_the_stuck(now, commands);
        if self.exchange_ends_at().is_some_and(|at| at <= now) {
            self.give_up_exchange(now, commands);
        }
        if self.regroups_at().is_some_and(|at| at <= now) {
            self.reconfigure_if_member_lost(now, commands);
        }
        if self.recheck_at.is_some_and(|at| at <= now) {
            self.rebalance(now, commands);
        }
        self.tick_probes(now, commands);
        self.judge_nccl(now, commands);
        if self.saving.retry_is_due(now) {
            self.proceed(now, commands);
        }
        self.watch_grace(now, commands);
        let may_remind = self.grace_is_short_until().is_none_or(|until| until <= now);
        if self.stage == Stage::Waiting && self.stopping.is_none() && may_remind {
            self.remind(now, commands);
        }
    }

    fn expel_the_silent(&mut self, now: Instant, commands: &mut Vec<Command>) {
        let deadline = self.deadline();
        let expired = self.failure_detector.expired(now, deadline);
        if expired.is_empty() {
            return;
        }
        for (worker, silence) in expired {
            let reason = format!(
                "nothing was heard of it for {:.1} s, {:.1} s are allowed",
                silence.as_secs_f64(),
                deadline.as_secs_f64()
            );
            self.forget(worker, &reason, commands);
            commands.push(Command::Expel { worker, reason });
        }
        self.reconfigure_if_member_lost(now, commands);
    }

    /// When a loss that waits for others leads to a new generation.
    fn regroups_at(&self) -> Option<Instant> {
        let waits = self.member_lost && self.stage == Stage::Running && self.stopping.is_none();
        let began = self.generation_began.filter(|_| waits)?;
        Some(began + self.losses_gather())
    }

    /// How long after its beginning a generation gathers losses before the next one begins.
    pub(super) fn losses_gather(&self) -> Duration {
        let members = self.members.ranks().len() as u32;
        LOSSES_GATHER.max(LOSSES_GATHER_PER_MEMBER * members)
    }

    fn reminds_at(&self) -> Option<Instant> {
        let missing = self.usable_count() < self.settings.min_workers;
        if self.stage != Stage::Waiting || self.stopping.is_some() || !missing {
            return None;
        }
        let again = self.last_reminder.map(|last| last + REMINDER);
        let first = self
            .grace_is_short_until()
            .or(self.failure_detector.looked());
        again.or(first)
    }

    pub(super) fn remind(&mut self, now: Instant, commands: &mut Vec<Command>) {
        let due = |last: Instant| now.duration_since(last) >= REMINDER;
        let (have, need) = (self.usable_count(), self.settings.min_workers);
        // Those who are here and load need no reminder.
        if have < need && self.last_reminder.is_none_or(due) {
            self.last_reminder = Some(now);
            commands.push(Command::Emit(RunEvent::WaitingForWorkers { have, need }));
            self.tell_outsider(commands);
        }
    }
}
