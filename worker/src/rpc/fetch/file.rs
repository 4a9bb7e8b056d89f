//! One file's way here: from the coordinator, or from the worker that it names, and verified.
//!
//! In: a file's name, size and digest. Out: the file, and who sent it. A broken call goes on where it ended.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use common::files::FileEntry;
use common::text;
use common::wire::CHUNK_BYTES;
use proto::v1;
use tokio::io::AsyncWriteExt;
use tonic::Streaming;

use super::{FetchError, Fetcher, holds, write_error};
use crate::rpc::connect::retry_delays;

/// Broken calls in a row, without a byte between them, after which a fetch is given up.
const MAX_FETCH_FAILURES: usize = 6;
/// Time between two log lines about a long fetch.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

impl Fetcher {
    /// Fetches what is missing of one file of a folder.
    pub(super) async fn file(
        &self,
        partial: &Path,
        path: &Path,
        entry: &FileEntry,
        sender: Sender,
    ) -> Result<Fetched, FetchError> {
        // The second time from the start, and from the coordinator alone: what was there already, or what another worker sent, may
        // have been of something else.
        for sender in [sender, Sender::Coordinator] {
            let found = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
            let mut fetched = Fetched::nothing();
            if found < entry.size {
                fetched = self.append(path, entry, found, sender).await?;
            } else if found == 0 {
                File::create(path).map_err(write_error(path, 0))?;
            }
            if holds(partial, std::slice::from_ref(entry)).await {
                return Ok(fetched);
            }
            if let Origin::Worker { worker, name } = fetched.origin {
                let path = &entry.path;
                tracing::warn!(
                    "{path} as {name} sent it is not what was announced; fetching it from the coordinator"
                );
                self.peers.give_up(worker);
            }
            std::fs::remove_file(path).map_err(write_error(path, 0))?;
        }
        Err(FetchError::Digest {
            path: entry.path.clone(),
            digest: entry.digest.clone(),
        })
    }

    /// Fetches what is missing behind the first `offset` bytes, calling again where a call breaks.
    async fn append(
        &self,
        path: &Path,
        entry: &FileEntry,
        offset: u64,
        sender: Sender,
    ) -> Result<Fetched, FetchError> {
        let mut end = End::open(path, entry, offset).await?;
        let mut delays = retry_delays(MAX_FETCH_FAILURES);
        let mut fetched = Fetched::nothing();
        while end.offset < entry.size {
            let before = end.offset;
            let reason = match self.call(&mut end, sender).await? {
                Ok(call) => {
                    fetched = call;
                    break;
                }
                Err(reason) => reason,
            };
            if end.offset > before {
                delays = retry_delays(MAX_FETCH_FAILURES);
            }
            let Some(delay) = delays.next() else {
                let path = entry.path.clone();
                return Err(FetchError::Broken { path, reason });
            };
            tracing::warn!("fetching {} broke off ({reason}); going on", entry.path);
            tokio::time::sleep(delay).await;
        }
        let synced = end.file.sync_all().await;
        synced.map_err(write_error(path, entry.size))?;
        Ok(fetched)
    }

    /// Makes one call. The inner error is the network's and may be tried again; the outer one is final.
    async fn call(
        &self,
        end: &mut End<'_>,
        sender: Sender,
    ) -> Result<Result<Fetched, String>, FetchError> {
        let request = v1::FetchFileRequest {
            digest: end.entry.digest.clone(),
            offset: end.offset,
            worker: match sender {
                Sender::Any => self.peers.worker,
                Sender::Coordinator => 0,
            },
            unusable: self.peers.unusable(),
        };
        let mut chunks = match self.client.clone().fetch_file(request).await {
            Ok(response) => response.into_inner(),
            Err(status) => return Ok(Err(status.message().to_owned())),
        };
        let (begun, mut waits) = (end.offset, false);
        let mut origin = Origin::Coordinator;
        while end.offset < end.entry.size {
            let chunk = match chunks.message().await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => return Ok(Err("it ended early".to_owned())),
                Err(status) => return Ok(Err(status.message().to_owned())),
            };
            match chunk.from {
                Some(from) => match self.pieces(end, &from).await? {
                    Ok(()) => {
                        origin = Origin::Worker {
                            worker: from.worker,
                            name: text::reason(&from.name),
                        };
                    }
                    Err(reason) => return Ok(Err(reason)),
                },
                None if chunk.data.is_empty() && end.offset == begun => {
                    if !std::mem::replace(&mut waits, true) {
                        let path = &end.entry.path;
                        tracing::info!("waiting for {path}: it is sent to others first");
                    }
                    end.touch().await?;
                }
                None => {
                    if let Err(reason) = end.push(&chunk.data).await? {
                        return Ok(Err(reason));
                    }
                }
            }
        }
        end.flush().await?;
        Ok(Ok(Fetched {
            origin,
            _turn: Some(chunks),
        }))
    }

    /// Takes the rest of a file from the worker that the coordinator has named. Errors as those of a call.
    async fn pieces(
        &self,
        end: &mut End<'_>,
        from: &v1::Member,
    ) -> Result<Result<(), String>, FetchError> {
        let name = text::reason(&from.name);
        tracing::info!("fetching {} from {name}, which has it", end.entry.path);
        let mut pieces = self.peers.fetch(from, end.entry, end.offset);
        while let Some(piece) = pieces.recv().await {
            let pushed = match piece {
                Ok(piece) => end.push(&piece).await?,
                Err(reason) => Err(reason),
            };
            if let Err(reason) = pushed {
                self.peers.give_up(from.worker);
                return Ok(Err(format!("{name} {reason}")));
            }
        }
        Ok(match end.offset == end.entry.size {
            true => Ok(()),
            false => Err(format!("{name} ended early")),
        })
    }
}

/// Who may send a file.
#[derive(Clone, Copy)]
pub(super) enum Sender {
    Any,
    Coordinator,
}

/// A file whose last byte is here. The coordinator names nobody else for it until this is dropped, so that whoever waits is sent to
/// this worker when it has verified and shared the file.
pub(super) struct Fetched {
    pub origin: Origin,
    _turn: Option<Streaming<v1::FileChunk>>,
}

impl Fetched {
    fn nothing() -> Self {
        Self {
            origin: Origin::Coordinator,
            _turn: None,
        }
    }
}

/// Who sent the last byte of a file.
pub(super) enum Origin {
    Coordinator,
    /// The worker of this number and name.
    Worker {
        worker: u64,
        name: String,
    },
}

/// The end of a file that is being fetched.
struct End<'a> {
    file: tokio::fs::File,
    path: &'a Path,
    entry: &'a FileEntry,
    /// Bytes before it.
    offset: u64,
    progress: Progress<'a>,
}

impl<'a> End<'a> {
    async fn open(path: &'a Path, entry: &'a FileEntry, offset: u64) -> Result<Self, FetchError> {
        let file = tokio::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .await
            .map_err(write_error(path, entry.size))?;
        Ok(Self {
            file,
            path,
            entry,
            offset,
            progress: Progress::new(entry),
        })
    }

    /// Adds what was received. The inner error says that it cannot be of this file.
    async fn push(&mut self, data: &[u8]) -> Result<Result<(), String>, FetchError> {
        let length = data.len();
        if length == 0 || length > CHUNK_BYTES || length as u64 > self.entry.size - self.offset {
            return Ok(Err(format!(
                "a chunk of {length} bytes where it has no place"
            )));
        }
        let written = self.file.write_all(data).await;
        written.map_err(write_error(self.path, self.entry.size))?;
        self.offset += length as u64;
        self.progress.show(self.offset);
        Ok(Ok(()))
    }

    /// Shows other workers of this machine, who wait for the folder, that it is still waited for here.
    async fn touch(&mut self) -> Result<(), FetchError> {
        let file = self.file.try_clone().await;
        let touched = match file {
            Ok(file) => file.into_std().await.set_modified(SystemTime::now()),
            Err(error) => Err(error),
        };
        touched.map_err(write_error(self.path, self.entry.size))
    }

    async fn flush(&mut self) -> Result<(), FetchError> {
        let flushed = self.file.flush().await;
        flushed.map_err(write_error(self.path, self.entry.size))
    }
}

/// Logs the progress of a fetch that takes long.
struct Progress<'a> {
    entry: &'a FileEntry,
    last: Instant,
}

impl<'a> Progress<'a> {
    fn new(entry: &'a FileEntry) -> Self {
        Self {
            entry,
            last: Instant::now(),
        }
    }

    fn show(&mut self, offset: u64) {
        if self.last.elapsed() >= PROGRESS_INTERVAL {
            self.last = Instant::now();
            let (path, all) = (&self.entry.path, self.entry.size >> 20);
            tracing::info!("fetching {path}: {} of {all} MiB", offset >> 20);
        }
    }
}
