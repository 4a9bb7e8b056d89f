//! The best weights: saved before anybody goes on from them, kept through deaths, and the result of a run that ends early.

use common::job::{BestModel, EarlyStopping};
use common::plan::BestSoFar;

use super::*;

const RULE: BestModel = BestModel {
    greater_is_better: false,
    load_at_end: true,
    save: false,
    early_stopping: Some(EarlyStopping {
        patience: 1,
        threshold: 0.0,
    }),
};

/// Six steps of four slots with an evaluation after every second one, and no checkpoints but those of the best weights.
fn scene(workers: u64, rule: BestModel, change: impl FnOnce(&mut Settings)) -> Scene {
    let job = JobSpec {
        save_steps: SaveSteps::Never,
        best_model: Some(rule),
        ..job(6, 4)
    };
    let mut scene = Scene::of_course(course_of(job, 4), |settings| {
        settings.best = Some(BestSoFar::new(rule));
        change(settings);
    });
    let start = scene.cluster.settings.start_step;
    for id in 1..=workers {
        scene.after(join(WorkerId(id)));
        scene.after(ready(WorkerId(id), start));
    }
    scene
}

fn one_worker(rule: BestModel) -> Scene {
    let mut scene = scene(1, rule, |_| ());
    scene.after(entered(1, 1, 0, &[]));
    scene
}

/// Worker 1 makes a step alone. Returns what follows.
fn step(scene: &mut Scene, step: u64) -> Vec<String> {
    let mut said = Vec::new();
    for slot in 0..4 {
        said.extend(scene.after(done(1, step, slot)));
    }
    said.extend(scene.after(reported(1, step + 1, "a")));
    said
}

/// Worker 1 evaluates the weights after `step` updates, with this loss.
fn evaluate(scene: &mut Scene, step: u64, loss: f64) -> Vec<String> {
    let mut said = Vec::new();
    for slot in 0..2 {
        let Event::SlotDone { worker, mut done } = done(1, step, slot) else {
            unreachable!("done makes a SlotDone")
        };
        done.kind = PlanKind::Eval.to_wire();
        done.loss_sum = loss;
        said.extend(scene.after(Event::SlotDone { worker, done }));
    }
    said
}

fn not_saved(worker: u64, step: u64) -> Event {
    Event::StateFailed {
        worker: WorkerId(worker),
        step,
        reason: "no room".into(),
        disk: true,
    }
}

/// Worker 1 has the best weights so far after step 2.
fn best_after_two(rule: BestModel) -> Scene {
    let mut scene = one_worker(rule);
    step(&mut scene, 0);
    step(&mut scene, 1);
    let said = evaluate(&mut scene, 2, 1.0);
    assert_eq!(said[..2], ["w1 save 2", "w1 plan train 2"]);
    scene
}

/// And two steps later, when a checkpoint has them.
fn best_stored(rule: BestModel) -> Scene {
    let mut scene = best_after_two(rule);
    scene.after(stored(2));
    step(&mut scene, 2);
    step(&mut scene, 3);
    scene
}

#[test]
fn the_step_after_the_best_weights_ends_once_a_checkpoint_has_them() {
    let mut scene = best_after_two(RULE);
    for slot in 0..4 {
        let said = scene.after(done(1, 2, slot));
        assert!(
            !said.iter().any(|line| line.contains("exchange")),
            "{said:?}"
        );
    }
    let said = scene.after(stored(2));
    assert_eq!(said[0], "w1 exchange 2");
}

#[test]
fn a_worse_evaluation_saves_nothing_and_holds_nothing_up() {
    let rule = BestModel {
        early_stopping: None,
        ..RULE
    };
    let mut scene = best_stored(rule);
    let said = evaluate(&mut scene, 4, 2.0);
    assert_eq!(said[0], "w1 plan train 4");
    let said = step(&mut scene, 4);
    assert!(said.contains(&"w1 exchange 4".to_owned()), "{said:?}");
}

#[test]
fn a_run_that_does_not_improve_ends_with_its_best_weights() {
    let mut scene = best_stored(RULE);
    assert_eq!(evaluate(&mut scene, 4, 1.0), ["result of 2 after 4"]);
    let told = scene
        .notices
        .iter()
        .any(|text| text.starts_with("stopping early after step 4 of 6"));
    assert!(told, "{:?}", scene.notices);
    let end = "end Finished { step: 4, weights_digest: \"a\" }";
    scene.check(result_stored(4), &["w1 finish", end]);
}

#[test]
fn without_load_at_end_the_last_weights_are_the_result() {
    let rule = BestModel {
        load_at_end: false,
        ..RULE
    };
    let mut scene = one_worker(rule);
    for at in [0, 1] {
        step(&mut scene, at);
    }
    assert_eq!(evaluate(&mut scene, 2, 1.0)[0], "w1 plan train 2");
    for at in [2, 3] {
        step(&mut scene, at);
    }
    assert_eq!(evaluate(&mut scene, 4, 1.0), ["w1 save 4 last"]);
}

#[test]
fn a_next_term_ends_where_the_one_before_would_have() {
    let record = [(2, 1.0), (4, 1.5)];
    let mut scene = scene(1, RULE, |settings| {
        settings.start_step = 4;
        settings.last_evaluated = Some(4);
        settings.best = Some(BestSoFar::after(RULE, record));
        settings.best_saved = Some(2);
    });
    let said = scene.after(entered(1, 1, 4, &[]));
    assert_eq!(said, ["result of 2 after 4"]);
}

#[test]
fn a_next_term_saves_the_best_weights_that_the_one_before_had_not() {
    let mut scene = scene(1, RULE, |settings| {
        settings.start_step = 2;
        settings.last_evaluated = Some(2);
        settings.best = Some(BestSoFar::after(RULE, [(2, 1.0)]));
    });
    let said = scene.after(entered(1, 1, 2, &[]));
    assert!(said.contains(&"w1 save 2".to_owned()), "{said:?}");
}

#[test]
fn best_weights_that_died_with_the_disk_are_made_again() {
    // The state of step 2 is on no disk and with nobody: the run begins at its first step again, and knows what it will find.
    let mut scene = scene(1, RULE, |settings| {
        settings.earlier.recorded = 2;
        settings.last_evaluated = Some(2);
        settings.best = Some(BestSoFar::after(RULE, [(2, 1.0)]));
    });
    scene.after(entered(1, 1, 0, &[]));
    step(&mut scene, 0);
    let said = step(&mut scene, 1);
    assert!(said.contains(&"w1 save 2".to_owned()), "{said:?}");
}

#[test]
fn another_worker_hands_the_best_weights_over_where_the_first_dies() {
    let mut scene = scene(2, RULE, |settings| {
        settings.start_step = 2;
        settings.last_evaluated = Some(2);
        settings.best = Some(BestSoFar::after(RULE, [(2, 1.0)]));
    });
    let number = scene.cluster.generation.number();
    let mut said = scene.after(entered(1, number, 2, &[]));
    said.extend(scene.after(entered(2, number, 2, &[])));
    assert!(said.contains(&"w1 save 2".to_owned()), "{said:?}");
    let mut said = scene.after(lost(1));
    said.extend(scene.pass(LOSSES_GATHER, &[]));
    let number = scene.cluster.generation.number();
    said.extend(scene.after(entered(2, number, 2, &[])));
    assert!(said.contains(&"w2 save 2".to_owned()), "{said:?}");
}

#[test]
fn a_full_disk_holds_the_run_up_and_loses_nothing() {
    let mut scene = best_after_two(RULE);
    for pause in [1, 2, 4] {
        scene.check(not_saved(1, 2), &[]);
        scene.check(Event::Ticked, &[]);
        let again = scene.pass(Duration::from_secs(pause), &[]);
        assert!(again.contains(&"w1 save 2".to_owned()), "{again:?}");
    }
    scene.after(stored(2));
    let said = step(&mut scene, 2);
    assert!(said.contains(&"w1 exchange 2".to_owned()), "{said:?}");
}

#[test]
fn a_damaged_checkpoint_of_the_best_leaves_the_last_weights_as_the_result() {
    let mut scene = best_stored(RULE);
    evaluate(&mut scene, 4, 1.5);
    let failed = |is_damaged| Event::ResultFailed {
        reason: "a digest differs".into(),
        is_damaged,
    };
    scene.check(failed(false), &[]);
    let again = scene.pass(Duration::from_secs(1), &[]);
    assert!(
        again.contains(&"result of 2 after 4".to_owned()),
        "{again:?}"
    );
    scene.check(failed(true), &["w1 save 4 last"]);
}

#[test]
fn the_weights_of_the_beginning_are_evaluated_where_that_is_asked_for() {
    let job = JobSpec {
        eval_on_start: true,
        save_first_step: true,
        ..job(6, 4)
    };
    let mut scene = Scene::of_course(course_of(job, 4), |_| ());
    scene.after(join(WorkerId(1)));
    scene.after(ready(WorkerId(1), 0));
    let said = scene.after(entered(1, 1, 0, &[]));
    assert_eq!(said[0], "w1 plan eval 0");
    let said = evaluate(&mut scene, 0, 3.0);
    assert_eq!(said[0], "w1 plan train 0");
    let said = step(&mut scene, 0);
    assert!(said.contains(&"w1 save 1".to_owned()), "{said:?}");
}
