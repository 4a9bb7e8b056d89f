//! Generations: who takes part from when, and from which step they go on.

use std::sync::Arc;
use std::time::Instant;

use proto::v1;

use crate::cluster::Cluster;
use crate::cluster::command::Command;
use crate::cluster::event::WorkerId;
use crate::cluster::run_event::RunEvent;

impl Cluster {
    /// Begins a new generation if a member of this one was lost; at once, unless this one has only just begun.
    pub(super) fn reconfigure_if_member_lost(&mut self, now: Instant, commands: &mut Vec<Command>) {
        let members = self.members.ranks().len();
        if !self.generation.take_losses() {
            self.proceed(now, commands);
        } else if self.term.is_stopping() {
            self.interrupt_settling(commands);
            self.proceed(now, commands);
        } else if self.generation.gathers_losses(now, members) {
            self.generation.lose_member();
        } else {
            self.start_generation(now, commands);
        }
    }

    /// Begins a new generation of everyone who is ready, or waits where they are too few.
    pub(super) fn start_generation(&mut self, now: Instant, commands: &mut Vec<Command>) {
        self.probing.note_generation();
        self.interrupt_settling(commands);
        self.generation.forget_losses();
        self.transport.forgive_failure();
        if self.generation.is_over() || self.term.is_rejoin_window_open() {
            return;
        }
        self.skip_to_checkpoint_step(commands);
        let entrants = self.entrants();
        self.members.elect(
            self.settings.max_workers,
            self.progress.committed(),
            &entrants,
        );
        if self.members.ranks().len() < self.settings.min_workers {
            if self.generation.suspend() {
                self.stats.wait(now);
                self.remind(now, commands);
            }
            return self.proceed(now, commands);
        }
        self.roll_back_to_newest_survivor(commands);
        self.generation.begin(now, self.members.ranks().len());
        let is_fed = |id| self.is_fed(id);
        let stays = |id| !self.members.is_draining(id);
        let mut generation = self.members.generation(
            self.generation.number(),
            self.progress.committed(),
            is_fed,
            stays,
        );
        generation.deadline_ms = self.deadline().as_millis() as u64;
        self.choose_transport(&mut generation, commands);
        let generation = Arc::new(generation);
        for (rank, &worker) in (0..).zip(self.members.ranks()) {
            let generation = generation.clone();
            commands.push(Command::SendGeneration {
                worker,
                rank,
                generation,
            });
        }
        self.note_generation();
        self.await_entries(now);
        let numerics_class = self.fix_numerics_class(commands);
        self.stats.restart(now);
        self.evaluation.go_on(now, self.progress.work());
        commands.push(Command::Emit(RunEvent::Started {
            step: self.progress.committed(),
            total_steps: self.schedule.total_steps(),
            workers: self.members.ranks().len(),
            generation: self.generation.number(),
            numerics_class,
        }));
    }

    /// Numerics class of the run, which the first generation decides.
    pub(super) fn fix_numerics_class(&mut self, commands: &mut Vec<Command>) -> String {
        let first = self.members.ranks().first();
        let class = first.and_then(|id| self.members.get(*id));
        let class = class.map_or_else(String::new, |worker| worker.numerics_class.clone());
        if self.generation.numerics_class().is_none()
            && let Some(earlier) = &self.settings.start_numerics_class
            && *earlier != class
        {
            commands.push(Command::Emit(RunEvent::Notice(format!(
                "the steps so far were computed by workers of numerics class {earlier}, these are of {class}: the result \
                 will not have the bits of an uninterrupted run"
            ))));
        }
        self.generation.fix_numerics_class(class).to_owned()
    }

    /// Goes on from a checkpoint whose step nobody reported, where only workers that started from it are left.
    pub(super) fn skip_to_checkpoint_step(&mut self, commands: &mut Vec<Command>) {
        let Some(step) = self.members.all_beyond(self.progress.committed()) else {
            return;
        };
        if let Some((id, report)) = self.feeds.report_of(step)
            && self.progress.may_commit_late(step)
        {
            // It repeated the update that the others had made, and that nobody else is left to report.
            self.take_late(None, id, report);
            self.settle_pending(commands);
            return;
        }
        let text = format!("the record of step {step} is lost with the workers that reported it");
        commands.push(Command::Emit(RunEvent::Notice(text)));
        self.stats.skip_to(&self.schedule, step);
        self.tell_lost_evaluations(step, commands);
        self.pass_over_best(step, commands);
        self.progress.skip_to(self.ledger_from(step));
    }

    /// Goes back to the newest state that a member still has, where the committed one was lost with its holders.
    pub(super) fn roll_back_to_newest_survivor(&mut self, commands: &mut Vec<Command>) {
        let newest = self.members.newest().unwrap_or(self.progress.committed());
        if newest >= self.progress.committed() {
            return;
        }
        let lost = match self.progress.committed() - newest {
            1 => "it is".to_owned(),
            _ => format!("steps {} to {} are", newest + 1, self.progress.committed()),
        };
        commands.push(Command::Emit(RunEvent::Notice(format!(
            "nobody who is here has step {}; {lost} computed again, to the same weights, unless somebody comes back who \
             has it",
            self.progress.committed()
        ))));
        self.progress.fall_back_to(self.ledger_from(newest));
    }

    /// Goes forward again to a settled state that was thought to be lost: a member had it all the time.
    pub(super) fn roll_forward_to_held_state(
        &mut self,
        now: Instant,
        id: WorkerId,
        step: u64,
        commands: &mut Vec<Command>,
    ) {
        self.members.note_seen(id, step);
        self.interrupt_settling(commands);
        if step > self.progress.committed() && !self.generation.is_over() {
            self.move_on_to(step, commands);
        }
        self.start_generation(now, commands);
    }

    /// A member has entered the generation: its weights are checked, and what its accumulator holds is taken over.
    pub(super) fn enter(
        &mut self,
        now: Instant,
        id: WorkerId,
        entered: &v1::Entered,
        commands: &mut Vec<Command>,
    ) {
        let is_member = self.members.rank_of(id).is_some();
        if !self.generation.is_at(entered.generation) || !is_member {
            return;
        }
        if entered.step > self.progress.committed() && entered.step <= self.stats.recorded() {
            return self.roll_forward_to_held_state(now, id, entered.step, commands);
        }
        if entered.step != self.progress.committed() && self.feeds.is_arriving(id) {
            // Its source made an update that was lost with it, and the others will come there too; or it has just begun with
            // an older copy, and will come here.
            self.members.note_seen(id, entered.step);
            return self.send_back(now, id, commands);
        }
        if entered.step != self.progress.committed() {
            let reason = format!(
                "it entered with the weights after {} steps where {} were expected",
                entered.step,
                self.progress.committed()
            );
            return self.expel(now, id, reason, commands);
        }
        self.progress.release_ahead(id);
        if let Err(reason) = self.adopt_slots(id, entered) {
            return self.expel(now, id, reason, commands);
        }
        self.members.note_entered(id, entered.step);
        self.feeds.end(id);
        self.send_plan(id, commands);
        self.balance(now, commands);
        self.proceed(now, commands);
    }
}
