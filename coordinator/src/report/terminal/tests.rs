#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use common::job::{self, JobSources, JobSpec};

use super::*;
use crate::cluster::run_event::EvalRecord;

mod plans;
mod samples;

const PLAIN: Style = Style {
    colour: false,
    unicode: false,
};
const COLOUR: Style = Style {
    colour: true,
    unicode: true,
};

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What a run without a terminal prints.
fn printed(logging_steps: u64, events: impl IntoIterator<Item = RunEvent>) -> String {
    shown(None, logging_steps, events).0
}

/// What is printed above the bar, and the bar's messages.
fn shown(
    screen: Option<Screen>,
    logging_steps: u64,
    events: impl IntoIterator<Item = RunEvent>,
) -> (String, Vec<String>) {
    let out = Shared::default();
    let style = screen.as_ref().map_or(PLAIN, Screen::style);
    let mut terminal = Terminal::new(Box::new(out.clone()), style, screen, logging_steps);
    terminal.now = || SystemTime::UNIX_EPOCH;
    let mut messages = Vec::new();
    for event in events {
        terminal.observe(&event);
        messages.extend(terminal.bar.as_ref().map(ProgressBar::message));
    }
    let bytes = out.0.lock().unwrap().clone();
    (String::from_utf8(bytes).unwrap(), messages)
}

fn joined(workers: usize) -> RunEvent {
    RunEvent::WorkerJoined {
        worker: workers as u64,
        name: format!("host-{workers}"),
        device: "cpu".to_owned(),
        workers,
    }
}

fn started() -> RunEvent {
    RunEvent::Started {
        step: 0,
        total_steps: 5,
        workers: 1,
        generation: 1,
        numerics_class: String::new(),
    }
}

fn step(step: u64) -> RunEvent {
    RunEvent::StepCommitted(StepRecord {
        step,
        epoch: 0.25 * step as f64,
        loss: 5.0 - step as f64,
        grad_norm: 1.25,
        learning_rate: 1.9e-4,
        num_tokens: 1000 * step,
        mean_token_accuracy: 0.5,
        tokens_per_second: 12_345.6,
        workers: 2,
        generation: 1,
        weights_digest: None,
        skipped: step == 4,
        eta_seconds: 62.0,
        mfu: Some(0.412),
        peak_memory_bytes: Some(1_500_000_000),
        seconds: 0.5,
        waiting_seconds: 0.25,
        shares: Vec::new(),
    })
}

#[test]
fn a_step_that_an_earlier_coordinator_saw_has_no_speed() {
    let RunEvent::StepCommitted(mut record) = step(4) else {
        unreachable!("step makes a StepCommitted")
    };
    record.tokens_per_second = f64::NAN;
    let line = progress::step_line(&record, record.loss, 5);
    assert!(line.starts_with("step 4/5 "), "{line}");
    assert!(
        line.ends_with("made before this coordinator began"),
        "{line}"
    );
}

fn job(flags: &[(&str, &str)]) -> JobSpec {
    let base = [
        ("base_model", "models/tiny"),
        ("dataset", "d.jsonl"),
        ("output_dir", "out"),
    ];
    let flags = base.iter().chain(flags);
    let flags = flags.map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    job::load(JobSources {
        flags: flags.collect(),
        ..JobSources::default()
    })
    .unwrap()
}

#[test]
fn without_a_terminal_there_is_one_line_per_logged_step() {
    let text = printed(2, [started()].into_iter().chain((1..=5).map(step)));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines,
        [
            "training 5 steps with 1 worker",
            "step 2/5  epoch 0.50  loss 3.5000  grad_norm 1.250  lr 1.9e-4  12,345 tokens/s  41.2% MFU  1.4 GiB  2 workers  eta 1:02",
            "step 4 skipped: its gradient is not finite or out of range",
            "step 4/5  epoch 1.00  loss 1.5000  grad_norm 1.250  lr 1.9e-4  12,345 tokens/s  41.2% MFU  1.4 GiB  2 workers  eta 1:02",
            "step 5/5  epoch 1.25  loss 0.0000  grad_norm 1.250  lr 1.9e-4  12,345 tokens/s  41.2% MFU  1.4 GiB  2 workers  eta 1:02",
        ]
    );
    assert!(!text.contains('\x1b'), "no colours, no cursor movements");
}

#[test]
fn what_happens_in_between_is_said() {
    let name = "host-1".to_owned();
    let text = printed(
        100,
        [
            RunEvent::WaitingForWorkers { have: 0, need: 2 },
            RunEvent::WorkerJoined {
                worker: 1,
                name: name.clone(),
                device: "cuda:0 (NVIDIA H200)".to_owned(),
                workers: 1,
            },
            RunEvent::Resumed {
                step: 7,
                path: "out/checkpoint-7".into(),
            },
            started(),
            started(),
            RunEvent::WorkerLost {
                worker: 1,
                name,
                reason: "connection \x1b[2Jlost".to_owned(),
                workers: 1,
            },
            RunEvent::CheckpointSaved {
                step: 3,
                path: "out/checkpoint-3".into(),
            },
            RunEvent::Evaluated(EvalRecord {
                step: 3,
                epoch: 1.0,
                eval_loss: 2.0,
                eval_mean_token_accuracy: 0.5,
                eval_runtime_seconds: 1.0,
                best: None,
            }),
            RunEvent::Notice("a notice".to_owned()),
            RunEvent::Ended(RunEnd::Done {
                step: 5,
                weights_digest: "abc".to_owned(),
            }),
        ],
    );
    let lines: Vec<&str> = text.lines().collect();
    let at = "1970-01-01T00:00:00Z";
    assert_eq!(
        lines,
        [
            &format!(
                "{at} waiting for workers: 0 of 2 are here; more may join, or stop this and start again with a lower --min-workers"
            ),
            &format!("{at} worker host-1 joined on cuda:0 (NVIDIA H200) (1 worker)"),
            &format!("{at} going on after step 7, from out/checkpoint-7"),
            "training 5 steps with 1 worker",
            &format!("{at} worker host-1 left: connection ␛[2Jlost (1 worker)"),
            &format!("{at} saved out/checkpoint-3"),
            &format!("{at} evaluation after step 3: eval_loss 2.0000, accuracy 50.0%"),
            &format!("{at} a notice"),
            "done after 5 steps in 0:00",
            "weights_digest abc",
        ]
    );
}

#[test]
fn on_a_terminal_the_steps_stay_above_the_bar_and_the_loss_is_drawn() {
    let done = RunEvent::Ended(RunEnd::Done {
        step: 5,
        weights_digest: "abc".to_owned(),
    });
    let events = || [started()].into_iter().chain((1..=5).map(step));
    let screen = Screen::of(PLAIN, 80);
    let (text, messages) = shown(Some(screen), 2, events().chain([done.clone()]));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines,
        [
            "step 2/5  epoch 0.50  loss 3.5000  grad_norm 1.250  lr 1.9e-4  12,345 tok/s",
            "step 4 skipped: its gradient is not finite or out of range",
            "step 4/5  epoch 1.00  loss 1.5000  grad_norm 1.250  lr 1.9e-4  12,345 tok/s",
            "step 5/5  epoch 1.25  loss 0.0000  grad_norm 1.250  lr 1.9e-4  12,345 tok/s",
            "1 step skipped, whose gradients were not finite or out of range",
            "loss  4.0000 #=-._ 0.0000  steps 1 to 5",
            "done after 5 steps in 0:00, loss 4.0000 -> 0.0000",
            "weights_digest abc",
        ]
    );
    assert_eq!(messages[0], "waiting for the first step of 1 worker");
    assert_eq!(
        messages[1],
        "loss 4.0000  lr 1.9e-4  12,345 tok/s  2 workers  eta 1:02"
    );
    // One loss at the end: that of the last line, here the mean of all steps.
    let (text, _) = shown(
        Some(Screen::of(PLAIN, 80)),
        10,
        events().chain([done.clone()]),
    );
    for said in [
        "step 5/5  epoch 1.25  loss 2.0000",
        "loss  4.0000 #=-._ 2.0000",
        "loss 4.0000 -> 2.0000",
    ] {
        assert!(text.contains(said), "{said}: {text}");
    }
    let unicode = Screen::of(COLOUR, 40);
    let (text, _) = shown(Some(unicode), 2, events().chain([done]));
    assert!(text.contains("loss  4.0000 █▆▅▃▁ 0.0000"), "{text}");
    assert!(
        text.contains("step 2/5  loss 3.5000  lr 1.9e-4\n"),
        "{text}"
    );
}

#[test]
fn the_bar_says_how_many_workers_are_waited_for() {
    let waiting = |have| RunEvent::WaitingForWorkers { have, need: 2 };
    let lost = RunEvent::WorkerLost {
        worker: 1,
        name: "host-1".to_owned(),
        reason: "gone".to_owned(),
        workers: 1,
    };
    let events = [
        waiting(0),
        joined(1),
        waiting(1),
        joined(2),
        started(),
        lost,
        waiting(1),
        started(),
    ];
    let (text, messages) = shown(Some(Screen::of(PLAIN, 80)), 1, events);
    assert_eq!(
        messages,
        [
            "waiting for 2 of 2 workers",
            "waiting for 1 of 2 workers",
            "waiting for 1 of 2 workers",
            "2 workers here, loading the model",
            "waiting for the first step of 1 worker",
            "waiting for the first step of 1 worker",
            "waiting for 1 of 2 workers",
            "training with 1 worker",
        ]
    );
    let reminders = text.matches("waiting for workers: ").count();
    assert_eq!(reminders, 2, "one line each time it begins: {text}");
}

#[test]
fn how_it_ended_is_said() {
    let stopped = RunEvent::Ended(RunEnd::Stopped {
        step: 3,
        reason: "Ctrl-C".to_owned(),
    });
    let text = printed(1, [started(), step(1), step(2), stopped]);
    assert!(
        text.ends_with("stopped after 3 steps in 0:00, loss 4.0000 -> 3.0000: Ctrl-C\n"),
        "{text}"
    );
}

#[test]
fn a_closed_pipe_does_not_stop_a_job() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
    }
    let mut terminal = Terminal::new(Box::new(Closed), PLAIN, None, 1);
    terminal.observe(&started());
    terminal.observe(&step(1));
}

#[test]
fn the_commands_can_be_copied() {
    let view = NextView {
        output_dir: Path::new("out puts"),
        base_model: Path::new("models/tiny"),
        is_adapter: true,
        is_four_bits: true,
        job_args: &["job.yaml", "--set", "lora_target_modules=[q_proj]"].map(str::to_owned),
        has_token: false,
        prompt: Some("Who's there?"),
        programs: Programs {
            coordinator: "coordinator".into(),
            worker: "worker".into(),
        },
    };
    let text = next::render(&view, PLAIN);
    assert!(
        text.contains(
            r"worker generate --model models/tiny --adapter 'out puts' --load-in-4bit --prompt 'Who'\''s there?'"
        ),
        "{text}"
    );
    assert!(
        text.contains(
            "coordinator start job.yaml --set 'lora_target_modules=[q_proj]' --output-dir 'out puts-2' \
             --listen 0.0.0.0:7077"
        ),
        "{text}"
    );
    assert!(text.contains("worker join HOST:7077   #"), "{text}");
    let full = NextView {
        is_adapter: false,
        is_four_bits: false,
        has_token: true,
        prompt: None,
        ..view
    };
    let text = next::render(&full, PLAIN);
    assert!(
        text.contains("worker generate --model 'out puts' --prompt Hello"),
        "{text}"
    );
    assert!(text.contains("worker join HOST:7077 --token-file FILE   #"));
}

#[test]
fn programs_are_called_as_this_machine_has_them() {
    let here = Path::new("/src/muster");
    let on_path = [PathBuf::from("/usr/bin")];
    let worker = |exe: &str, built: bool| {
        Programs::beside(Path::new(exe), here, &on_path, &|_| built).worker
    };
    assert_eq!(worker("/usr/bin/coordinator", true), "worker");
    assert_eq!(
        worker("/src/muster/target/release/coordinator", true),
        "target/release/worker"
    );
    assert_eq!(
        worker("/src/muster/target/release/coordinator", false),
        "cargo run --release -p worker --"
    );
    assert_eq!(
        worker("/src/muster/target/debug/coordinator", false),
        "cargo run -p worker --"
    );
    assert_eq!(
        worker("/opt/my tools/coordinator", true),
        "'/opt/my tools/worker'"
    );
}

#[test]
fn the_bar_fits_an_ordinary_terminal() {
    let RunEvent::StepCommitted(step) = step(1) else {
        panic!("no step")
    };
    let message = progress::bar_message(&step);
    assert_eq!(
        message,
        "loss 4.0000  lr 1.9e-4  12,345 tok/s  2 workers  eta 1:02"
    );
    assert!("━━━━━━━━━━━━ 100/1000 ".chars().count() + message.len() <= 80);
}

#[test]
fn numbers_read_well() {
    assert_eq!(grouped(1_234_567), "1,234,567");
    assert_eq!(grouped(999), "999");
    assert_eq!(bytes(1536), "1.5 KiB");
    assert_eq!(duration(7.4), "0:07");
    assert_eq!(duration(12_345.0), "3:25:45");
    assert_eq!(duration(200_000.0), "2 d 7:33:20");
    assert_eq!(duration(f64::INFINITY), "?");
    assert_eq!(duration(-1.0), "?");
    assert_eq!(text::rate(2e-4), "2e-4");
    assert_eq!(text::rate(1.934e-4), "1.93e-4");
    assert_eq!(text::rate(0.0), "0");
}
