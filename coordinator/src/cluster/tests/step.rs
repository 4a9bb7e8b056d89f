//! A step from its leases to its commit.

use super::*;

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
fn a_run_of_which_every_step_was_skipped_is_not_done() {
    let mut scene = Scene::new(|_| ());
    let lenient = Settings {
        max_skipped_steps: 5,
        ..settings()
    };
    scene.cluster = Cluster::new(lenient, course(1, 4));
    scene.after(join(WorkerId(1)));
    scene.after(ready(WorkerId(1), 0));
    scene.after(entered(1, 1, 0, &[]));
    for slot in 0..4 {
        scene.after(done(1, 0, slot));
    }
    let Event::StepReported { worker, mut report } = reported(1, 1, "a") else {
        unreachable!("reported makes a StepReported")
    };
    report.skipped = true;
    let commands = scene.after(Event::StepReported { worker, report });
    let end = commands.last().cloned().unwrap_or_default();
    assert!(
        end.contains("every step of the run (1) was skipped"),
        "{commands:?}"
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
fn utilisation_is_of_all_gpus_published_peaks_or_not_told() {
    let record = |peaks: [Option<f64>; 2], gpus: [&str; 2]| {
        let mut scene = Scene::with_workers(2);
        scene.cluster.settings.flop_per_token = Some(1e9);
        for (id, (peak, gpu)) in (1..).zip(peaks.into_iter().zip(gpus)) {
            let worker = scene.cluster.members.get_mut(WorkerId(id));
            let worker = worker.expect("it joined");
            worker.peak_flops = peak;
            worker.gpu = Some(v1::Gpu {
                uuid: gpu.to_owned(),
                ..Default::default()
            });
        }
        for (worker, slot) in [(1, 0), (1, 1), (2, 2), (2, 3)] {
            scene.after(done(worker, 0, slot));
        }
        scene.now += Duration::from_secs(2);
        let mut commands = Vec::new();
        for id in [1, 2] {
            let Event::StepReported { worker, mut report } = reported(id, 1, "a") else {
                unreachable!("reported makes a StepReported")
            };
            report.peak_memory_bytes = 100 * id;
            let event = Event::StepReported { worker, report };
            scene.cluster.handle(scene.now, event, &mut commands);
        }
        let record = commands.into_iter().find_map(|command| match command {
            Command::Emit(RunEvent::StepCommitted(record)) => Some(record),
            _ => None,
        });
        record.expect("the step is committed")
    };
    let both = [Some(1e10), Some(3e10)];
    for (peaks, gpus, together) in [
        (both, ["a", "b"], 4e10),
        // One that both share counts once, and those that no driver tells apart count as two.
        ([Some(3e10); 2], ["a", "a"], 3e10),
        (both, ["", ""], 4e10),
    ] {
        let record = record(peaks, gpus);
        let expected = record.tokens_per_second * 1e9 / together;
        let is_it = |mfu: f64| (mfu / expected - 1.0).abs() < 1e-12;
        assert!(record.mfu.is_some_and(is_it), "{gpus:?}: {:?}", record.mfu);
        assert_eq!(record.peak_memory_bytes, Some(200));
    }
    assert_eq!(record([Some(1e10), None], ["a", "b"]).mfu, None);
    assert_eq!(record([None, Some(1e10)], ["a", "a"]).mfu, None);
}
