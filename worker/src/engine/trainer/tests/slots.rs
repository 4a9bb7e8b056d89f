//! Slots: what one adds to the sums, whatever ran before, and what an abandoned one leaves.

use super::*;

#[test]
fn a_slot_gives_the_same_bits_whatever_ran_before() {
    let dir = model("LlamaForCausalLM");
    let job = job(lora(TargetModules::AllLinear, 0.2));
    let mut fresh = load(dir.path(), job.clone(), 2);
    let expected = slot_sums(&mut fresh, 5, &blocks());
    let mut used = load(dir.path(), job, 2);
    slot_sums(&mut used, 3, &[block(&[64], 9)]);
    used.eval_slot(&[block(&[11], 8)]).unwrap();
    assert_eq!(slot_sums(&mut used, 5, &blocks()), expected);
}

#[test]
fn a_held_slot_is_not_added_twice() {
    let dir = model("LlamaForCausalLM");
    let mut trainer = load(dir.path(), job(Method::Full), 1);
    trainer.begin_step(0, 10, 1).unwrap();
    let first = trainer.train_slot(0, &blocks()).unwrap();
    let sums = trainer.accumulator().mean();
    trainer.begin_step(0, 10, 1).unwrap();
    assert_eq!(trainer.train_slot(0, &blocks()).unwrap(), first);
    assert_eq!(trainer.accumulator().mean(), sums);
}

#[test]
fn a_slot_without_trained_tokens_adds_nothing() {
    let dir = model("LlamaForCausalLM");
    let mut trainer = load(dir.path(), job(Method::Full), 1);
    let mut silent = block(&[20], 1);
    silent.trained.fill(false);
    trainer.begin_step(0, 1, 1).unwrap();
    let outcome = trainer.train_slot(0, &[silent]).unwrap();
    assert_eq!(outcome, SlotOutcome::default());
    assert!(trainer.accumulator().mean().iter().all(|g| *g == 0.0));
}

#[test]
fn an_abandoned_slot_leaves_the_accumulator_as_it_was() {
    for method in methods("Qwen3ForCausalLM") {
        check_abandoned_slots(job(method));
    }
}

fn check_abandoned_slots(job: JobSpec) {
    let dir = model("Qwen3ForCausalLM");
    let quiet = slot_sums(&mut load(dir.path(), job.clone(), 2), 0, &blocks());
    let mut trainer = load(dir.path(), job, 2);
    trainer.begin_step(0, 5, 1).unwrap();
    let abandon = trainer.abandon();
    abandon.ask();
    let refused = trainer.train_slot(0, &blocks());
    assert!(
        matches!(refused, Err(EngineError::Abandoned)),
        "{refused:?}"
    );
    let refused = trainer.eval_slot(&blocks());
    assert!(
        matches!(refused, Err(EngineError::Abandoned)),
        "{refused:?}"
    );
    // At any moment of the pass.
    for microseconds in (0..2000).step_by(100) {
        abandon.clear();
        let asking = abandon.clone();
        let asker = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_micros(microseconds));
            asking.ask();
        });
        match trainer.train_slot(0, &blocks()) {
            Ok(_) => trainer.forget_slots(),
            Err(EngineError::Abandoned) => assert!(trainer.accumulator().held().is_empty()),
            Err(error) => panic!("{error}"),
        }
        asker.join().unwrap();
        trainer.begin_step(0, 5, 1).unwrap();
    }
    abandon.clear();
    assert_eq!(slot_sums(&mut trainer, 0, &blocks()), quiet);
}
