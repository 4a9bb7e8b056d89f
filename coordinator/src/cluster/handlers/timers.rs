//! What happens because time passed: silence, broken exchanges, losses that are gathered, reminders.

use std::time::{Duration, Instant};

use crate::cluster::Cluster;
use crate::cluster::command::Command;
use crate::cluster::parts::failure_detector;
use crate::cluster::run_event::RunEvent;

/// What is due at some time even if nothing happens, in the order in which it is looked after.
#[derive(Clone, Copy, Debug)]
enum Timer {
    /// When to expel a worker that says nothing.
    Silence,
    /// When to expel a worker whose engine does not answer.
    Reply,
    /// When to make an exchange again that nobody ends.
    Exchange,
    /// When to begin the generation that a gathered loss leads to.
    Generation,
    /// When to look again at which slots are late.
    Slots,
    /// When to judge a broken exchange, or to try again who reaches whom.
    Probes,
    /// When to judge a failure of NCCL.
    Nccl,
    /// When to ask again for a state that the disk did not take.
    Saving,
    /// When to go on without workers of an earlier term.
    Rejoin,
    /// When to say that workers are missing.
    Reminder,
    /// When a newcomer whose copy failed may try again.
    Copy,
}

impl Timer {
    const ALL: [Self; 11] = [
        Self::Silence,
        Self::Reply,
        Self::Exchange,
        Self::Generation,
        Self::Slots,
        Self::Probes,
        Self::Nccl,
        Self::Saving,
        Self::Rejoin,
        Self::Reminder,
        Self::Copy,
    ];
}

impl Cluster {
    /// When something is due even if nothing happens. None where nothing is.
    pub fn wakes_at(&self) -> Option<Instant> {
        if self.generation.is_over() {
            return None;
        }
        let due = Timer::ALL.into_iter();
        due.filter_map(|timer| self.is_due_at(timer)).min()
    }

    /// Does what is due at `now` because time passed.
    pub(super) fn tick(&mut self, now: Instant, commands: &mut Vec<Command>) {
        for timer in Timer::ALL {
            self.look_after(timer, now, commands);
        }
    }

    fn is_due_at(&self, timer: Timer) -> Option<Instant> {
        match timer {
            Timer::Silence => self.failure_detector.wakes_at(self.deadline()),
            Timer::Reply => self.reply_deadlines.wakes_at(),
            Timer::Exchange => self.exchange_ends_at(),
            Timer::Generation => self.regroups_at(),
            Timer::Slots => self.slot_times.late_at(),
            Timer::Probes => self.probing.wakes_at(),
            Timer::Nccl => self.nccl_is_judged_at(),
            Timer::Saving => self.saving.retries_at(),
            Timer::Rejoin => self.rejoin_window_ends_at(),
            Timer::Reminder => self.reminds_at(),
            Timer::Copy => self.feeds.wakes_at(),
        }
    }

    /// Does what a timer is for, where its time has come.
    fn look_after(&mut self, timer: Timer, now: Instant, commands: &mut Vec<Command>) {
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        match timer {
            Timer::Silence => self.expel_the_silent(now, commands),
            Timer::Reply => self.expel_the_stuck(now, commands),
            Timer::Exchange if is_due(self.exchange_ends_at()) => {
                self.give_up_exchange(now, commands);
            }
            Timer::Generation if is_due(self.regroups_at()) => {
                self.reconfigure_if_member_lost(now, commands);
            }
            Timer::Slots if is_due(self.slot_times.late_at()) => self.rebalance(now, commands),
            Timer::Probes => self.tick_probes(now, commands),
            Timer::Nccl => self.judge_nccl(now, commands),
            Timer::Saving if self.saving.retry_is_due(now) => self.proceed(now, commands),
            Timer::Rejoin => self.watch_rejoin_window(now, commands),
            Timer::Reminder => {
                let may_remind = self
                    .term
                    .first_reminder_at()
                    .is_none_or(|until| until <= now);
                if self.generation.is_waiting() && !self.term.is_stopping() && may_remind {
                    self.remind(now, commands);
                }
            }
            Timer::Copy if is_due(self.feeds.wakes_at()) => self.feed_newcomers(now, commands),
            Timer::Exchange | Timer::Generation | Timer::Slots | Timer::Saving | Timer::Copy => {}
        }
    }

    /// How long a worker may be silent before it is given up.
    pub(super) fn deadline(&self) -> Duration {
        failure_detector::deadline(self.stats.mean_step_seconds())
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
        let at = self.generation.regroups_at(self.members.ranks().len());
        at.filter(|_| !self.term.is_stopping())
    }

    fn reminds_at(&self) -> Option<Instant> {
        let missing = self.usable_count() < self.settings.min_workers;
        if !self.generation.is_waiting() || self.term.is_stopping() || !missing {
            return None;
        }
        let first = self
            .term
            .first_reminder_at()
            .or(self.failure_detector.looked());
        self.generation.reminds_at(first)
    }

    pub(super) fn remind(&mut self, now: Instant, commands: &mut Vec<Command>) {
        let (have, need) = (self.usable_count(), self.settings.min_workers);
        // Those who are here and load need no reminder.
        if have < need && self.generation.takes_reminder(now) {
            commands.push(Command::Emit(RunEvent::WaitingForWorkers { have, need }));
            self.tell_outsider(commands);
        }
    }
}
