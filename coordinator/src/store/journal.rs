//! The journal: what a coordinator must not forget, in one append-only file. A SIGKILL at any moment costs no recorded step.
//!
//! In: run events. Out: after a crash, the [`History`] that the next term begins with. Writing happens on a thread of its
//! own, many records to one fdatasync, and the driver never waits for it: what does not fit into the queue is found again
//! in the history when the file is written anew. A failed write or fsync is told, and never tried again on the same file.

mod history;
mod record;
mod shared;
#[cfg(test)]
mod tests;
mod writer;

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::files::{FileError, atomic};
use tokio::sync::mpsc;

pub use self::history::History;
pub use self::record::{Identity, Record, Step, Term};
use self::shared::{MAX_BYTES, Shared, State};
use self::writer::Writer;
use crate::cluster::Outcome;
use crate::cluster::run_event::RunEvent;
use crate::store::layout::WORK_FOLDER;

const FILE_NAME: &str = "journal";

/// The journal that was found in an output folder.
#[derive(Debug, Default)]
pub struct Found {
    pub history: History,
    /// What the user should know, a line each.
    pub notices: Vec<String>,
}

/// Reads the journal of an output folder, up to the last record that is whole.
pub fn read(output_dir: &Path) -> Result<Found, FileError> {
    let path = path(output_dir);
    let mut bytes = Vec::new();
    match File::open(&path) {
        Ok(file) => file
            // One batch may go beyond the limit before the file is written anew.
            .take(2 * MAX_BYTES)
            .read_to_end(&mut bytes)
            .map_err(FileError::io("read", &path))?,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Found::default()),
        Err(error) => return Err(FileError::io("read", &path)(error)),
    };
    let mut notices = Vec::new();
    let Some(decoded) = record::decode(&bytes) else {
        let reason = "it is no journal of this version";
        notices.push(format!("{} is passed over: {reason}", path.display()));
        return Ok(Found {
            notices,
            ..Found::default()
        });
    };
    if decoded.torn_bytes > 0 {
        notices.push(format!(
            "the last {} bytes of {} are damaged, as after a crash: {} records before them count",
            decoded.torn_bytes,
            path.display(),
            decoded.records.len()
        ));
    }
    Ok(Found {
        history: History::of(decoded.records),
        notices,
    })
}

/// Makes an identifier that no other run has: 32 hex digits.
pub fn draw_run() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let nanoseconds = since.unwrap_or_default().as_nanos();
    // Beside the time, the addresses of this process tell two coordinators apart that begin at the same moment.
    let here = std::ptr::from_ref(&nanoseconds) as usize;
    let text = format!("{nanoseconds} {} {here}", std::process::id());
    blake3::hash(text.as_bytes()).to_hex()[..32].to_owned()
}

fn path(output_dir: &Path) -> PathBuf {
    output_dir.join(WORK_FOLDER).join(FILE_NAME)
}

/// The journal of this term, open for records.
pub struct Journal {
    shared: Arc<Shared>,
    local_workers: usize,
    thread: Option<JoinHandle<()>>,
}

impl Journal {
    /// Begins a term. Its record is durable when this returns.
    ///
    /// `local_workers` live in this process and die with it.
    pub fn begin(
        output_dir: &Path,
        mut history: History,
        term: Term,
        local_workers: usize,
        observer: mpsc::Sender<RunEvent>,
    ) -> Result<Self, FileError> {
        history.add(Record::Term(term));
        let path = path(output_dir);
        if let Some(folder) = path.parent() {
            atomic::remove_leftovers(folder)?;
        }
        let writer = Writer::create(&path, &history)?;
        Ok(Self::with(writer, history, local_workers, observer))
    }

    fn with(
        writer: Writer,
        history: History,
        local_workers: usize,
        observer: mpsc::Sender<RunEvent>,
    ) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                history,
                waiting: Vec::new(),
                overflowed: false,
                closed: false,
                remembered: 0,
                durable: 0,
            }),
            changed: Condvar::new(),
            written: Condvar::new(),
        });
        let writing = shared.clone();
        let thread = std::thread::spawn(move || writer::write_all(writer, &writing, &observer));
        Self {
            shared,
            local_workers,
            thread: Some(thread),
        }
    }

    /// Records what an event says, if it is one to remember. Never waits for the disk.
    pub fn observe(&self, event: &RunEvent) {
        let mut state = self.shared.lock();
        if let Some(record) = state
            .history
            .record_of(event, SystemTime::now(), self.local_workers)
        {
            state.remember(record);
            self.shared.changed.notify_one();
        }
    }

    /// What waits until everything so far is on disk, or for so long: for a thread that may wait.
    pub fn durable(&self, timeout: Duration) -> impl FnOnce() + Send + 'static {
        let shared = self.shared.clone();
        let remembered = shared.lock().remembered;
        move || shared.wait_until_durable(remembered, timeout)
    }

    /// Records that the run ended, and waits until everything is on disk, as far as that can be had.
    pub fn end(self, outcome: &Outcome) {
        let resumable = matches!(
            outcome,
            Outcome::Stopped {
                resumable: true,
                ..
            }
        );
        self.shared.lock().remember(Record::Ended { resumable });
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
