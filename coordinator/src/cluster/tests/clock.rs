//! Checkpoints by the clock, where the job does not say after how many steps.

use super::*;

/// Of every step.
const STEP: Duration = Duration::from_secs(7);
const STEPS: u64 = 400;

/// A worker alone, one slot a step.
struct Run {
    scene: Scene,
    step: u64,
    /// Steps whose state was asked for, and when.
    saves: Vec<(u64, Instant)>,
}

impl Run {
    fn new(scalars: u64) -> Self {
        let mut job = job(STEPS, 1);
        job.eval_steps = None;
        job.save_steps = SaveSteps::Auto;
        let block = BlockTokens {
            used: 4,
            trained: 1,
        };
        let course = RunSchedule::new(Arc::new(job), 1, vec![block]);
        let mut scene = Scene {
            cluster: Cluster::new(settings(), course),
            now: Instant::now(),
            unreached: Default::default(),
            notices: Vec::new(),
        };
        scene.after(join(WorkerId(1)));
        let Event::WorkerReady { worker, mut ready } = ready(WorkerId(1), 0) else {
            unreachable!("ready makes a WorkerReady")
        };
        ready.trainable_scalars = scalars;
        scene.after(Event::WorkerReady { worker, ready });
        scene.after(entered(1, 1, 0, &[]));
        Self {
            scene,
            step: 0,
            saves: Vec::new(),
        }
    }

    /// One step; true where its state was asked for.
    fn step(&mut self) -> bool {
        self.scene.pass(STEP, &[]);
        let commands = self.scene.after(done(1, self.step, 0));
        self.step += 1;
        let save = format!("w1 save {}", self.step);
        let is_asked = commands.contains(&save);
        if is_asked {
            self.saves.push((self.step, self.scene.now));
        }
        self.scene.after(reported(1, self.step, "a"));
        is_asked
    }

    /// Steps until a state is asked for, which is on disk after `took`.
    fn until_saved(&mut self, took: Duration) -> u64 {
        while !self.step() {}
        self.scene.pass(took, &[]);
        self.scene.after(stored(self.step));
        self.step
    }

    /// Between the newest two.
    fn interval(&self) -> Duration {
        let [.., (_, before), (_, newest)] = self.saves[..] else {
            panic!("{:?}", self.saves)
        };
        newest - before
    }
}

/// From `least` on, at the end of a step.
fn check(interval: Duration, least: u64) {
    let least = Duration::from_secs(least);
    assert!(
        interval >= least && interval < least + 2 * STEP,
        "{interval:?}"
    );
}

#[test]
fn the_first_checkpoint_comes_after_a_minute() {
    let mut run = Run::new(10);
    let began = run.scene.now;
    run.until_saved(Duration::ZERO);
    check(run.saves[0].1 - began, 60);
    run.until_saved(Duration::ZERO);
    check(run.interval(), 60);
}

#[test]
fn the_next_one_waits_for_a_hundred_times_what_the_last_one_took() {
    let mut run = Run::new(10);
    run.until_saved(Duration::from_secs(3));
    run.until_saved(Duration::from_secs(1));
    check(run.interval(), 300);
    run.until_saved(Duration::from_secs(20));
    check(run.interval(), 100);
    run.until_saved(Duration::ZERO);
    check(run.interval(), 600);
}

#[test]
fn a_state_on_its_way_is_waited_for_and_one_that_failed_is_not() {
    let mut run = Run::new(10);
    while !run.step() {}
    let asked = run.step;
    assert!((0..30).all(|_| !run.step()));
    run.scene.after(Event::StateFailed {
        worker: WorkerId(1),
        step: asked,
        reason: "no space".into(),
        disk: true,
    });
    assert!(run.step(), "its time has come long ago");
}

#[test]
fn only_weights_whose_digest_all_workers_report_are_saved() {
    let mut run = Run::new(60_000_000);
    assert_eq!(run.until_saved(Duration::ZERO), 10);
    assert_eq!(run.until_saved(Duration::ZERO), 20);
}
