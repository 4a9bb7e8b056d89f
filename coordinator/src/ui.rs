//! What the user sees on the terminal: the plan, a sample of the data, the progress, and at the end what came out and
//! how to go on. Plain views and run events enter, text leaves; nothing depends on whether anybody reads it.
//!
//! On a terminal there is a progress bar. Where standard output is none, there is one plain line per logged step. What nobody
//! reads is dropped and counted ([`common::streams`]): nothing here waits for a reader.

mod answers;
mod bar_terminal;
mod next;
mod plan;
mod preparation;
mod progress;
mod sample;
mod text;

use std::io::{IsTerminal, Write};
use std::time::Instant;

use common::data::Sample;
use common::streams;
use indicatif::{ProgressBar, ProgressDrawTarget};

pub use answers::Answer;
pub use next::{NextView, Programs, quoted};
pub use plan::{PlanView, block_count};
pub use preparation::showing;
pub use text::{Style, bytes, duration, grouped};

use crate::events::{RunEnd, RunEvent, StepRecord};
use bar_terminal::BarTerminal;
use progress::Mean;

/// Pictures of the bar in a second, at most.
const BAR_HZ: u8 = 20;

/// The user's side of a run.
pub struct Terminal {
    out: Box<dyn Write + Send>,
    style: Style,
    /// Whether there may be a bar.
    interactive: bool,
    bar: Option<ProgressBar>,
    logging_steps: u64,
    total_steps: u64,
    since_last_line: Mean,
    first_loss: Option<f64>,
    last_loss: Option<f64>,
    began: Instant,
    first_step: Option<u64>,
    skipped_steps: u64,
}

impl Terminal {
    /// Standard output, with colours and a progress bar where that is a terminal. Respects `NO_COLOR`.
    pub fn stdout(logging_steps: u64) -> Self {
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        let interactive = std::io::stdout().is_terminal() && !dumb;
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let style = Style {
            colour: interactive && !no_color,
        };
        Self::new(
            Box::new(streams::stdout()),
            style,
            interactive,
            logging_steps,
        )
    }

    fn new(
        out: Box<dyn Write + Send>,
        style: Style,
        interactive: bool,
        logging_steps: u64,
    ) -> Self {
        Self {
            out,
            style,
            interactive,
            bar: None,
            logging_steps: logging_steps.max(1),
            total_steps: 0,
            since_last_line: Mean::default(),
            first_loss: None,
            last_loss: None,
            began: Instant::now(),
            first_step: None,
            skipped_steps: 0,
        }
    }

    pub fn style(&self) -> Style {
        self.style
    }

    pub fn show_plan(&mut self, plan: &PlanView) {
        self.total_steps = plan.total_steps;
        self.print(&plan::render(plan, self.style));
    }

    /// The rendered text, what is learned of it marked.
    pub fn show_sample(&mut self, sample: &Sample) {
        self.print(&sample::render(sample, self.style));
    }

    /// A line of its own, above the progress bar.
    pub fn say(&mut self, line: &str) {
        self.print(&format!("{}\n", text::visible(line)));
    }

    pub fn show_answers(&mut self, answers: &[Answer]) {
        self.print(&answers::render(answers, self.style));
    }

    /// Where the result is and which commands go on from there.
    pub fn show_next(&mut self, view: &NextView) {
        self.print(&next::render(view, self.style));
    }

    pub fn observe(&mut self, event: &RunEvent) {
        match event {
            RunEvent::Started {
                step,
                total_steps,
                workers,
                ..
            } => self.start(*step, *total_steps, *workers),
            RunEvent::StepCommitted(step) => self.step(step),
            RunEvent::Ended(end) => self.end(end),
            other => {
                if let Some(line) = progress::event_line(other) {
                    self.say(&line);
                }
            }
        }
    }

    fn start(&mut self, step: u64, total_steps: u64, workers: usize) {
        self.total_steps = total_steps;
        if self.first_step.is_some() {
            return;
        }
        self.first_step = Some(step);
        self.began = Instant::now();
        if self.interactive {
            let bar = ProgressBar::with_draw_target(Some(total_steps), bar_target());
            bar.set_style(progress::bar_style(self.style));
            bar.set_position(step);
            bar.set_message("waiting for the first step");
            self.bar = Some(bar);
        } else {
            let workers = text::count(workers as u64, "worker");
            self.say(&format!(
                "training {} steps with {workers}",
                grouped(total_steps - step.min(total_steps))
            ));
        }
    }

    fn step(&mut self, step: &StepRecord) {
        self.first_loss.get_or_insert(step.loss);
        self.last_loss = Some(step.loss);
        self.since_last_line.add(step.loss);
        if step.skipped {
            self.skipped_steps += 1;
            self.say(&format!(
                "step {} skipped: its gradient is not finite or out of range",
                step.step
            ));
        }
        if let Some(bar) = &self.bar {
            bar.set_message(progress::bar_message(step));
            bar.set_position(step.step);
            return;
        }
        if step.step.is_multiple_of(self.logging_steps) || step.step == self.total_steps {
            let loss = self.since_last_line.take();
            self.say(&progress::step_line(step, loss, self.total_steps));
        }
    }

    fn end(&mut self, end: &RunEnd) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        if self.skipped_steps > 0 {
            let skipped = text::count(self.skipped_steps, "step");
            self.say(&format!(
                "{skipped} skipped, whose gradients were not finite or out of range"
            ));
        }
        let losses = match (self.first_loss, self.last_loss) {
            (Some(first), Some(last)) => Some((first, last)),
            _ => None,
        };
        let elapsed = self.began.elapsed().as_secs_f64();
        let text = progress::end_text(end, losses, elapsed, self.style);
        self.print(&text);
    }

    /// Nobody reading is no reason for a job to fail, so write errors are passed over.
    fn print(&mut self, text: &str) {
        let out = &mut self.out;
        let mut write = || {
            let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
        };
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }
}

/// Where a bar is drawn: beside the lines, in the same order.
fn bar_target() -> ProgressDrawTarget {
    let terminal = BarTerminal::new(streams::stdout());
    ProgressDrawTarget::term_like_with_hz(Box::new(terminal), BAR_HZ)
}

#[cfg(test)]
mod tests;
