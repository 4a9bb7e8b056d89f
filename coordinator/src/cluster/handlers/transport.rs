//! The transport of gradients: NCCL where every member can, else TCP. The choice is one for all members of a generation.
//!
//! In: what members said of their GPUs when they joined, and failures of NCCL. Out: each generation's transport, and the
//! identifier of its communicator on its way from rank 0 to all. A failure that turns out to be a lost member's is not held
//! against NCCL; any other one ends its use for this term.

use std::collections::BTreeMap;
use std::time::Instant;

use proto::v1;

use crate::cluster::Cluster;
use crate::cluster::command::Command;
use crate::cluster::event::WorkerId;
use crate::cluster::parts::membership::Worker;
use crate::cluster::run_event::RunEvent;

/// Characters kept of a worker's reason for a failure of NCCL.
const MAX_REASON_CHARS: usize = 256;

impl Cluster {
    /// Decides how the members of a generation that is about to begin exchange.
    pub(super) fn choose_transport(
        &mut self,
        generation: &mut v1::Generation,
        commands: &mut Vec<Command>,
    ) {
        let ranks = self.members.ranks().iter();
        let members: Vec<&Worker> = ranks.filter_map(|id| self.members.get(*id)).collect();
        let has_gpus = members.iter().any(|member| member.gpu.is_some());
        let given_up = self.transport.given_up().map(str::to_owned);
        let refusal = given_up.or_else(|| obstacle(&members));
        generation.nccl = refusal.is_none();
        generation.tcp_because = refusal.filter(|_| has_gpus).unwrap_or_default();
        let reason = &generation.tcp_because;
        // Whoever is alone exchanges with nobody, and there is nothing to tell yet.
        if members.len() > 1 && !reason.is_empty() && self.transport.takes_reason(reason) {
            let text = format!("gradients are exchanged over TCP: {reason}");
            commands.push(Command::Emit(RunEvent::Notice(text)));
        }
        self.transport.begin(generation.nccl);
    }

    /// Sends all members the identifier of the communicator, which rank 0 made.
    pub(super) fn nccl_identified(
        &mut self,
        now: Instant,
        id: WorkerId,
        nccl_id: &v1::NcclId,
        commands: &mut Vec<Command>,
    ) {
        if !self.generation.is_at(nccl_id.generation) {
            return;
        }
        if !self.transport.awaits_identifier() || self.members.rank_of(id) != Some(0) {
            let reason = "it sent an identifier for NCCL that was not due".to_owned();
            return self.expel(now, id, reason, commands);
        }
        self.transport.note_identified();
        let send = |&worker| Command::SendNcclId {
            worker,
            nccl_id: nccl_id.clone(),
        };
        commands.extend(self.members.ranks().iter().map(send));
    }

    /// Notes that NCCL failed on a member; it is judged a moment later.
    pub(super) fn nccl_lost(&mut self, now: Instant, id: WorkerId, lost: &v1::NcclLost) {
        let is_current = self.generation.is_at(lost.generation);
        if is_current && self.transport.is_nccl() && self.members.rank_of(id).is_some() {
            let reason: String = lost.reason.chars().take(MAX_REASON_CHARS).collect();
            let reason = format!("NCCL failed on {}: {reason}", self.members.name(id));
            self.transport.note_failure(now, reason);
        }
    }

    /// When a failure of NCCL may be judged.
    pub(super) fn nccl_is_judged_at(&self) -> Option<Instant> {
        let (since, at) = self.transport.failure()?;
        let may_be_judged =
            self.all_heard_since(since) || self.failure_detector.looked() < Some(at);
        may_be_judged.then_some(at)
    }

    /// Goes on over TCP where NCCL failed and every member is still there: each was heard since.
    pub(super) fn judge_nccl(&mut self, now: Instant, commands: &mut Vec<Command>) {
        let failure = self.transport.failure();
        // Who was not heard since is heard of soon, or expelled.
        if failure.is_some_and(|(since, at)| at <= now && self.all_heard_since(since)) {
            self.transport.give_up();
            self.start_generation(now, commands);
        }
    }

    fn all_heard_since(&self, since: Instant) -> bool {
        let mut members = self.members.ranks().iter();
        members.all(|id| {
            self.failure_detector
                .heard_at(*id)
                .is_some_and(|heard| heard > since)
        })
    }
}

/// Why these workers cannot exchange over NCCL.
fn obstacle(members: &[&Worker]) -> Option<String> {
    if members.len() < 2 {
        return Some("there is only one worker".to_owned());
    }
    let mut at_gpu = BTreeMap::new();
    let mut first: Option<(&str, u32)> = None;
    for member in members {
        let name = member.name.as_str();
        let Some(gpu) = &member.gpu else {
            return Some(format!("{name} computes on the processor"));
        };
        if gpu.nccl_version == 0 {
            return Some(format!("{name} has no NCCL: {}", gpu.nccl_fault));
        }
        let (other, version) = *first.get_or_insert((name, gpu.nccl_version));
        if version != gpu.nccl_version {
            let (here, there) = (dotted(version), dotted(gpu.nccl_version));
            return Some(format!("{other} has NCCL {here} but {name} has {there}"));
        }
        if let Some(other) = at_gpu.insert(gpu.uuid.as_str(), name) {
            return Some(format!("{other} and {name} share a GPU"));
        }
    }
    None
}

/// NCCL's version number as text: 22703 is `2.27.3`.
fn dotted(version: u32) -> String {
    format!(
        "{}.{}.{}",
        version / 10_000,
        version / 100 % 100,
        version % 100
    )
}
