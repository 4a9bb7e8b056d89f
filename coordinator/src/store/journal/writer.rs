//! The journal's thread: batches of records to the file, one fdatasync each.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use common::failpoint;
use common::files::{FileError, atomic, durable};
use tokio::sync::mpsc;

use super::history::History;
use super::record::{Chain, Record, encode};
use super::shared::{MAX_BYTES, Shared};
use crate::cluster::run_event::RunEvent;

/// Pause between two attempts to begin a new file after one failed.
const JOURNAL_RETRY: Duration = Duration::from_secs(5);

/// An open journal.
pub struct Writer {
    path: PathBuf,
    file: File,
    chain: Chain,
    bytes: u64,
}

impl Writer {
    /// Writes a new file that holds this history. It is durable before it has its name.
    pub fn create(path: &Path, history: &History) -> Result<Self, FileError> {
        let (bytes, chain) = encode(&history.compacted());
        failpoint::reached("journal-write");
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(FileError::io("create", folder))?;
        }
        atomic::write(path, &bytes)?;
        let file = OpenOptions::new()
            .append(true)
            .open(path)
            .map_err(FileError::io("open", path))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            chain,
            bytes: bytes.len() as u64,
        })
    }

    /// Appends records and makes them durable. After an error this file must not be written to any more: nobody knows
    /// what of it is on disk.
    pub fn append(&mut self, records: &[Record]) -> Result<(), FileError> {
        let mut bytes = Vec::new();
        for record in records {
            self.chain.append(record, &mut bytes);
        }
        // In two parts, so that a test can die between them.
        let (begun, rest) = bytes.split_at(bytes.len() / 2);
        let mut write = |part: &[u8]| {
            let written = self.file.write_all(part);
            written.map_err(FileError::io("write", &self.path))
        };
        write(begun)?;
        failpoint::reached("journal-write");
        write(rest)?;
        self.bytes += bytes.len() as u64;
        durable::sync_data(&self.file, &self.path)
            .map_err(FileError::io("make durable", &self.path))
    }

    /// Whether the file was removed: it would take every record, and keep none.
    fn is_removed(&self) -> bool {
        matches!(self.path.try_exists(), Ok(false))
    }

    #[cfg(test)]
    pub fn over(path: &Path, file: File) -> Self {
        Self {
            path: path.to_owned(),
            file,
            chain: Chain::start(),
            bytes: 0,
        }
    }
}

/// The next thing for the thread to do.
enum Task {
    Append(Vec<Record>),
    /// Write the file anew with all that is known.
    Rewrite(Box<History>),
    Nothing,
}

/// Writes until the journal is closed and nothing is left. Failures are told once, and once more when they are over.
pub fn write_all(writer: Writer, shared: &Shared, observer: &mpsc::Sender<RunEvent>) {
    let path = writer.path.clone();
    let mut writer = Some(writer);
    let mut failed_at: Option<Instant> = None;
    // An observer that is gone needs no words.
    let tell = |text: String| drop(observer.blocking_send(RunEvent::Notice(text)));
    loop {
        let (task, remembered, closed) = next(shared, writer.is_none(), failed_at);
        if matches!(task, Task::Append(_)) && writer.take_if(|writer| writer.is_removed()).is_some()
        {
            // All of it is in the history.
            continue;
        }
        let result = match (task, &mut writer) {
            (Task::Nothing, _) => Ok(()),
            (Task::Append(records), Some(writer)) => writer.append(&records),
            (Task::Append(_), None) => Ok(()),
            (Task::Rewrite(history), _) => Writer::create(&path, &history).map(|created| {
                writer = Some(created);
                if failed_at.take().is_some() {
                    tell(format!(
                        "{} is written again, with everything so far",
                        path.display()
                    ));
                }
            }),
        };
        if result.is_ok() && writer.is_some() {
            shared.note_durable(remembered);
        }
        if let Err(error) = result {
            writer = None;
            if failed_at.replace(Instant::now()).is_none() {
                tell(format!(
                    "{error}; training goes on, and the journal is begun anew as soon as that works: until then, steps \
                     may have to be computed again if the coordinator dies"
                ));
                // A new file may work at once where the old one does not.
                failed_at = Instant::now().checked_sub(JOURNAL_RETRY).or(failed_at);
                continue;
            }
        }
        let outgrown = writer
            .as_ref()
            .is_some_and(|writer| writer.bytes > MAX_BYTES);
        if outgrown {
            shared.lock().overflowed = true;
        }
        if closed {
            return;
        }
    }
}

/// Waits for something to do, and says how many records are durable once it is done, and whether it is the last. Where there is no file, only a new one will do.
fn next(shared: &Shared, is_broken: bool, failed_at: Option<Instant>) -> (Task, u64, bool) {
    let mut state = shared.lock();
    loop {
        let rest = failed_at.map_or(Duration::ZERO, |at| {
            JOURNAL_RETRY.saturating_sub(at.elapsed())
        });
        let rewrites = state.overflowed || is_broken;
        if rewrites && (rest.is_zero() || state.closed) {
            state.overflowed = false;
            state.waiting.clear();
            let task = Task::Rewrite(Box::new(state.history.clone()));
            return (task, state.remembered, state.closed);
        }
        if !rewrites && !state.waiting.is_empty() {
            let task = Task::Append(std::mem::take(&mut state.waiting));
            return (task, state.remembered, state.closed);
        }
        if state.closed {
            return (Task::Nothing, state.durable, true);
        }
        state = match rewrites {
            true => {
                shared
                    .changed
                    .wait_timeout(state, rest)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            }
            false => shared
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner),
        };
    }
}
