//! `metrics.jsonl`: a line for every committed step and for every evaluation, in order, each written whole. What a full
//! disk does not take is kept, and written once it does.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use common::files::durable;
use common::timestamp;
use serde_json::{Value, json};

use super::error::OutputError;
use super::line::{Line, object};
use super::totals;
use crate::cluster::run_event::{EvalRecord, StepRecord};

const MAX_LINE_BYTES: u64 = 64 << 10;
/// Most bytes of lines that wait for room on the disk. What comes later is lost to the file.
const MAX_WAITING_BYTES: usize = 16 << 20;

/// `metrics.jsonl`, open for further lines.
pub(super) struct Metrics {
    file: File,
    path: PathBuf,
    /// Bytes of the whole lines in the file; after a failed write, part of one may follow.
    written: u64,
    /// Whole lines that are not in the file yet.
    waiting: Vec<u8>,
}

impl Metrics {
    /// Opens or makes the file, cuts off what comes after `last_step` or is broken, and shows every kept line. None: cuts off all.
    pub fn open(
        path: &Path,
        last_step: Option<u64>,
        mut keep: impl FnMut(&Line),
    ) -> Result<Self, OutputError> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(OutputError::io("open", path))?;
        let kept = match last_step {
            Some(step) => kept_bytes(&mut file, step, &mut keep),
            None => Ok(0),
        };
        let kept = kept.map_err(OutputError::io("read", path))?;
        file.set_len(kept)
            .and_then(|()| file.seek(SeekFrom::Start(kept)))
            .map_err(OutputError::io("cut off old lines of", path))?;
        Ok(Self {
            file,
            path: path.to_owned(),
            written: kept,
            waiting: Vec::new(),
        })
    }

    /// Appends a line. What does not fit on the disk is kept and written with a later one.
    pub fn append(&mut self, line: &Line) -> Result<(), OutputError> {
        let text = serde_json::to_string(line).unwrap_or_default();
        if self.waiting.len() + text.len() < MAX_WAITING_BYTES {
            self.waiting.extend(text.as_bytes());
            self.waiting.push(b'\n');
        }
        self.write_waiting()
    }

    /// From here on no write works.
    #[cfg(test)]
    pub fn break_file(&mut self) {
        if let Ok(file) = File::open(&self.path) {
            self.file = file;
        }
    }

    #[cfg(test)]
    pub fn mend_file(&mut self) {
        let file = OpenOptions::new().write(true).open(&self.path);
        if let Ok(mut file) = file
            && file.seek(SeekFrom::End(0)).is_ok()
        {
            self.file = file;
        }
    }

    /// An error where the file was removed: it would take every line, and nobody would ever see them.
    fn check_place(&self) -> Result<(), OutputError> {
        match self.path.try_exists() {
            Ok(false) => Err(OutputError::Removed {
                dir: self.path.parent().unwrap_or(&self.path).to_owned(),
            }),
            _ => Ok(()),
        }
    }

    fn write_waiting(&mut self) -> Result<(), OutputError> {
        self.check_place()?;
        let written = self.file.write_all(&self.waiting);
        if written.is_err() {
            // Part of a line would spoil every line after it. Shorter is possible on a full disk, too.
            let end = SeekFrom::Start(self.written);
            let cut = self.file.set_len(self.written);
            cut.and_then(|()| self.file.seek(end))
                .map_err(OutputError::io("cut off half a line of", &self.path))?;
        }
        written.map_err(OutputError::io("write", &self.path))?;
        self.written += self.waiting.len() as u64;
        self.waiting.clear();
        Ok(())
    }

    /// Writes what waits and makes the file durable.
    pub fn make_durable(&mut self) -> Result<(), OutputError> {
        self.write_waiting()?;
        durable::sync_data(&self.file, &self.path)
            .map_err(OutputError::io("make durable", &self.path))
    }
}

/// Length in bytes of the lines up to `last_step`. A line that a crash cut off ends the file.
fn kept_bytes(
    file: &mut File,
    last_step: u64,
    keep: &mut dyn FnMut(&Line),
) -> std::io::Result<u64> {
    let mut reader = BufReader::new(file);
    let mut kept = 0;
    let mut text = Vec::new();
    loop {
        text.clear();
        let read = reader
            .by_ref()
            .take(MAX_LINE_BYTES)
            .read_until(b'\n', &mut text)?;
        let Some(whole) = text.strip_suffix(b"\n") else {
            return Ok(kept);
        };
        match serde_json::from_slice::<Line>(whole) {
            Ok(line)
                if line
                    .get("step")
                    .and_then(Value::as_u64)
                    .is_some_and(|step| step <= last_step) =>
            {
                keep(&line);
                kept += read as u64;
            }
            _ => return Ok(kept),
        }
    }
}

/// Place of a line in the file's order: its step, and whether it is an evaluation, which comes after the step's own line.
pub(super) fn place(line: &Line) -> Option<(u64, bool)> {
    let step = line.get("step").and_then(Value::as_u64)?;
    Some((step, line.contains_key("eval_loss")))
}

/// The line of a committed step, under the names of Transformers and TRL where they have one. `at`: when it was recorded.
pub(super) fn step_line(step: &StepRecord, at: SystemTime) -> Line {
    let mut line = object(json!({
        "step": step.step,
        "epoch": step.epoch,
        "loss": step.loss,
        "grad_norm": step.grad_norm,
        "learning_rate": step.learning_rate,
        "num_tokens": step.num_tokens,
        "tokens_per_second": step.tokens_per_second,
        "mean_token_accuracy": step.mean_token_accuracy,
        "workers": step.workers,
        "generation": step.generation,
        "weights_digest": step.weights_digest,
        "time": timestamp::milliseconds(at),
        "step_seconds": step.seconds,
        "waiting_seconds": step.waiting_seconds,
    }));
    totals::add_shares(&mut line, &step.shares);
    if let Some(mfu) = step.mfu {
        line.insert("mfu".to_owned(), mfu.into());
    }
    if let Some(bytes) = step.peak_memory_bytes {
        line.insert("peak_memory_bytes".to_owned(), bytes.into());
    }
    if step.skipped {
        line.insert("skipped".to_owned(), Value::Bool(true));
    }
    line
}

pub(super) fn eval_line(eval: &EvalRecord, at: SystemTime) -> Line {
    let mut line = object(json!({
        "step": eval.step,
        "epoch": eval.epoch,
        "eval_loss": eval.eval_loss,
        "eval_mean_token_accuracy": eval.eval_mean_token_accuracy,
        "eval_runtime": eval.eval_runtime_seconds,
        "time": timestamp::milliseconds(at),
    }));
    if let Some(best) = eval.best {
        line.insert("best_metric".to_owned(), best.metric.into());
        line.insert("best_global_step".to_owned(), best.step.into());
    }
    line
}
