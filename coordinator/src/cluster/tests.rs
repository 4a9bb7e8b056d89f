//! Facts about single decisions, as events and the commands they lead to.

use std::sync::Arc;

use common::job::{
    BaseDtype, ClusterSpec, InitWeights, JobSpec, LrScheduler, Method, Reduction, Resume,
    ValSetSize, Warmup,
};
use proto::v1;

use common::wire::PlanKind;

use super::*;
use crate::events::RunEvent;

pub fn job(total_steps: u64, slots: u32) -> JobSpec {
    JobSpec {
        base_model: "model".into(),
        model_revision: None,
        init_weights: InitWeights::Pretrained,
        base_dtype: BaseDtype::Float32,
        datasets: Vec::new(),
        val_set_size: ValSetSize::None,
        sequence_len: 8,
        sample_packing: true,
        train_on_inputs: false,
        shuffle: false,
        method: Method::Full,
        global_batch_size: slots as usize,
        micro_batch_size: 1,
        num_epochs: 1.0,
        max_steps: Some(total_steps),
        learning_rate: 0.5,
        lr_scheduler: LrScheduler::Constant,
        warmup: Warmup::Steps(0),
        adam_beta1: 0.9,
        adam_beta2: 0.999,
        adam_epsilon: 1e-8,
        weight_decay: 0.0,
        max_grad_norm: None,
        gradient_checkpointing: false,
        seed: 42,
        logging_steps: 1,
        save_steps: Some(3),
        save_total_limit: None,
        eval_steps: Some(2),
        max_skipped_steps: 1,
        output_dir: "out".into(),
        resume: Resume::Auto,
        reduction: Reduction::Exact,
        cluster: ClusterSpec {
            min_workers: 1,
            max_workers: None,
        },
        test_prompts: Vec::new(),
    }
}

/// `slots` blocks of one trained token for training, two for evaluation.
pub fn course(total_steps: u64, slots: u32) -> Course {
    let block = BlockTokens {
        used: 4,
        trained: 1,
    };
    let blocks = vec![block; slots as usize + 2];
    Course::new(Arc::new(job(total_steps, slots)), u64::from(slots), blocks)
}

pub fn settings() -> Settings {
    Settings {
        version: "1".into(),
        job_digest: "job".into(),
        start_step: 0,
        start_weights_digest: None,
        start_numerics_class: None,
        min_workers: 1,
        max_workers: None,
        max_skipped_steps: 1,
    }
}

pub fn join(worker: WorkerId) -> Event {
    let join = v1::Join {
        version: "1".into(),
        name: format!("w{}", worker.0),
        numerics_class: "cpu".into(),
        ..Default::default()
    };
    let address = format!("10.0.0.{}:9", worker.0);
    Event::WorkerJoined {
        worker,
        join,
        address,
    }
}

pub fn ready(worker: WorkerId, step: u64) -> Event {
    let ready = v1::Ready {
        step,
        layout_digest: "layout".into(),
        trainable_scalars: 10,
        weights_digest: format!("weights-{step}"),
        job_digest: "job".into(),
        total_scalars: 10,
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
        Command::SendGeneration { worker, generation } => format!(
            "w{} generation {} at {} of [{}] behind [{}]",
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
        ),
        Command::SendPlan { worker, plan } => {
            let kind = if plan.kind == 1 { "train" } else { "eval" };
            format!("w{} plan {kind} {}", worker.0, plan.step)
        }
        Command::SendLease { worker, lease } => {
            format!("w{} lease [{}]", worker.0, numbers(&lease.slots))
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
}

impl Scene {
    fn new(change: impl FnOnce(&mut Settings)) -> Self {
        let mut settings = settings();
        change(&mut settings);
        Self {
            cluster: Cluster::new(settings, course(6, 4)),
            now: Instant::now(),
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
        scene
    }

    fn after(&mut self, event: Event) -> Vec<String> {
        let mut commands = Vec::new();
        self.cluster.handle(self.now, event, &mut commands);
        commands.iter().filter_map(describe).collect()
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
        held: held.to_vec(),
    };
    let worker = WorkerId(id);
    Event::WorkerEntered { worker, entered }
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
        compute_us: 1,
    };
    let worker = WorkerId(id);
    Event::SlotDone { worker, done }
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

fn stored(step: u64) -> Event {
    Event::StateStored {
        step,
        path: "somewhere".into(),
        weights_digest: "a".into(),
    }
}

#[test]
fn a_mismatch_at_the_door_names_both_sides() {
    let other = |change: fn(&mut v1::Join)| {
        let Event::WorkerJoined {
            mut join, address, ..
        } = join(WorkerId(2))
        else {
            unreachable!("join makes a WorkerJoined")
        };
        change(&mut join);
        let worker = WorkerId(2);
        Event::WorkerJoined {
            worker,
            join,
            address,
        }
    };
    let mut scene = Scene::new(|_| {});
    scene.check(join(WorkerId(1)), &["w1 welcome"]);
    scene.check(
        other(|join| join.version = "2".into()),
        &[
            "w2 refuse: worker w2 runs Muster 2 but the coordinator runs 1; install the same version on both",
        ],
    );
    scene.check(
        other(|join| join.numerics_class = "gpu".into()),
        &[
            "w2 refuse: worker w2 is of numerics class gpu but this run is of class cpu; workers of different classes \
             would not give the same bits",
        ],
    );
    scene.check(
        other(|join| join.job_digest = "another".into()),
        &["w2 refuse: worker w2 holds the state of job another but this coordinator runs job job"],
    );
}

#[test]
fn a_worker_that_loaded_something_else_is_refused() {
    let mut scene = Scene::new(|settings| settings.min_workers = 3);
    for id in 1..=2 {
        scene.after(join(WorkerId(id)));
    }
    scene.after(ready(WorkerId(1), 0));
    let Event::WorkerReady { worker, mut ready } = ready(WorkerId(2), 0) else {
        unreachable!("ready makes a WorkerReady")
    };
    ready.layout_digest = "wider".into();
    scene.check(
        Event::WorkerReady { worker, ready },
        &["w2 refuse: worker w2 has the trainable layout wider but worker w1 has layout"],
    );
}

#[test]
fn the_first_generation_waits_for_min_workers() {
    let mut scene = Scene::new(|settings| settings.min_workers = 2);
    scene.check(Event::Ticked, &["waiting 0 of 2"]);
    scene.after(join(WorkerId(1)));
    scene.check(ready(WorkerId(1), 0), &[]);
    scene.after(join(WorkerId(2)));
    scene.check(
        ready(WorkerId(2), 0),
        &[
            "w1 generation 1 at 0 of [1 2] behind []",
            "w2 generation 1 at 0 of [1 2] behind []",
        ],
    );
    scene.check(
        entered(1, 1, 0, &[]),
        &["w1 plan train 0", "w1 lease [0]", "w1 lease [1]"],
    );
}

#[test]
fn each_finished_slot_brings_the_next() {
    let mut scene = Scene::with_workers(1);
    scene.check(done(1, 0, 0), &["w1 lease [2]"]);
    scene.check(done(1, 0, 1), &["w1 lease [3]"]);
    scene.check(done(1, 0, 2), &[]);
}

#[test]
fn the_next_plan_goes_out_with_the_exchange() {
    let mut scene = Scene::with_workers(1);
    for slot in 0..3 {
        scene.after(done(1, 0, slot));
    }
    scene.check(
        done(1, 0, 3),
        &[
            "w1 exchange 0",
            "w1 plan train 1",
            "w1 lease [0]",
            "w1 lease [1]",
        ],
    );
    scene.check(reported(1, 1, "a"), &["committed 1 loss 1.5"]);
}

#[test]
fn a_lost_worker_costs_only_its_own_slots() {
    let mut scene = Scene::with_workers(2);
    scene.cluster.settings.min_workers = 1;
    scene.after(done(1, 0, 0));
    scene.check(lost(2), &["w1 generation 2 at 0 of [1] behind []"]);
    // Slot 1 was leased to worker 1 but not begun; 2 and 3 were worker 2's.
    scene.check(
        entered(1, 2, 0, &[0]),
        &["w1 plan train 0", "w1 lease [1]", "w1 lease [2]"],
    );
}

#[test]
fn a_slot_stays_with_its_worker_until_it_has_entered() {
    let mut scene = Scene::with_workers(3);
    scene.cluster.settings.min_workers = 1;
    // Worker 1 has 0 and 1, worker 2 has 2 and 3.
    scene.after(done(2, 0, 2));
    scene.after(lost(3));
    scene.check(entered(2, 2, 0, &[2]), &["w2 plan train 0", "w2 lease [3]"]);
    let late = done(1, 0, 0);
    scene.check(late, &[]);
    scene.check(entered(1, 2, 0, &[0]), &["w1 plan train 0", "w1 lease [1]"]);
}

#[test]
fn a_death_before_the_first_report_repeats_the_exchange_without_recomputing() {
    let mut scene = Scene::exchanging();
    scene.check(lost(2), &["w1 generation 2 at 0 of [1] behind []"]);
    scene.check(
        entered(1, 2, 0, &[0, 1]),
        &["w1 plan train 0", "w1 lease [2]", "w1 lease [3]"],
    );
}

#[test]
fn a_death_after_the_first_report_sends_state_to_who_is_behind() {
    let mut scene = Scene::with_workers(3);
    scene.cluster.settings.min_workers = 1;
    for (worker, slot) in [(1, 0), (1, 1), (2, 2), (2, 3)] {
        scene.after(done(worker, 0, slot));
    }
    scene.after(reported(2, 1, "a"));
    scene.check(
        lost(1),
        &[
            "committed 1 loss 1.5",
            "w2 generation 2 at 1 of [2 3] behind [1]",
            "w3 generation 2 at 1 of [2 3] behind [1]",
        ],
    );
}

#[test]
fn a_report_that_comes_after_the_new_generation_still_commits() {
    let mut scene = Scene::with_workers(3);
    scene.cluster.settings.min_workers = 1;
    for (worker, slot) in [(1, 0), (1, 1), (2, 2), (2, 3)] {
        scene.after(done(worker, 0, slot));
    }
    scene.check(
        lost(1),
        &[
            "w2 generation 2 at 0 of [2 3] behind []",
            "w3 generation 2 at 0 of [2 3] behind []",
        ],
    );
    scene.check(
        reported(2, 1, "a"),
        &[
            "committed 1 loss 1.5",
            "w2 generation 3 at 1 of [2 3] behind [1]",
            "w3 generation 3 at 1 of [2 3] behind [1]",
        ],
    );
}

#[test]
fn a_newcomer_enters_when_a_step_is_settled_with_state_from_a_peer() {
    let mut scene = Scene::exchanging();
    scene.check(join(WorkerId(3)), &["w3 welcome"]);
    scene.check(ready(WorkerId(3), 0), &[]);
    scene.check(reported(1, 1, "a"), &[]);
    scene.check(
        reported(2, 1, "a"),
        &[
            "committed 1 loss 1.5",
            "w1 generation 2 at 1 of [1 2 3] behind [2]",
            "w2 generation 2 at 1 of [1 2 3] behind [2]",
            "w3 generation 2 at 1 of [1 2 3] behind [2]",
        ],
    );
}

#[test]
fn a_spare_replaces_the_fallen_at_once() {
    let mut scene = Scene::with(2, |settings| {
        settings.min_workers = 1;
        settings.max_workers = Some(1);
    });
    scene.check(lost(1), &["w2 generation 2 at 0 of [2] behind []"]);
}

#[test]
fn below_min_workers_the_run_waits_and_says_so() {
    let mut scene = Scene::with_workers(2);
    scene.check(lost(2), &["waiting 1 of 2"]);
    scene.after(join(WorkerId(3)));
    scene.check(
        ready(WorkerId(3), 0),
        &[
            "w1 generation 2 at 0 of [1 3] behind []",
            "w3 generation 2 at 0 of [1 3] behind []",
        ],
    );
}

#[test]
fn the_odd_digest_is_expelled_by_name() {
    let mut scene = Scene::with_workers(3);
    scene.cluster.settings.min_workers = 1;
    for (worker, slot) in [(1, 0), (1, 1), (2, 2), (2, 3)] {
        scene.after(done(worker, 0, slot));
    }
    scene.after(reported(1, 1, "b"));
    scene.after(reported(2, 1, "a"));
    scene.check(
        reported(3, 1, "a"),
        &[
            "w1 expel: its weights after step 1 are b where the others have a; this machine computes wrongly",
            "committed 1 loss 1.5",
            "w2 generation 2 at 1 of [2 3] behind []",
            "w3 generation 2 at 1 of [2 3] behind []",
        ],
    );
}

#[test]
fn two_workers_that_disagree_fail_the_job() {
    let mut scene = Scene::exchanging();
    scene.after(reported(1, 1, "a"));
    let commands = scene.after(reported(2, 1, "b"));
    assert_eq!(commands[..2], ["w1 finish failed", "w2 finish failed"]);
    assert!(commands[2].contains("w1 has a, w2 has b"), "{commands:?}");
}

#[test]
fn too_many_skipped_steps_in_a_row_name_step_and_slots() {
    let mut scene = Scene::with_workers(1);
    let mut last = Vec::new();
    for step in 0..2 {
        for slot in 0..4 {
            let Event::SlotDone { worker, mut done } = done(1, step, slot) else {
                unreachable!("done makes a SlotDone")
            };
            if slot == 2 {
                done.loss_sum = f64::NAN;
            }
            scene.after(Event::SlotDone { worker, done });
        }
        let Event::StepReported { worker, mut report } = reported(1, step + 1, "a") else {
            unreachable!("reported makes a StepReported")
        };
        report.skipped = true;
        last = scene.after(Event::StepReported { worker, report });
    }
    let end = last.last().cloned().unwrap_or_default();
    assert!(
        end.contains("2 steps in a row") && end.contains("step 2"),
        "{end}"
    );
    assert!(end.contains("slots [2]"), "{end}");
}

#[test]
fn a_checkpoint_is_asked_for_before_its_step_is_left() {
    let mut scene = Scene::with_workers(1);
    scene.cluster.saving.overdue();
    for slot in 0..3 {
        scene.after(done(1, 0, slot));
    }
    scene.check(
        done(1, 0, 3),
        &[
            "w1 exchange 0",
            "w1 save 1",
            "w1 plan train 1",
            "w1 lease [0]",
            "w1 lease [1]",
        ],
    );
}

#[test]
fn a_stop_stores_the_newest_state_first() {
    let mut scene = Scene::exchanging();
    let reason = "Ctrl-C".to_owned();
    scene.check(Event::StopRequested { reason }, &[]);
    scene.check(reported(2, 1, "a"), &["w2 save 1"]);
    scene.check(reported(1, 1, "a"), &["committed 1 loss 1.5"]);
    scene.check(
        stored(1),
        &[
            "w1 finish",
            "w2 finish",
            "end Stopped { step: 1, reason: \"Ctrl-C\" }",
        ],
    );
}

#[test]
fn another_worker_is_asked_where_the_one_that_stores_is_lost() {
    let mut scene = Scene::exchanging();
    let reason = "Ctrl-C".to_owned();
    scene.after(Event::StopRequested { reason });
    scene.after(reported(2, 1, "a"));
    scene.after(reported(1, 1, "a"));
    scene.check(lost(2), &["w1 save 1"]);
}

#[test]
fn a_stop_with_nothing_new_ends_at_once() {
    let mut scene = Scene::with_workers(1);
    let reason = "Ctrl-C".to_owned();
    scene.check(
        Event::StopRequested { reason },
        &["w1 finish", "end Stopped { step: 0, reason: \"Ctrl-C\" }"],
    );
}

#[test]
fn a_slot_that_was_not_leased_expels_its_sender() {
    let mut scene = Scene::with_workers(2);
    scene.cluster.settings.min_workers = 1;
    let commands = scene.after(done(2, 0, 0));
    assert_eq!(
        commands[0],
        "w2 expel: it computed slot 0, which was not leased to it"
    );
}

#[test]
fn a_broken_exchange_between_living_workers_is_built_anew() {
    let mut scene = Scene::exchanging();
    let lost = v1::PeerLost {
        generation: 1,
        rank: 1,
        reason: "reset".into(),
    };
    let worker = WorkerId(1);
    scene.check(Event::PeerLost { worker, lost }, &[]);
    scene.check(Event::Ticked, &[]);
    scene.now += PEER_LOST_GRACE;
    scene.check(
        Event::Ticked,
        &[
            "w1 generation 2 at 0 of [1 2] behind []",
            "w2 generation 2 at 0 of [1 2] behind []",
        ],
    );
}

#[test]
fn training_waits_rather_than_leave_a_checkpoint_out() {
    let mut scene = Scene::with_workers(1);
    // The course saves after step 3; two earlier states are still on their way.
    for step in 0..2 {
        scene.cluster.saving.overdue();
        for slot in 0..4 {
            scene.after(done(1, step, slot));
        }
        scene.after(reported(1, step + 1, "a"));
    }
    for slot in 0..2 {
        let Event::SlotDone { worker, mut done } = done(1, 2, slot) else {
            unreachable!("done makes a SlotDone")
        };
        done.kind = PlanKind::Eval.to_wire();
        scene.after(Event::SlotDone { worker, done });
    }
    for slot in 0..3 {
        scene.after(done(1, 2, slot));
    }
    scene.check(done(1, 2, 3), &[]);
    let commands = scene.after(stored(1));
    assert_eq!(commands[..2], ["w1 exchange 2", "w1 save 3"]);
}
