//! What the user sees on the terminal: the plan, a sample of the data, the progress, and at the end what came out and
//! how to go on. Plain views and run events enter, text leaves; nothing depends on whether anybody reads it.
//!
//! On a terminal there is a progress bar below the lines of the steps, and at the end a picture of the loss. Where standard
//! output is none, there are lines alone. What nobody reads is dropped and counted ([`common::streams`]): nothing here waits for
//! a reader.

mod answers;
mod bar_terminal;
mod curve;
mod next;
mod plan;
mod preparation;
mod progress;
mod sample;
mod screen;
mod text;

use std::io::Write;
use std::time::{Instant, SystemTime};

use common::data::Sample;
use common::streams;
use common::timestamp;
use indicatif::{ProgressBar, ProgressDrawTarget};

pub use answers::Answer;
pub use next::{NextView, Programs, quoted};
pub use plan::{
    GPUS, PlanView, adapter_kind, adapter_start, bits, block_count, full_fine_tuning,
    parameter_count, set_lines,
};
pub use preparation::showing;
pub use text::{Style, bytes, duration, grouped};

use crate::cluster::run_event::{RunEnd, RunEvent, StepRecord};
use bar_terminal::BarTerminal;
use curve::Curve;
use progress::Mean;
use screen::Screen;

/// Most redraws of the progress bar in a second.
const BAR_HZ: u8 = 20;

/// The user's side of a run.
pub struct Terminal {
    out: Box<dyn Write + Send>,
    style: Style,
    /// The clock; another one in tests.
    now: fn() -> SystemTime,
    /// Standard output where it is a terminal that can show a bar.
    screen: Option<Screen>,
    bar: Option<ProgressBar>,
    logging_steps: u64,
    /// Whether the first step has a line, too.
    logs_first: bool,
    total_steps: u64,
    since_last_line: Mean,
    first_loss: Option<f64>,
    last_loss: Option<f64>,
    losses: Curve,
    began: Instant,
    first_step: Option<u64>,
    skipped_steps: u64,
    /// How many workers are waited for; None while nothing waits.
    needed_workers: Option<usize>,
}

impl Terminal {
    /// Standard output, with colours and a progress bar where that is a terminal. Respects `NO_COLOR`.
    pub fn stdout(logging_steps: u64) -> Self {
        let screen = Screen::of_stdout();
        let style = screen.as_ref().map_or_else(Style::default, Screen::style);
        Self::new(Box::new(streams::stdout()), style, screen, logging_steps)
    }

    /// Gives the first step a line of its own, too.
    pub fn logging_first(self, logs_first: bool) -> Self {
        Self { logs_first, ..self }
    }

    fn new(
        out: Box<dyn Write + Send>,
        style: Style,
        screen: Option<Screen>,
        logging_steps: u64,
    ) -> Self {
        Self {
            out,
            style,
            now: SystemTime::now,
            screen,
            bar: None,
            logging_steps: logging_steps.max(1),
            logs_first: false,
            total_steps: 0,
            since_last_line: Mean::default(),
            first_loss: None,
            last_loss: None,
            losses: Curve::default(),
            began: Instant::now(),
            first_step: None,
            skipped_steps: 0,
            needed_workers: None,
        }
    }

    pub fn style(&self) -> Style {
        self.style
    }

    /// Shows the plan of a run, before it begins.
    pub fn show_plan(&mut self, plan: &PlanView) {
        self.total_steps = plan.total_steps;
        let columns = self.screen.as_ref().map(Screen::columns);
        self.print(&plan::render(plan, self.style, columns));
    }

    /// Shows the rendered text of an example, with what is learned of it marked.
    pub fn show_sample(&mut self, sample: &Sample) {
        self.print(&sample::render(sample, self.style));
    }

    /// Prints a line of its own, above the progress bar.
    pub fn say(&mut self, line: &str) {
        self.print(&format!("{}\n", text::visible(line)));
    }

    /// Shows the answers to the test prompts, before and after training.
    pub fn show_answers(&mut self, answers: &[Answer]) {
        self.print(&answers::render(answers, self.style));
    }

    /// Says where the result is and which commands go on from there.
    pub fn show_next(&mut self, view: &NextView) {
        self.print(&next::render(view, self.style));
    }

    /// Shows what an event says.
    pub fn observe(&mut self, event: &RunEvent) {
        match event {
            RunEvent::Started {
                step,
                total_steps,
                workers,
                ..
            } => self.start(*step, *total_steps, *workers),
            RunEvent::StepCommitted(step) => self.step(step),
            RunEvent::WaitingForWorkers { have, need } => self.wait(*have, *need, event),
            RunEvent::WorkerJoined { workers, .. } | RunEvent::WorkerLost { workers, .. } => {
                self.tell(event);
                if let Some(need) = self.needed_workers {
                    self.set_message(progress::waiting_message(*workers, need));
                }
            }
            RunEvent::Ended(end) => self.end(end),
            other => self.tell(other),
        }
    }

    /// Prints an event's line, with its time where the lines are a log.
    fn tell(&mut self, event: &RunEvent) {
        let Some(line) = progress::event_line(event) else {
            return;
        };
        match self.screen {
            Some(_) => self.say(&line),
            None => self.say(&format!("{} {line}", timestamp::seconds((self.now)()))),
        }
    }

    /// Says that workers are missing: the bar shows it until there are enough, lines remind of it.
    fn wait(&mut self, have: usize, need: usize, event: &RunEvent) {
        let is_new = self.needed_workers.replace(need) != Some(need);
        if is_new || self.screen.is_none() {
            self.tell(event);
        }
        self.show_bar();
        self.set_message(progress::waiting_message(have, need));
    }

    fn start(&mut self, step: u64, total_steps: u64, workers: usize) {
        self.total_steps = total_steps;
        let count = text::count(workers as u64, "worker");
        if self.needed_workers.take().is_some() {
            self.set_message(format!("training with {count}"));
        }
        if self.first_step.is_some() {
            return;
        }
        self.first_step = Some(step);
        self.began = Instant::now();
        match self.screen {
            Some(_) => {
                self.show_bar();
                if let Some(bar) = &self.bar {
                    bar.set_length(total_steps);
                    bar.set_position(step);
                }
                self.set_message(format!("waiting for the first step of {count}"));
            }
            None => self.say(&format!(
                "training {} with {count}",
                text::count(total_steps - step.min(total_steps), "step")
            )),
        }
    }

    fn step(&mut self, step: &StepRecord) {
        self.first_loss.get_or_insert(step.loss);
        self.losses.add(step.step, step.loss);
        self.since_last_line.add(step.loss);
        if step.skipped {
            self.skipped_steps += 1;
            self.say(&format!(
                "step {} skipped: its gradient is not finite or out of range",
                step.step
            ));
        }
        let is_first = self.logs_first && step.step == 1;
        if is_first || step.step.is_multiple_of(self.logging_steps) || step.step == self.total_steps
        {
            let loss = self.since_last_line.take();
            self.last_loss = Some(loss);
            let line = match &self.screen {
                Some(screen) => {
                    progress::short_step_line(step, loss, self.total_steps, screen.columns())
                }
                None => progress::step_line(step, loss, self.total_steps),
            };
            self.say(&line);
        }
        self.set_message(progress::bar_message(step));
        if let Some(bar) = &self.bar {
            bar.set_position(step.step);
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
        // What the last line said, unless steps followed it: one loss at the end, not several means of it.
        let last_loss = match self.since_last_line.values() {
            0 => self.last_loss,
            _ => Some(self.since_last_line.take()),
        };
        let losses = self.first_loss.zip(last_loss);
        if self.screen.is_some()
            && let Some(losses) = losses
            && let Some(curve) = self.losses.render(self.style.unicode, losses)
        {
            self.say(&curve);
        }
        let elapsed = self.began.elapsed().as_secs_f64();
        let text = progress::end_text(end, losses, elapsed, self.style);
        self.print(&text);
    }

    /// Begins the progress bar, on a terminal only.
    fn show_bar(&mut self) {
        if self.screen.is_none() || self.bar.is_some() {
            return;
        }
        let length = Some(self.total_steps);
        let bar = ProgressBar::with_draw_target(length, bar_target());
        bar.set_style(progress::bar_style(self.style));
        self.bar = Some(bar);
    }

    fn set_message(&self, message: String) {
        if let Some(bar) = &self.bar {
            bar.set_message(message);
        }
    }

    /// Prints text. Write errors are passed over: nobody reading is no reason for a job to fail.
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

/// The stream that a bar is drawn on: that of the lines, in the same order.
fn bar_target() -> ProgressDrawTarget {
    let terminal = BarTerminal::new(streams::stdout());
    ProgressDrawTarget::term_like_with_hz(Box::new(terminal), BAR_HZ)
}

#[cfg(test)]
mod tests;
