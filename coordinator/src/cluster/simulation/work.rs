//! What a toy does when its turn comes: it hears a command, says what it has to say, computes a slot, exchanges, or hands
//! its state over.

use common::wire::PlanKind;
use proto::v1;

use super::super::tests::ready;
use super::super::{Command, Event, WorkerId};
use super::toy::{Exchange, Task, held};
use super::{SLOTS, World};

impl World {
    pub(super) fn deliver_up(&mut self, id: WorkerId) {
        let event = self.toys.get_mut(&id).and_then(|toy| toy.up.pop_front());
        if let Some(event) = event {
            self.handle(event);
        }
    }

    pub(super) fn deliver_down(&mut self, id: WorkerId) {
        let stored = self.stored;
        let Some(toy) = self.toys.get_mut(&id) else {
            return;
        };
        match toy.down.pop_front() {
            Some(Command::Welcome { .. }) if toy.rejoined_with_state => {}
            Some(Command::Welcome { .. }) => toy.step = stored,
            Some(Command::SendGeneration {
                rank, generation, ..
            }) => toy.enter(v1::Generation {
                rank,
                ..(*generation).clone()
            }),
            Some(Command::SendProbe { probe, .. }) => {
                let probed = v1::Probed {
                    number: probe.number,
                    unreached: Vec::new(),
                };
                toy.up.push_back(Event::Probed { worker: id, probed });
            }
            Some(Command::SendFollow { follow, .. }) => toy.feeds.follow(follow),
            Some(Command::SendFeed { feed, .. }) => toy.feeds.begin(feed, toy.step),
            Some(Command::SendPlan { plan, .. }) => {
                assert!(plan.step <= toy.step + 1, "a plan from the future");
                if plan.clear && plan.generation == toy.generation_number() {
                    toy.accumulator.clear();
                }
            }
            Some(Command::SendLease { lease, .. }) => {
                let current = toy.generation.as_ref().map(|g| g.generation);
                if current == Some(lease.generation) {
                    let kind = PlanKind::from_wire(lease.kind).unwrap_or(PlanKind::Eval);
                    let step = lease.step;
                    let task = |slot| Task::Slot { step, kind, slot };
                    toy.tasks.extend(lease.slots.into_iter().map(task));
                }
            }
            Some(Command::SendWithdraw { withdraw, .. }) => toy.give_back(&withdraw),
            Some(Command::SendExchange { exchange, .. }) => {
                let v1::Exchange { generation, step } = exchange;
                if toy.generation.as_ref().map(|g| g.generation) == Some(generation) {
                    toy.tasks.push_back(Task::Exchange { generation, step });
                }
            }
            Some(Command::RequestState { step, .. }) => toy.saves.push(step),
            _ => {}
        }
    }

    pub(super) fn work(&mut self, id: WorkerId) {
        self.receive_state(id);
        self.follow(id);
        self.save(id);
        let Some(toy) = self.toys.get_mut(&id) else {
            return;
        };
        if !toy.ready {
            if toy.down.is_empty() {
                toy.ready = true;
                let mut event = ready(id, toy.step);
                if let Event::WorkerReady { ready, .. } = &mut event {
                    ready.updates.clone_from(&toy.updates);
                }
                toy.up.push_back(event);
            }
            return;
        }
        if toy.receiving {
            return;
        }
        if let Some(exchange) = toy.exchanging {
            return self.finish_exchange(id, exchange);
        }
        match toy.tasks.pop_front() {
            Some(Task::Slot { step, kind, slot }) => {
                // It may be too late to abandon it.
                let abandons = toy.abandons.take() == Some(slot) && self.rng.below(2) == 0;
                match abandons {
                    true => toy.say_withdrawn(step, kind, vec![slot]),
                    false => toy.compute(step, kind, slot),
                }
            }
            Some(Task::Exchange { generation, step }) => {
                assert_eq!(toy.step, step, "an exchange of another step");
                let exchange = (toy.term, generation, step);
                toy.exchanging = Some(exchange);
                let own = toy.accumulator.clone();
                self.exchanges.entry(exchange).or_default().insert(id, own);
            }
            None => {}
        }
    }

    /// Completes at this worker once all members have put in, whether or not the others still live.
    fn finish_exchange(&mut self, id: WorkerId, exchange: Exchange) {
        let parts = &self.exchanges[&exchange];
        if self.members[&(exchange.0, exchange.1)]
            .iter()
            .any(|m| !parts.contains_key(m))
        {
            return;
        }
        let mut all: Vec<u32> = parts.values().flatten().copied().collect();
        all.sort();
        let every: Vec<u32> = (0..SLOTS).collect();
        assert_eq!(all, every, "seed {}: exchange {exchange:?}", self.seed);
        if let Some(toy) = self.toys.get_mut(&id) {
            let slots = every.iter().map(|slot| held(*slot, toy.step)).collect();
            toy.step += 1;
            toy.accumulator.clear();
            toy.exchanging = None;
            toy.feeds.publish(toy.step);
            let report = v1::StepReport {
                generation: exchange.1,
                step: toy.step,
                weights_digest: format!("weights-{}", toy.step),
                ..Default::default()
            };
            toy.updates.push(v1::Update {
                report: Some(report.clone()),
                slots,
            });
            toy.up.push_back(Event::StepReported { worker: id, report });
        }
    }

    fn receive_state(&mut self, id: WorkerId) {
        let Some(toy) = self.toys.get(&id).filter(|toy| toy.receiving) else {
            return;
        };
        let Some(generation) = toy.generation.clone() else {
            return;
        };
        let source = WorkerId(generation.members[generation.source as usize].worker);
        let gives = self.toys.get(&source).is_some_and(|source| {
            source.step == generation.step && source.generation_number() == generation.generation
        });
        if gives && let Some(toy) = self.toys.get_mut(&id) {
            toy.step = generation.step;
            toy.accumulator.clear();
            toy.feeds.end();
            toy.receiving = false;
            toy.say_entered(generation.generation);
        }
    }

    fn save(&mut self, id: WorkerId) {
        let Some(toy) = self.toys.get_mut(&id) else {
            return;
        };
        // Where a step's report is lost but its state is not, the step's record is lost too.
        let unreported = |event: &Event| matches!(event, Event::StepReported { .. });
        // Without a session nobody takes it.
        if toy.up.iter().any(unreported) || toy.away_until.is_some() {
            return;
        }
        let Some(position) = toy.saves.iter().position(|step| *step == toy.step) else {
            return;
        };
        if !self.disk.may_store(toy.step, &self.committed) {
            return;
        }
        let step = toy.saves.remove(position);
        self.stored = self.stored.max(step);
        let path = format!("checkpoint-{step}").into();
        self.handle(Event::StateStored {
            step,
            path,
            weights_digest: format!("weights-{step}"),
        });
    }
}
