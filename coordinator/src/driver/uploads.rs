//! A state on its way in: named files in chunks, written to the folder that waits for them, each checked by size and
//! digest before the next begins.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::wire::{MAX_FILES, check_digest};
use proto::v1::upload_chunk::Chunk;
use proto::v1::{FileEntry, UploadChunk, UploadHeader};
use tonic::{Code, Status, Streaming};

use crate::cluster::WorkerId;
use crate::driver::transfers::Expected;
use crate::store::checkpoints::Received;

/// Longest time between two chunks of an upload.
const CHUNK_DEADLINE: Duration = Duration::from_secs(60);

/// gRPC status of an upload that the coordinator's disk did not take.
pub const DISK_FAILED: Code = Code::ResourceExhausted;

/// Reads the first chunk of an upload, which says whose state it is and of which step.
pub async fn read_header(chunks: &mut Streaming<UploadChunk>) -> Result<UploadHeader, Status> {
    match next(chunks).await? {
        Some(Chunk::Header(header)) => Ok(header),
        _ => Err(Status::invalid_argument("an upload begins with its header")),
    }
}

/// Writes the files that follow the header, each checked by size and digest. At most `expected.max_bytes` in all.
pub async fn receive(
    header: UploadHeader,
    expected: Expected,
    chunks: &mut Streaming<UploadChunk>,
) -> Result<Received, Status> {
    let folder = expected.folder;
    let (mut names, mut files) = (HashSet::new(), Vec::new());
    let mut budget = expected.max_bytes;
    while let Some(chunk) = next(chunks).await? {
        let Chunk::File(entry) = chunk else {
            return Err(Status::invalid_argument("data without a file to belong to"));
        };
        check_entry(&entry, &mut names, budget)?;
        budget -= entry.size;
        receive_file(folder.path().join(&entry.path), &entry, chunks).await?;
        files.push(common::files::FileEntry {
            path: entry.path,
            size: entry.size,
            digest: entry.digest,
        });
    }
    if names.is_empty() {
        return Err(Status::invalid_argument("an upload without files"));
    }
    Ok(Received {
        worker: WorkerId(header.worker),
        step: header.step,
        weights_digest: header.weights_digest,
        files,
        folder,
    })
}

fn check_entry(entry: &FileEntry, names: &mut HashSet<String>, budget: u64) -> Result<(), Status> {
    // State folders are flat, so a name that could lead anywhere else is never needed.
    let plain = !entry.path.is_empty()
        && !entry.path.starts_with('.')
        && entry.path.len() <= 255
        && entry
            .path
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    if !plain || !names.insert(entry.path.clone()) || names.len() > MAX_FILES {
        return Err(Status::invalid_argument(format!(
            "an upload may not contain the file {:?}",
            entry.path
        )));
    }
    if entry.size > budget {
        return Err(Status::invalid_argument(format!(
            "{} has {} bytes, more than this state can have",
            entry.path, entry.size
        )));
    }
    check_digest("digest", &entry.digest)
        .map_err(|error| Status::invalid_argument(error.to_string()))
}

async fn receive_file(
    path: PathBuf,
    entry: &FileEntry,
    chunks: &mut Streaming<UploadChunk>,
) -> Result<(), Status> {
    let mut incoming = Incoming::create(path).await?;
    let mut missing = entry.size;
    while missing > 0 {
        let Some(Chunk::Data(data)) = next(chunks).await? else {
            return Err(Status::data_loss(format!("{} is cut short", entry.path)));
        };
        if data.is_empty() || data.len() as u64 > missing {
            return Err(Status::data_loss(format!(
                "{} has more bytes than announced",
                entry.path
            )));
        }
        missing -= data.len() as u64;
        incoming = incoming.take(data).await?;
    }
    if incoming.hasher.finalize().to_hex().as_str() != entry.digest {
        return Err(Status::data_loss(format!(
            "{} arrived with another digest than announced",
            entry.path
        )));
    }
    Ok(())
}

/// A file on its way in. It writes to the disk on threads of its own, so that calls are served meanwhile.
struct Incoming {
    path: PathBuf,
    file: File,
    hasher: blake3::Hasher,
}

impl Incoming {
    async fn create(path: PathBuf) -> Result<Self, Status> {
        beside(move || match File::create_new(&path) {
            Ok(file) => Ok(Self {
                path,
                file,
                hasher: blake3::Hasher::new(),
            }),
            Err(error) => Err(disk_failed(&path, &error)),
        })
        .await
    }

    async fn take(mut self, data: impl AsRef<[u8]> + Send + 'static) -> Result<Self, Status> {
        beside(move || {
            let data = data.as_ref();
            self.hasher.update(data);
            match self.file.write_all(data) {
                Ok(()) => Ok(self),
                Err(error) => Err(disk_failed(&self.path, &error)),
            }
        })
        .await
    }
}

async fn beside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(Status::internal("writing the state was interrupted")))
}

fn disk_failed(path: &Path, error: &io::Error) -> Status {
    Status::new(
        DISK_FAILED,
        format!("cannot write {}: {error}", path.display()),
    )
}

async fn next(chunks: &mut Streaming<UploadChunk>) -> Result<Option<Chunk>, Status> {
    let chunk = tokio::time::timeout(CHUNK_DEADLINE, chunks.message())
        .await
        .map_err(|_| Status::deadline_exceeded("the upload stopped"))??;
    match chunk {
        None => Ok(None),
        Some(UploadChunk { chunk: Some(chunk) }) => Ok(Some(chunk)),
        Some(_) => Err(Status::invalid_argument("an empty chunk")),
    }
}
