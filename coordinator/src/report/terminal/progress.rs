//! What is said while a job runs: the bar's message, plain lines, and how it ended.

use indicatif::ProgressStyle;

use super::text::{Style, bytes, count, duration, grouped, rate, visible};
use crate::cluster::run_event::{RunEnd, RunEvent, StepRecord};

/// Mean of the values since it was last taken.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Mean {
    sum: f64,
    values: u64,
}

impl Mean {
    pub fn add(&mut self, value: f64) {
        self.sum += value;
        self.values += 1;
    }

    pub fn merge(&mut self, other: Self) {
        self.sum += other.sum;
        self.values += other.values;
    }

    pub fn values(&self) -> u64 {
        self.values
    }

    pub fn take(&mut self) -> f64 {
        let mean = self.sum / self.values as f64;
        *self = Self::default();
        mean
    }
}

pub(super) fn bar_style(style: Style) -> ProgressStyle {
    let template = match style.colour {
        true => "{bar:12.green/dim} {pos}/{len} {wide_msg}",
        false => "{bar:12} {pos}/{len} {wide_msg}",
    };
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars(bar_signs(style))
}

/// Signs of the bar: done, at work, and to be done.
pub(super) fn bar_signs(style: Style) -> &'static str {
    match style.unicode {
        true => "━━─",
        false => "=>-",
    }
}

/// What the bar says while nothing can be computed; `have` workers are here.
pub(super) fn waiting_message(have: usize, need: usize) -> String {
    match need.saturating_sub(have) {
        0 => format!("{} here, loading the model", count(have as u64, "worker")),
        missing => format!("waiting for {missing} of {}", count(need as u64, "worker")),
    }
}

/// What the bar says of a step: fits beside it in 80 columns.
pub(super) fn bar_message(step: &StepRecord) -> String {
    format!(
        "loss {:.4}  lr {}  {} tok/s  {}  eta {}",
        step.loss,
        rate(step.learning_rate),
        grouped(step.tokens_per_second.max(0.0) as u64),
        count(step.workers as u64, "worker"),
        duration(step.eta_seconds)
    )
}

/// One logged step above the bar, which has the rest; `loss` is the mean since the line before. What matters least gives way
/// where the terminal is narrow.
pub(super) fn short_step_line(
    step: &StepRecord,
    loss: f64,
    total_steps: u64,
    columns: usize,
) -> String {
    let speed = match step.tokens_per_second.is_finite() {
        true => format!("{} tok/s", grouped(step.tokens_per_second.max(0.0) as u64)),
        false => "made before this coordinator began".to_owned(),
    };
    let mut parts = vec![
        (0, format!("step {}/{total_steps}", step.step)),
        (3, format!("epoch {:.2}", step.epoch)),
        (0, format!("loss {loss:.4}")),
        (2, format!("grad_norm {:.3}", step.grad_norm)),
        (1, format!("lr {}", rate(step.learning_rate))),
        (4, speed),
    ];
    parts.extend(step.mfu.map(|mfu| (5, format!("{:.1}% MFU", 100.0 * mfu))));
    parts.extend(step.peak_memory_bytes.map(|peak| (6, bytes(peak))));
    fitting(parts, columns)
}

/// The parts on one line, without as many of the highest rank as it takes to fit.
fn fitting(mut parts: Vec<(u8, String)>, columns: usize) -> String {
    loop {
        let line: Vec<&str> = parts.iter().map(|(_, part)| part.as_str()).collect();
        let line = line.join("  ");
        let least = parts.iter().map(|(rank, _)| *rank).max().unwrap_or(0);
        if least == 0 || line.chars().count() <= columns {
            return line;
        }
        parts.retain(|(rank, _)| *rank != least);
    }
}

/// One logged step; `loss` is the mean since the line before.
pub(super) fn step_line(step: &StepRecord, loss: f64, total_steps: u64) -> String {
    let what = format!(
        "step {}/{total_steps}  epoch {:.2}  loss {loss:.4}  grad_norm {:.3}  lr {}",
        step.step,
        step.epoch,
        step.grad_norm,
        rate(step.learning_rate),
    );
    if !step.tokens_per_second.is_finite() {
        return format!("{what}  made before this coordinator began");
    }
    format!(
        "{what}  {} tokens/s{}  {}  eta {}",
        grouped(step.tokens_per_second as u64),
        utilisation(step),
        count(step.workers as u64, "worker"),
        duration(step.eta_seconds)
    )
}

/// Model FLOP utilisation and memory, where they are known.
fn utilisation(step: &StepRecord) -> String {
    let mfu = step.mfu.map(|mfu| format!("  {:.1}% MFU", 100.0 * mfu));
    let memory = step.peak_memory_bytes;
    let memory = memory.map(|peak| format!("  {}", bytes(peak)));
    mfu.unwrap_or_default() + &memory.unwrap_or_default()
}

/// The line of an event that has no place of its own; None for the others.
pub(super) fn event_line(event: &RunEvent) -> Option<String> {
    Some(match event {
        RunEvent::WorkerJoined {
            name,
            device,
            workers,
            ..
        } => {
            let on = match device.is_empty() {
                true => String::new(),
                false => format!(" on {}", visible(device)),
            };
            format!(
                "worker {name} joined{on} ({})",
                count(*workers as u64, "worker")
            )
        }
        RunEvent::WorkerLost {
            name,
            reason,
            workers,
            ..
        } => {
            format!(
                "worker {name} left: {reason} ({})",
                count(*workers as u64, "worker")
            )
        }
        RunEvent::WaitingForWorkers { have, need } => {
            let lower = match need {
                0 | 1 => "",
                _ => "; more may join, or stop this and start again with a lower --min-workers",
            };
            format!("waiting for workers: {have} of {need} are here{lower}")
        }
        RunEvent::Resumed { step, path } => {
            format!("going on after step {step}, from {}", path.display())
        }
        RunEvent::Evaluated(eval) => format!(
            "evaluation after step {}: eval_loss {:.4}, accuracy {:.1}%{}",
            eval.step,
            eval.eval_loss,
            100.0 * eval.eval_mean_token_accuracy,
            match eval.best {
                Some(best) if best.step == eval.step => ", the best so far",
                _ => "",
            }
        ),
        RunEvent::CheckpointSaved { path, .. } => format!("saved {}", path.display()),
        RunEvent::Notice(text) => text.clone(),
        _ => return None,
    })
}

/// The text that ends a run. `losses` are the first and the last.
pub(super) fn end_text(
    end: &RunEnd,
    losses: Option<(f64, f64)>,
    seconds: f64,
    style: Style,
) -> String {
    let losses = match losses {
        Some((first, last)) => format!(", loss {first:.4} -> {last:.4}"),
        None => String::new(),
    };
    let time = duration(seconds);
    match end {
        RunEnd::Done {
            step,
            weights_digest,
        } => format!(
            "{} after {} in {time}{losses}\nweights_digest {weights_digest}\n",
            style.bold("done"),
            count(*step, "step")
        ),
        RunEnd::Stopped { step, reason } => format!(
            "{} after {} in {time}{losses}: {}\n",
            style.bold("stopped"),
            count(*step, "step"),
            super::text::visible(reason)
        ),
        // The reason goes to standard error, with the exit code.
        RunEnd::Failed { .. } => format!("{} after {time}{losses}\n", style.bold("failed")),
    }
}
