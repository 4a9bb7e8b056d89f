//! Departures: workers that leave, are lost or are expelled are taken out of everything that the cluster knows.

use std::time::Instant;

use crate::cluster::Cluster;
use crate::cluster::command::Command;
use crate::cluster::event::WorkerId;
use crate::cluster::run_event::RunEvent;

impl Cluster {
    /// A worker left, or its session ended.
    pub(super) fn lose(
        &mut self,
        now: Instant,
        id: WorkerId,
        reason: String,
        commands: &mut Vec<Command>,
    ) {
        if self.members.get(id).is_none() {
            return;
        }
        self.forget(id, &reason, commands);
        self.reconfigure_if_member_lost(now, commands);
        if self.generation.is_waiting() && self.probing.keeps_out() {
            // Whoever waited because of it waits no more.
            self.regard_reach(now, commands);
        }
    }

    /// Ends the session of a worker that broke the rules or computes wrongly.
    pub(super) fn expel(
        &mut self,
        now: Instant,
        id: WorkerId,
        reason: String,
        commands: &mut Vec<Command>,
    ) {
        if self.members.get(id).is_none() {
            return;
        }
        self.forget(id, &reason, commands);
        commands.push(Command::Expel { worker: id, reason });
        self.reconfigure_if_member_lost(now, commands);
    }

    /// Takes a worker out of everything that the cluster knows, and frees its slots. The generation goes on under its number.
    pub(super) fn forget(&mut self, id: WorkerId, reason: &str, commands: &mut Vec<Command>) {
        let Some(worker) = self.members.get(id) else {
            return;
        };
        let name = worker.name.clone();
        let was_member = self.members.rank_of(id).is_some();
        self.members.remove(id);
        self.progress.release(id);
        self.saving.worker_lost(id);
        self.failure_detector.forget(id);
        self.reply_deadlines.forget(id);
        self.probing.forget(id);
        self.slot_times.forget(id);
        if was_member {
            self.generation.lose_member();
        }
        self.end_feeds(id);
        commands.push(Command::Emit(RunEvent::WorkerLost {
            worker: id.0,
            name,
            reason: reason.to_owned(),
            workers: self.members.count(),
        }));
    }
}
