//! Admission: a newcomer is checked when it joins, and again when it has loaded model and state.

use std::time::Instant;

use common::wire::HEARTBEAT_INTERVAL;
use proto::v1;

use crate::cluster::Cluster;
use crate::cluster::command::Command;
use crate::cluster::event::WorkerId;
use crate::cluster::parts::membership;
use crate::cluster::parts::saving::only_saved;
use crate::cluster::parts::step_stats::disagreement;
use crate::cluster::run_event::RunEvent;

impl Cluster {
    /// A session was opened: the newcomer is welcomed, or refused with the reason.
    pub(super) fn join(
        &mut self,
        now: Instant,
        worker: WorkerId,
        join: v1::Join,
        address: String,
        commands: &mut Vec<Command>,
    ) {
        self.open_class(now);
        let checked = self.members.check_join(
            &join,
            &self.settings.version,
            &self.settings.job_digest,
            self.generation.numerics_class(),
        );
        let checked = checked.and_then(|()| match self.is_too_often_absent(&join.name) {
            Some(reason) => Err(reason),
            None => Ok(()),
        });
        if let Err(mut reason) = checked {
            reason.extend(self.class_hint(now, &join.numerics_class));
            commands.push(Command::Emit(RunEvent::Notice(format!(
                "refused: {reason}"
            ))));
            commands.push(Command::Refuse { worker, reason });
            return;
        }
        if let Some(reason) = self.foreign_state(&join) {
            commands.push(Command::Expel { worker, reason });
            return;
        }
        if let Some(before) = self.members.at_address(&address)
            && self.is_another_at_work(now, before, &join.name)
        {
            let reason = format!(
                "worker {} is reached at {address} already, and speaks: give each worker an --exchange-port of its own, or an \
                 --exchange-host where they are on machines that share an address",
                self.members.name(before)
            );
            let text = format!("worker {} is turned away: {reason}", join.name);
            commands.push(Command::Emit(RunEvent::Notice(text)));
            commands.push(Command::Expel { worker, reason });
            return;
        }
        if let Some(before) = self.members.at_address(&address) {
            // Its connection broke, which was not noticed here yet.
            self.expel(now, before, "it joined anew".to_owned(), commands);
        }
        let (name, device) = (join.name.clone(), join.device.clone());
        self.members.add(worker, join, address);
        self.await_ready(now, worker);
        commands.push(Command::Welcome { worker });
        commands.push(Command::Emit(RunEvent::WorkerJoined {
            worker: worker.0,
            name,
            device,
            workers: self.members.count(),
        }));
        self.probe_newcomer(now, worker, commands);
    }

    /// Whether worker `before` has another name and was heard a moment ago.
    fn is_another_at_work(&self, now: Instant, before: WorkerId, name: &str) -> bool {
        let heard = self.failure_detector.heard_at(before);
        let is_alive =
            heard.is_some_and(|heard| now.duration_since(heard) < 2 * HEARTBEAT_INTERVAL);
        is_alive && self.members.name(before) != name
    }

    /// A worker has loaded model and state: both are checked, and it may lead to a new generation.
    pub(super) fn ready(
        &mut self,
        now: Instant,
        id: WorkerId,
        ready: v1::Ready,
        commands: &mut Vec<Command>,
    ) {
        let worker = self.members.get(id);
        let Some(worker) = worker.filter(|worker| worker.ready.is_none()) else {
            return self.expel(now, id, "it said twice that it is ready".into(), commands);
        };
        let rejoined_with_state = worker.rejoined_with_state;
        let checked = self.check_loaded(id, &ready, rejoined_with_state);
        if checked.is_ok()
            && let Some(digest) = self.stats.digest_of(ready.step)
            && digest != ready.weights_digest
        {
            let reason = disagreement(ready.step, &ready.weights_digest, digest);
            return self.expel(now, id, reason, commands);
        }
        if let Err(reason) = checked {
            self.forget(id, &reason, commands);
            commands.push(Command::Refuse { worker: id, reason });
            return self.reconfigure_if_member_lost(now, commands);
        }
        let step = ready.step;
        self.members.note_ready(id, ready);
        self.place(now, id, (step, rejoined_with_state), commands);
    }

    /// Checks what a worker has loaded against the run, the checkpoint that it starts from, and those who are ready.
    fn check_loaded(
        &self,
        id: WorkerId,
        ready: &v1::Ready,
        rejoined_with_state: bool,
    ) -> Result<(), String> {
        // Whoever comes back may have gone on from a step that was not written down any more.
        let reached = match rejoined_with_state {
            true => self.schedule.total_steps(),
            false => self.stats.recorded().max(self.saving.stored()),
        };
        let digest = &self.settings.job_digest;
        self.members.check_ready(id, ready, digest, reached)?;
        match &self.settings.start_weights_digest {
            Some(expected)
                if ready.step == self.settings.start_step && *expected != ready.weights_digest =>
            {
                Err(format!(
                    "worker {} loaded the weights {} from the checkpoint whose manifest says {}",
                    self.members.name(id),
                    membership::short(&ready.weights_digest),
                    membership::short(expected)
                ))
            }
            _ => Ok(()),
        }
    }

    /// Finds a ready worker its place by the step of its state: the run goes on from that where it is newer, and else the
    /// worker enters when it fits.
    fn place(
        &mut self,
        now: Instant,
        id: WorkerId,
        (step, rejoined_with_state): (u64, bool),
        commands: &mut Vec<Command>,
    ) {
        if self.term.is_rejoin_window_open() {
            return self.watch_rejoin_window(now, commands);
        }
        if step > self.progress.committed() && rejoined_with_state {
            return self.welcome_back(now, id, step, commands);
        }
        if step > self.progress.committed() && step <= self.stats.recorded() {
            // It started from a checkpoint newer than what the others fell back to.
            return self.roll_forward_to_held_state(now, id, step, commands);
        }
        if step < self.progress.committed() && self.is_only_saved(self.progress.committed()) {
            let reason = only_saved(self.progress.committed());
            return self.expel(now, id, reason, commands);
        }
        if !self.term.is_stopping() {
            self.regard_reach(now, commands);
            if self.may_bring_slots(id) {
                self.start_generation(now, commands);
            }
        } else if self.generation.is_waiting() {
            self.start_generation(now, commands);
        }
    }

    /// Why a worker with this state cannot go on with it here. It may come back as a newcomer.
    pub(super) fn foreign_state(&self, join: &v1::Join) -> Option<String> {
        let is_foreign = !join.job_digest.is_empty() && join.run != self.settings.run;
        is_foreign.then(|| {
            format!(
                "it holds the state of another run of this job ({} there, {} here)",
                membership::short(&join.run),
                membership::short(&self.settings.run)
            )
        })
    }
}
