//! Facts about single decisions, as events and the commands they lead to.

mod admission;
mod best_weights;
mod churn;
mod clock;
mod draining;
#[allow(clippy::unwrap_used)]
mod failure_detector;
mod joining;
#[allow(clippy::unwrap_used)]
mod pace;
#[allow(clippy::unwrap_used)]
mod probing;
mod recovery;
mod reply_deadlines;
mod state;
mod step;
mod transport;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::job::{JobSources, JobSpec, Method, SaveSteps};
use proto::v1;

use common::wire::{HEARTBEAT_INTERVAL, PlanKind};

use super::*;
use crate::cluster::parts::generation::LOSSES_GATHER;
use crate::cluster::run_event::RunEvent;

fn job(total_steps: u64, slots: u32) -> JobSpec {
    let flag = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
    let flags = [
        ("base_model", "model"),
        ("datasets.0.path", "data.jsonl"),
        ("output_dir", "out"),
    ];
    let job = common::job::load(JobSources {
        flags: flags.map(flag).to_vec(),
        ..JobSources::default()
    });
    JobSpec {
        sequence_len: 8,
        shuffle: false,
        method: Method::Full,
        global_batch_size: slots as usize,
        micro_batch_size: 1,
        max_steps: Some(total_steps),
        save_steps: SaveSteps::Every(3),
        eval_steps: Some(2),
        max_skipped_steps: 1,
        ..job.unwrap_or_else(|errors| panic!("{errors}"))
    }
}

/// `slots` blocks of one trained token for training, two for evaluation.
pub fn course(total_steps: u64, slots: u32) -> RunSchedule {
    course_of(job(total_steps, slots), slots)
}

fn course_of(job: JobSpec, slots: u32) -> RunSchedule {
    let block = BlockTokens {
        used: 4,
        trained: 1,
    };
    let blocks = vec![block; slots as usize + 2];
    RunSchedule::new(Arc::new(job), u64::from(slots), blocks)
}

fn settings() -> Settings {
    Settings {
        version: "1".into(),
        job_digest: "job".into(),
        run: "run".into(),
        earlier: PreviousTerms::default(),
        start_step: 0,
        start_weights_digest: None,
        start_numerics_class: None,
        last_evaluated: None,
        best: None,
        best_saved: None,
        min_workers: 1,
        max_workers: None,
        max_skipped_steps: 1,
        frozen_bytes: 0,
        flop_per_token: None,
    }
}

fn join(worker: WorkerId) -> Event {
    join_with(worker, |_| ())
}

/// The same for a worker that differs in what `change` sets.
fn join_with(worker: WorkerId, change: impl FnOnce(&mut v1::Join)) -> Event {
    let mut join = v1::Join {
        version: "1".into(),
        name: format!("w{}", worker.0),
        numerics_class: "cpu".into(),
        ..Default::default()
    };
    change(&mut join);
    let address = format!("10.0.0.{}:9", worker.0);
    Event::WorkerJoined {
        worker,
        join,
        address,
    }
}

fn ready(worker: WorkerId, step: u64) -> Event {
    let ready = v1::Ready {
        step,
        layout_digest: "layout".into(),
        trainable_scalars: 10,
        weights_digest: format!("weights-{step}"),
        job_digest: "job".into(),
        total_scalars: 10,
        updates: Vec::new(),
    };
    Event::WorkerReady { worker, ready }
}

/// What a person would say of a command; None for what is only for the terminal.
fn describe(command: &Command) -> Option<String> {
    let numbers = |list: &[u32]| {
        let words: Vec<String> = list.iter().map(u32::to_string).collect();
        words.join(" ")
    };
    Some(match command {
        Command::Welcome { worker } => format!("w{} welcome", worker.0),
        Command::SendGeneration {
            worker, generation, ..
        } => format!(
            "w{} generation {} at {} of [{}] behind [{}]{}{}",
            worker.0,
            generation.generation,
            generation.step,
            numbers(
                &generation
                    .members
                    .iter()
                    .map(|m| m.worker as u32)
                    .collect::<Vec<_>>()
            ),
            numbers(&generation.behind),
            match generation.fed.as_slice() {
                [] => String::new(),
                fed => format!(" fed [{}]", numbers(fed)),
            },
            if generation.nccl { " over NCCL" } else { "" }
        ),
        Command::SendProbe { .. } => return None,
        Command::SendAside { worker, aside } => format!("w{} aside: {}", worker.0, aside.reason),
        Command::SendNcclId { worker, .. } => format!("w{} NCCL id", worker.0),
        Command::SendFollow { worker, follow } => format!(
            "w{} follow {} of w{} from {}",
            worker.0,
            follow.attempt,
            follow.source.as_ref().map_or(0, |source| source.worker),
            follow.step
        ),
        Command::SendFeed { worker, feed } => {
            format!("w{} feed {} to w{}", worker.0, feed.attempt, feed.worker)
        }
        Command::SendPlan { worker, plan } => {
            let kind = if plan.kind == 1 { "train" } else { "eval" };
            let clear = if plan.clear { " clear" } else { "" };
            format!("w{} plan {kind} {}{clear}", worker.0, plan.step)
        }
        Command::SendLease { worker, lease } => {
            format!("w{} lease [{}]", worker.0, numbers(&lease.slots))
        }
        Command::SendWithdraw { worker, withdraw } => {
            format!("w{} withdraw [{}]", worker.0, numbers(&withdraw.slots))
        }
        Command::SendExchange { worker, exchange } => {
            format!("w{} exchange {}", worker.0, exchange.step)
        }
        Command::RequestState { worker, step, last } => {
            format!(
                "w{} save {step}{}",
                worker.0,
                if *last { " last" } else { "" }
            )
        }
        Command::StoreBest { best, step } => format!("result of {best} after {step}"),
        Command::SendFinish { worker, finish } => {
            format!(
                "w{} finish{}",
                worker.0,
                if finish.failed { " failed" } else { "" }
            )
        }
        Command::Refuse { worker, reason } => format!("w{} refuse: {reason}", worker.0),
        Command::Expel { worker, reason } => format!("w{} expel: {reason}", worker.0),
        Command::Emit(RunEvent::StepCommitted(record)) => {
            format!("committed {} loss {}", record.step, record.loss)
        }
        Command::Emit(RunEvent::WaitingForWorkers { have, need }) => {
            format!("waiting {have} of {need}")
        }
        Command::Emit(_) => return None,
        Command::End(outcome) => format!("end {outcome:?}"),
    })
}

/// A cluster of four slots a step, six steps, at a fixed time.
struct Scene {
    cluster: Cluster,
    now: Instant,
    /// Pairs of which the first does not reach the second.
    unreached: std::collections::BTreeSet<(u64, u64)>,
    /// All that was said so far.
    notices: Vec<String>,
}

impl Scene {
    fn new(change: impl FnOnce(&mut Settings)) -> Self {
        Self::of_course(course(6, 4), change)
    }

    fn of_course(course: RunSchedule, change: impl FnOnce(&mut Settings)) -> Self {
        let mut settings = settings();
        change(&mut settings);
        Self {
            cluster: Cluster::new(settings, course),
            now: Instant::now(),
            unreached: Default::default(),
            notices: Vec::new(),
        }
    }

    /// Workers 1 to `count` have joined, are ready and have entered their generation.
    fn with_workers(count: u64) -> Self {
        Self::with(count, |settings| settings.min_workers = count as usize)
    }

    fn with(count: u64, change: impl FnOnce(&mut Settings)) -> Self {
        let mut scene = Self::new(change);
        for id in 1..=count {
            scene.after(join(WorkerId(id)));
            scene.after(ready(WorkerId(id), 0));
        }
        for id in 1..=count {
            scene.after(entered(id, 1, 0, &[]));
        }
        // Losses from here on are no part of how the generation began.
        scene.now += LOSSES_GATHER;
        scene
    }

    /// Probes are answered at once.
    fn after(&mut self, event: Event) -> Vec<String> {
        let mut commands = self.handle(event);
        let mut next = 0;
        while let Some(command) = commands.get(next) {
            next += 1;
            if let Command::SendProbe { worker, probe } = command {
                let answer = self.answer(*worker, probe);
                commands.extend(self.handle(answer));
            }
        }
        commands.iter().filter_map(describe).collect()
    }

    fn handle(&mut self, event: Event) -> Vec<Command> {
        let mut commands = Vec::new();
        self.cluster.handle(self.now, event, &mut commands);
        self.notices
            .extend(commands.iter().filter_map(|command| match command {
                Command::Emit(RunEvent::Notice(text)) => Some(text.clone()),
                _ => None,
            }));
        commands
    }

    fn answer(&self, worker: WorkerId, probe: &v1::Probe) -> Event {
        let members = probe.members.iter().map(|member| member.worker);
        let unreached = members.filter(|member| self.unreached.contains(&(worker.0, *member)));
        let unreached = unreached.map(|worker| v1::Unreached {
            worker,
            reason: "connection timed out".into(),
        });
        let probed = v1::Probed {
            number: probe.number,
            unreached: unreached.collect(),
        };
        Event::Probed { worker, probed }
    }

    /// Time passes, and whoever is not in `silent` sends its heartbeats.
    fn pass(&mut self, time: Duration, silent: &[u64]) -> Vec<String> {
        let until = self.now + time;
        let mut all = Vec::new();
        while self.now < until {
            let woken = self.cluster.wakes_at().unwrap_or(until);
            self.now = woken.min(self.now + HEARTBEAT_INTERVAL / 2).min(until);
            for worker in self.cluster.members.ids() {
                if !silent.contains(&worker.0) {
                    all.extend(self.after(Event::Heard { worker }));
                }
            }
            all.extend(self.after(Event::Ticked));
        }
        all
    }

    fn check(&mut self, event: Event, expected: &[&str]) {
        assert_eq!(self.after(event), expected);
    }

    /// Two workers compute the four slots of step 0 as they were leased; the exchange is ordered.
    fn exchanging() -> Self {
        let mut scene = Self::with_workers(2);
        scene.cluster.settings.min_workers = 1;
        for (worker, slot) in [(1, 0), (1, 1), (2, 2)] {
            scene.after(done(worker, 0, slot));
        }
        let commands = scene.after(done(2, 0, 3));
        assert_eq!(commands[..2], ["w1 exchange 0", "w2 exchange 0"]);
        scene
    }
}

fn entered(id: u64, generation: u64, step: u64, held: &[u32]) -> Event {
    let entered = v1::Entered {
        generation,
        step,
        held: held.iter().map(|slot| held_slot(*slot)).collect(),
    };
    let worker = WorkerId(id);
    Event::WorkerEntered { worker, entered }
}

/// As [`done`] computes it.
fn held_slot(slot: u32) -> v1::HeldSlot {
    v1::HeldSlot {
        slot,
        loss_sum: f64::from(slot),
        trained_tokens: 1,
        correct_tokens: 1,
        invalid_scalars: 0,
    }
}

fn done(id: u64, step: u64, slot: u32) -> Event {
    let done = v1::SlotDone {
        generation: 1,
        step,
        kind: PlanKind::Train.to_wire(),
        slot,
        loss_sum: f64::from(slot),
        trained_tokens: 1,
        correct_tokens: 1,
        compute_us: 0,
        invalid_scalars: 0,
    };
    let worker = WorkerId(id);
    Event::SlotDone { worker, done }
}

/// The same after so many microseconds of work.
fn done_after(id: u64, step: u64, slot: u32, compute_us: u64) -> Event {
    let Event::SlotDone { worker, mut done } = done(id, step, slot) else {
        unreachable!("done makes a SlotDone")
    };
    done.compute_us = compute_us;
    Event::SlotDone { worker, done }
}

/// Of the first step.
fn withdrawn(id: u64, slots: &[u32]) -> Event {
    let withdrawn = v1::Withdrawn {
        generation: 1,
        step: 0,
        kind: PlanKind::Train.to_wire(),
        slots: slots.to_vec(),
    };
    let worker = WorkerId(id);
    Event::SlotsWithdrawn { worker, withdrawn }
}

fn reported(id: u64, step: u64, digest: &str) -> Event {
    let report = v1::StepReport {
        generation: 1,
        step,
        weights_digest: digest.to_owned(),
        ..Default::default()
    };
    let worker = WorkerId(id);
    Event::StepReported { worker, report }
}

fn lost(id: u64) -> Event {
    let reason = "killed".to_owned();
    let worker = WorkerId(id);
    Event::WorkerLost { worker, reason }
}

fn draining(id: u64) -> Event {
    Event::WorkerDraining {
        worker: WorkerId(id),
        reason: "it was asked to stop".into(),
    }
}

fn stored(step: u64) -> Event {
    Event::StateStored {
        step,
        path: "somewhere".into(),
        weights_digest: "a".into(),
        is_result: false,
    }
}

/// The result of a run that ends after `step` updates.
fn result_stored(step: u64) -> Event {
    Event::StateStored {
        step,
        path: "somewhere".into(),
        weights_digest: "a".into(),
        is_result: true,
    }
}
