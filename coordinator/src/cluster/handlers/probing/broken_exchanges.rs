//! Broken exchanges whose ends both still talk to the coordinator: the members try each other, and the exchange is made again.
//!
//! In: accusations and time. Out: probes, and a pair's failure where its exchange breaks again and again.

use std::collections::BTreeSet;
use std::time::Instant;

use proto::v1;

use crate::cluster::Cluster;
use crate::cluster::command::Command;
use crate::cluster::event::WorkerId;
use crate::cluster::parts::probing::broken_exchanges::Accusation;
use crate::cluster::parts::probing::probes::MAX_PROBED;
use crate::cluster::run_event::RunEvent;

/// Characters kept of a worker's reason for a broken exchange.
const MAX_REASON_CHARS: usize = 200;

impl Cluster {
    /// A member says that an exchange of this generation broke, and because of whom. Two that lost each other leave it open which
    /// of them is cut off, so the others try too.
    pub(in crate::cluster::handlers) fn peer_lost(
        &mut self,
        now: Instant,
        id: WorkerId,
        lost: &v1::PeerLost,
        commands: &mut Vec<Command>,
    ) {
        if !self.generation.is_at(lost.generation) {
            return;
        }
        let Some(&accused) = self.members.ranks().get(lost.rank as usize) else {
            let reason = "it blames a peer that does not exist".to_owned();
            return self.expel(now, id, reason, commands);
        };
        let accusation = Accusation {
            by: id,
            of: accused,
            reason: lost.reason.chars().take(MAX_REASON_CHARS).collect(),
        };
        if self.probing.accuse(now, accusation) {
            self.try_circle(now, id, accused, commands);
        }
    }

    /// Has two members that lost each other, and some of the others, all try each other.
    fn try_circle(
        &mut self,
        now: Instant,
        id: WorkerId,
        accused: WorkerId,
        commands: &mut Vec<Command>,
    ) {
        // Members first: it is their exchange.
        let mut others = self.members.ranks().to_vec();
        let newcomers = self.members.ids().into_iter();
        others.extend(newcomers.filter(|one| self.members.rank_of(*one).is_none()));
        others.retain(|one| *one != id && *one != accused);
        let step = others.len().div_ceil(MAX_PROBED - 2).max(1);
        let mut circle = BTreeSet::from([id, accused]);
        circle.extend(others.into_iter().step_by(step));
        self.probing.note_tried(&circle);
        for from in &circle {
            let to: Vec<WorkerId> = circle.iter().copied().filter(|to| to != from).collect();
            self.probe(now, *from, &to, None, commands);
        }
    }

    pub(super) fn mend_if_due(&mut self, now: Instant, commands: &mut Vec<Command>) {
        if let Some(accusations) = self.probing.take_broken(now) {
            self.mend(now, &accusations, commands);
        }
    }

    /// Makes a broken exchange anew in a new generation. A pair whose exchange breaks time after time counts as unable to
    /// reach each other.
    fn mend(&mut self, now: Instant, accusations: &[Accusation], commands: &mut Vec<Command>) {
        let outsiders = self.outsiders();
        let is_explained = self.members.ranks().iter().any(|id| outsiders.contains(id));
        // Where the probes found a pair that is cut off, nobody else is to blame: the others waited for those two.
        let accusations = match is_explained {
            true => &[],
            false => accusations,
        };
        let mut news = BTreeSet::new();
        for accusation in accusations {
            let Accusation { by, of, .. } = accusation;
            let is_here = |id: &WorkerId| self.members.rank_of(*id).is_some();
            if !is_here(by) || !is_here(of) {
                continue;
            }
            if news.insert((*by.min(of), *by.max(of))) {
                self.probing.count_break(accusation);
            }
        }
        if let Some(Accusation { by, of, reason }) = accusations.first()
            && !news.is_empty()
        {
            let text = format!(
                "the exchange broke: worker {} says of worker {} at {}: {reason}; it is made again",
                self.members.name(*by),
                self.members.name(*of),
                self.address_of(*of)
            );
            commands.push(Command::Emit(RunEvent::Notice(text)));
        }
        let generation = self.generation.number();
        self.regard_reach(now, commands);
        if self.generation.is_at(generation) && !self.generation.has_lost_member() {
            self.start_generation(now, commands);
        }
    }
}
