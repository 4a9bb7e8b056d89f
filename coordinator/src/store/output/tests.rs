#![allow(clippy::unwrap_used)]

use common::job::{self, JobSources};
use serde_json::Value;

use super::*;
use crate::cluster::run_event::{EvalRecord, StepRecord, WorkerShare};

const PLAN: RunPlan = RunPlan {
    total_steps: 6,
    steps_per_epoch: 4,
};

fn identity(dir: &Path, more: &[(&str, &str)]) -> RunIdentity {
    let output_dir = dir.join("out").display().to_string();
    let flags = [
        ("base_model", "m"),
        ("dataset", "d"),
        ("output_dir", &output_dir),
        ("logging_steps", "2"),
    ];
    let is_given = |(name, _): &&(&str, &str)| more.iter().any(|(other, _)| other == name);
    let flags = flags.iter().filter(|flag| !is_given(flag)).chain(more);
    let flags = flags.map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    RunIdentity {
        job: job::load(JobSources {
            flags: flags.collect(),
            ..JobSources::default()
        })
        .unwrap(),
        data_digest: Some("d".repeat(64)),
        base_model_digest: Some("b".repeat(64)),
        total_steps: None,
    }
}

fn step(step: u64) -> RunEvent {
    RunEvent::StepCommitted(StepRecord {
        step,
        epoch: step as f64 / 4.0,
        loss: 4.0 - step as f64 / 2.0,
        grad_norm: 1.5,
        learning_rate: 1e-4,
        num_tokens: 100 * step,
        mean_token_accuracy: 0.25,
        tokens_per_second: 1000.0,
        workers: 2,
        generation: 1,
        weights_digest: Some(format!("{step:064}")),
        skipped: step == 5,
        eta_seconds: 1.0,
        mfu: Some(0.412),
        peak_memory_bytes: Some(1_500_000_000),
        seconds: 0.5,
        waiting_seconds: 0.25,
        shares: ["host-1", "host-2"]
            .map(|name| WorkerShare {
                name: name.to_owned(),
                slots: step,
                seconds: 0.125,
            })
            .to_vec(),
    })
}

fn eval(step: u64) -> RunEvent {
    RunEvent::Evaluated(EvalRecord {
        step,
        epoch: step as f64 / 4.0,
        eval_loss: 3.0,
        eval_mean_token_accuracy: 0.5,
        eval_runtime_seconds: 0.1,
        best: None,
    })
}

fn done() -> RunEvent {
    RunEvent::Ended(RunEnd::Done {
        step: 6,
        weights_digest: "f".repeat(64),
    })
}

fn run(
    identity: &RunIdentity,
    resumed: u64,
    events: impl IntoIterator<Item = RunEvent>,
) -> RunFiles {
    let mut files = RunFiles::open(identity, PLAN, resumed, []).unwrap();
    for event in events {
        files.observe(&event).unwrap();
    }
    files
}

fn text(dir: &Path, name: &str) -> String {
    fs::read_to_string(dir.join("out").join(name)).unwrap()
}

fn json(dir: &Path, name: &str) -> Value {
    serde_json::from_str(&text(dir, name)).unwrap()
}

#[test]
fn every_step_has_a_line_with_every_measurement() {
    let dir = tempfile::tempdir().unwrap();
    run(&identity(dir.path(), &[]), 0, [step(1), eval(1), step(2)]);
    let text = text(dir.path(), METRICS);
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 3);
    for name in [
        "step",
        "epoch",
        "loss",
        "grad_norm",
        "learning_rate",
        "num_tokens",
        "tokens_per_second",
        "mean_token_accuracy",
        "workers",
        "generation",
        "weights_digest",
        "mfu",
        "peak_memory_bytes",
        "time",
        "step_seconds",
        "waiting_seconds",
        "by_worker",
    ] {
        assert!(!lines[0][name].is_null(), "{name}");
    }
    assert_eq!(lines[1]["eval_loss"], 3.0);
    assert!(lines[0].get("skipped").is_none());
}

#[test]
fn the_trainer_state_is_what_transformers_writes() {
    let dir = tempfile::tempdir().unwrap();
    run(
        &identity(dir.path(), &[]),
        0,
        (1..=6).map(step).chain([eval(6), done()]),
    );
    let state = json(dir.path(), TRAINER_STATE);
    let names: Vec<&str> = state
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(
        names,
        [
            "best_global_step",
            "best_metric",
            "best_model_checkpoint",
            "epoch",
            "eval_steps",
            "global_step",
            "is_hyper_param_search",
            "is_local_process_zero",
            "is_world_process_zero",
            "log_history",
            "logging_steps",
            "max_steps",
            "num_input_tokens_seen",
            "num_train_epochs",
            "save_steps",
            "stateful_callbacks",
            "total_flos",
            "train_batch_size",
            "trial_name",
            "trial_params",
        ]
    );
    assert_eq!(
        (
            &state["global_step"],
            &state["max_steps"],
            &state["num_train_epochs"]
        ),
        (&6.into(), &6.into(), &2.into())
    );
    assert_eq!(state["epoch"], 1.5);
    assert_eq!(state["num_input_tokens_seen"], 600);
    let history = state["log_history"].as_array().unwrap();
    assert_eq!(
        history.len(),
        5,
        "steps 2, 4, 6, the evaluation and the summary"
    );
    assert_eq!(history[0]["step"], 2);
    assert_eq!(history[0]["loss"], 3.25, "the mean of steps 1 and 2");
    assert_eq!(history[4]["train_loss"], 2.25);
    assert!(history.iter().all(|entry| entry.get("time").is_none()));
}

#[test]
fn a_checkpoint_gets_the_state_of_its_own_step() {
    let dir = tempfile::tempdir().unwrap();
    let files = run(&identity(dir.path(), &[]), 0, (1..=5).map(step));
    let state: Value = serde_json::from_str(&files.trainer_state_at(2)).unwrap();
    assert_eq!(state["global_step"], 2);
    assert_eq!(state["epoch"], 0.5);
    assert_eq!(state["log_history"].as_array().unwrap().len(), 1);
    assert_eq!(state["num_input_tokens_seen"], 200);
}

#[test]
fn the_record_follows_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let identity = identity(dir.path(), &[]);
    let mut files = run(&identity, 0, [step(1)]);
    files.set_numerics_class("x86_64-avx512").unwrap();
    let record = RunRecord::read(&identity.job.output_dir).unwrap().unwrap();
    assert_eq!((record.state, record.total_steps), (RunState::Running, 6));
    files.observe(&done()).unwrap();
    let record = json(dir.path(), RUN);
    assert_eq!(record["state"], "done");
    assert_eq!(record["step"], 6);
    assert_eq!(record["weights_digest"], "f".repeat(64));
    assert_eq!(record["numerics_class"], "x86_64-avx512");
    assert_eq!(record["job_digest"], identity.job.digest());
    assert_eq!(record["job"]["learning_rate"], 2e-5);
    assert_eq!(record["muster_version"], common::VERSION);
}

#[test]
fn the_record_says_when_and_by_whom_and_a_resumed_run_began_when_it_first_did() {
    let dir = tempfile::tempdir().unwrap();
    let identity = identity(dir.path(), &[]);
    let joined = |number: u64| RunEvent::WorkerJoined {
        worker: number,
        name: format!("host-{number}"),
        device: format!("cuda:{number}"),
        workers: 1,
    };
    let stopped = RunEvent::Ended(RunEnd::Stopped {
        step: 2,
        reason: "late".into(),
    });
    let command = vec!["coordinator".to_owned(), "start".to_owned()];
    let mut files = RunFiles::open(&identity, PLAN, 0, []).unwrap();
    files.record.started = Some("2026-01-02T03:04:05Z".to_owned());
    let mut files = files.with_command(command.clone());
    for event in [joined(1), joined(2), step(1), step(2), stopped] {
        files.observe(&event).unwrap();
    }
    drop(files);
    let record = RunRecord::read(&identity.job.output_dir).unwrap().unwrap();
    assert_eq!(record.command, command);
    let ended = record.ended.unwrap();
    assert!(ended.ends_with('Z') && ended.len() == 20, "{ended}");
    assert_eq!(
        (
            record.step_seconds,
            record.waiting_seconds,
            record.mean_step_seconds
        ),
        (1.0, 0.5, Some(0.5))
    );

    // What is computed again counts once, and what an earlier life did counts.
    drop(run(&identity, 1, [step(2), step(3), done()]));
    let record = RunRecord::read(&identity.job.output_dir).unwrap().unwrap();
    assert_eq!(record.started.as_deref(), Some("2026-01-02T03:04:05Z"));
    assert_eq!(record.step_seconds, 1.5);
    let worker = |number: u64| WorkerRecord {
        name: format!("host-{number}"),
        device: format!("cuda:{number}"),
        slots: 1 + 2 + 3,
        seconds: 3.0 * 0.125,
    };
    assert_eq!(record.workers, [worker(1), worker(2)]);

    let anew = run(&identity, 0, []);
    assert_ne!(
        anew.record().started.as_deref(),
        Some("2026-01-02T03:04:05Z")
    );
    assert!(anew.record().ended.is_none() && anew.record().workers.is_empty());
}

#[test]
fn a_line_names_the_busiest_workers_and_counts_the_others() {
    let RunEvent::StepCommitted(mut record) = step(1) else {
        unreachable!("step makes a StepCommitted")
    };
    record.seconds = f64::NAN;
    record.shares = (0..1000)
        .map(|number| WorkerShare {
            name: "n".repeat(250) + &number.to_string(),
            slots: number,
            seconds: 1.0,
        })
        .collect();
    let line = line_of(&RunEvent::StepCommitted(record), SystemTime::UNIX_EPOCH).unwrap();
    let named = line["by_worker"].as_array().unwrap();
    assert_eq!((named.len(), named[0]["slots"].as_u64()), (32, Some(999)));
    assert_eq!(line["others"]["workers"], 968);
    assert_eq!(line["others"]["slots"], (0..968).sum::<u64>());
    assert_eq!(line["time"], "1970-01-01T00:00:00.000Z");
    assert!(line["step_seconds"].is_null(), "its beginning was not seen");
    // Longer lines would be taken for damage.
    assert!(serde_json::to_string(&line).unwrap().len() < 64 << 10);
}

#[test]
fn a_resumed_run_cuts_off_the_steps_it_makes_again() {
    let dir = tempfile::tempdir().unwrap();
    let identity = identity(dir.path(), &[]);
    run(&identity, 0, (1..=6).map(step).chain([done()]));
    let whole = text(dir.path(), METRICS);
    let what_happened = |lines: &str| -> Vec<Line> {
        let line = |text| {
            let mut line: Line = serde_json::from_str(text).unwrap();
            assert!(line.remove("time").is_some(), "{text}");
            line
        };
        lines.lines().map(line).collect()
    };
    let whole_history = json(dir.path(), TRAINER_STATE)["log_history"].clone();
    // A crash leaves half a line.
    let torn = format!("{whole}{{\"step\": 7, \"lo");
    fs::write(dir.path().join("out").join(METRICS), torn).unwrap();
    run(&identity, 3, (4..=6).map(step).chain([done()]));
    let again = text(dir.path(), METRICS);
    assert_eq!(what_happened(&again), what_happened(&whole));
    let kept: Vec<&str> = whole.lines().take(3).collect();
    assert!(
        again.starts_with(&kept.join("\n")),
        "those keep their times: {again}"
    );
    let history = json(dir.path(), TRAINER_STATE)["log_history"].clone();
    assert_eq!(
        history.as_array().unwrap()[..3],
        whole_history.as_array().unwrap()[..3]
    );
}

#[test]
fn a_hostile_metrics_file_ends_where_it_breaks() {
    let dir = tempfile::tempdir().unwrap();
    let identity = identity(dir.path(), &[]);
    run(&identity, 0, [step(1), step(2)]);
    let path = dir.path().join("out").join(METRICS);
    let good = text(dir.path(), METRICS);
    for bad in [
        "[1]\n",
        "{\"step\": -1}\n",
        "\n",
        "\u{0}\n",
        &format!("{{\"x\": \"{}\"}}\n", "y".repeat(200_000)),
    ] {
        fs::write(&path, format!("{good}{bad}{good}")).unwrap();
        run(&identity, 2, []);
        assert_eq!(text(dir.path(), METRICS), good);
    }
}

#[test]
fn a_field_that_one_of_two_jobs_leaves_at_its_default_is_named_too() {
    let lora = ("adapter", "lora");
    let (dense, narrow) = (("base_dtype", "bfloat16"), ("load_in_4bit", "true"));
    for (first, other, named) in [
        ([lora, narrow], [lora, dense], "} there, null here"),
        ([lora, dense], [lora, narrow], "quantization null there, {"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        run(&identity(dir.path(), &first), 0, [step(1)]);
        let message = check_output_dir(&identity(dir.path(), &other));
        let message = message.unwrap_err().to_string();
        assert!(
            message.contains("quantization") && message.contains(named),
            "{message}"
        );
    }
}

#[test]
fn a_folder_of_another_job_is_refused_with_both_digests() {
    let dir = tempfile::tempdir().unwrap();
    let first = identity(dir.path(), &[]);
    run(&first, 0, [step(1)]);
    let other = identity(
        dir.path(),
        &[("learning_rate", "1e-3"), ("save_steps", "7")],
    );
    let message = check_output_dir(&other).unwrap_err().to_string();
    assert_eq!(message.lines().count(), 1);
    for part in [
        &first.job.digest()[..12],
        &other.job.digest()[..12],
        "learning_rate 0.00002 there, 0.001 here",
        "name another output_dir",
    ] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert!(!message.contains("save_steps"), "{message}");
    assert!(RunFiles::open(&other, PLAN, 0, []).is_err());
    assert!(
        text(dir.path(), METRICS).contains("\"step\":1"),
        "nothing was lost"
    );
}

#[test]
fn a_folder_of_other_data_or_another_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut identity = identity(dir.path(), &[]);
    run(&identity, 0, []);
    assert!(check_output_dir(&identity).unwrap().is_some());
    identity.data_digest = Some("e".repeat(64));
    assert!(
        check_output_dir(&identity)
            .unwrap_err()
            .to_string()
            .contains("data digest dddddddddddd… there, eeeeeeeeeeee… here")
    );
    identity.data_digest = None;
    assert!(check_output_dir(&identity).is_ok(), "not known yet");
    identity.base_model_digest = Some("c".repeat(64));
    assert!(
        check_output_dir(&identity)
            .unwrap_err()
            .to_string()
            .contains("base model digest")
    );
}

#[test]
fn an_output_folder_that_cannot_be_one_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("out").display().to_string();
    fs::create_dir(dir.path().join("out")).unwrap();
    let same = identity(dir.path(), &[("base_model", &model)]);
    assert!(
        check_output_dir(&same)
            .unwrap_err()
            .to_string()
            .contains("is also base_model")
    );
    let own = identity(dir.path(), &[]);
    fs::write(dir.path().join("out").join(RUN), "{").unwrap();
    assert!(
        check_output_dir(&own)
            .unwrap_err()
            .to_string()
            .contains("run.json is not a run record")
    );
    fs::remove_dir_all(dir.path().join("out")).unwrap();
    fs::write(dir.path().join("out"), "").unwrap();
    assert!(
        check_output_dir(&own)
            .unwrap_err()
            .to_string()
            .contains("is not a folder")
    );
}

#[test]
fn lines_that_a_crash_cost_are_written_again_once() {
    let dir = tempfile::tempdir().unwrap();
    let identity = identity(dir.path(), &[]);
    drop(run(&identity, 0, [step(1), step(2), eval(2), step(3)]));
    let events = [step(2), eval(2), step(3), step(4), eval(4), step(5)];
    let line_of = |event| line_of(event, SystemTime::UNIX_EPOCH);
    let known: Vec<Line> = events.iter().filter_map(line_of).collect();
    // Three is there, four is not, and five was never committed.
    let files = RunFiles::open(&identity, PLAN, 4, &known).unwrap();
    assert_eq!(files.last_evaluated(), Some(4));
    let text = text(dir.path(), METRICS);
    let places: Vec<(u64, bool)> = text
        .lines()
        .map(|line| metrics::place(&serde_json::from_str(line).unwrap()).unwrap())
        .collect();
    let all = [
        (1, false),
        (2, false),
        (2, true),
        (3, false),
        (4, false),
        (4, true),
    ];
    assert_eq!(places, all);
}

#[test]
fn lines_that_a_full_disk_refused_are_written_once_there_is_room() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(METRICS);
    let line = |step| line::object(serde_json::json!({ "step": step }));
    let mut lines = Metrics::open(&path, None, |_| {}).unwrap();
    lines.append(&line(1)).unwrap();
    lines.break_file();
    for step in [2, 3] {
        assert!(lines.append(&line(step)).is_err());
    }
    assert!(lines.make_durable().is_err());
    lines.mend_file();
    lines.append(&line(4)).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(
        text,
        "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n{\"step\":4}\n"
    );
}

#[test]
fn what_is_done_stays_done() {
    let folder = tempfile::tempdir().unwrap();
    let identity = identity(folder.path(), &[]);
    let stopped = RunEvent::Ended(RunEnd::Stopped {
        step: 2,
        reason: "late".into(),
    });
    run(&identity, 0, [step(1), step(2), done(), done(), stopped]);
    let record = RunRecord::read(&identity.job.output_dir).unwrap().unwrap();
    assert_eq!((record.state, record.step), (RunState::Done, 6));
    let state = std::fs::read_to_string(identity.job.output_dir.join(TRAINER_STATE)).unwrap();
    assert_eq!(state.matches("train_runtime").count(), 1);
}
