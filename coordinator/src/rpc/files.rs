//! Sends a file of the run to a worker, or says which other worker does.
//!
//! In: a digest and an offset. Out: the rest of the file in chunks, or the name of a worker that has it. A call of who may be named
//! to others stays open until the caller has verified the file.

use std::io::SeekFrom;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use common::wire::{CHUNK_BYTES, LEAST_SHARED_BYTES};
use proto::v1;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::cluster::WorkerId;
use crate::driver::sharing::{Caller, LEAST_BYTES_PER_SECOND, Source};
use crate::driver::transfers::Transfers;
use crate::rpc::service::Downstream;

/// Chunks read ahead of a slow receiver.
const CHUNKS_AHEAD: usize = 4;
/// What a sending between workers may take beside the time of its bytes.
const PASSING_ON: Duration = Duration::from_secs(60);
/// Between two words to who waits.
const STILL_WAITING: Duration = Duration::from_secs(10);
/// Workers that a caller may name as unusable.
const MAX_UNUSABLE: usize = 64;

/// Answers one call. `is_local`: it comes from this machine.
pub async fn send(
    shelf: Arc<Transfers>,
    request: v1::FetchFileRequest,
    is_local: bool,
) -> Result<Downstream<v1::FileChunk>, Status> {
    let v1::FetchFileRequest {
        digest,
        offset,
        worker,
        unusable,
    } = request;
    let (path, size) = shelf
        .find(&digest)
        .ok_or_else(|| Status::not_found("this run offers no file with that digest"))?;
    if offset > size {
        return Err(Status::out_of_range(format!(
            "offset {offset} is beyond the file's {size} bytes"
        )));
    }
    if unusable.len() > MAX_UNUSABLE {
        let named = unusable.len();
        return Err(Status::invalid_argument(format!(
            "{named} unusable workers are named, more than {MAX_UNUSABLE}"
        )));
    }
    let is_shared = worker != 0 && size - offset >= LEAST_SHARED_BYTES;
    let caller = is_shared.then(|| Caller {
        worker: WorkerId(worker),
        is_local,
        unusable: unusable.into_iter().map(WorkerId).collect(),
        waited: Duration::ZERO,
    });
    let rest = Rest::open(path, offset, size).await?;
    let (sender, chunks) = mpsc::channel(CHUNKS_AHEAD);
    tokio::spawn(async move {
        match caller {
            None => rest.send(&sender, |_| ()).await,
            Some(caller) => in_turn(&shelf, &digest, caller, rest, &sender).await,
        }
    });
    Ok(Box::pin(ReceiverStream::new(chunks)))
}

type Chunks = mpsc::Sender<Result<v1::FileChunk, Status>>;

/// Sends the rest of a file when it is the caller's turn, or says who does.
async fn in_turn(
    shelf: &Arc<Transfers>,
    digest: &str,
    caller: Caller,
    rest: Rest,
    sender: &Chunks,
) {
    let turn = match shelf.turn(digest, &caller) {
        Some(turn) => turn,
        None => tokio::select! {
            turn = shelf.wait_for_turn(digest, caller) => turn,
            () = say_that_it_waits(sender) => return,
        },
    };
    match turn {
        (Source::Coordinator, turn) => {
            let longest = longest(rest.bytes);
            rest.send(sender, |bytes| turn.moved(bytes)).await;
            turn.sent();
            let _ = tokio::time::timeout(longest, sender.closed()).await;
        }
        (Source::Worker(holder), _turn) => {
            let longest = longest(rest.bytes);
            let chunk = v1::FileChunk {
                from: Some(holder),
                ..v1::FileChunk::default()
            };
            let _ = sender.send(Ok(chunk)).await;
            // Until then this worker counts as busy.
            let _ = tokio::time::timeout(longest, sender.closed()).await;
        }
    }
}

/// Says again and again that others are served first, until nobody listens.
async fn say_that_it_waits(sender: &Chunks) {
    while sender.send(Ok(v1::FileChunk::default())).await.is_ok() {
        let _ = tokio::time::timeout(STILL_WAITING, sender.closed()).await;
    }
}

/// How long a caller may hold its turn to get so many bytes elsewhere, or to verify them.
fn longest(bytes: u64) -> Duration {
    PASSING_ON + Duration::from_secs(bytes / LEAST_BYTES_PER_SECOND)
}

/// What is to be sent of a file.
struct Rest {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl Rest {
    async fn open(path: PathBuf, offset: u64, size: u64) -> Result<Self, Status> {
        let opened = async {
            let mut file = File::open(&path).await?;
            file.seek(SeekFrom::Start(offset)).await?;
            Ok(file)
        };
        let file = opened.await.map_err(|error| unreadable(&path, &error))?;
        Ok(Self {
            path,
            file,
            bytes: size - offset,
        })
    }

    /// Sends it in chunks until the end or until nobody listens any more; `moved` hears of each.
    async fn send(self, sender: &Chunks, moved: impl Fn(u64)) {
        let mut file = self.file.take(self.bytes);
        loop {
            let mut data = Vec::with_capacity(CHUNK_BYTES);
            let mut piece = (&mut file).take(CHUNK_BYTES as u64);
            let read = piece.read_to_end(&mut data).await;
            let chunk = match &read {
                Ok(0) => return,
                Ok(_) => Ok(v1::FileChunk {
                    data: data.into(),
                    from: None,
                }),
                Err(error) => Err(unreadable(&self.path, error)),
            };
            if sender.send(chunk).await.is_err() {
                return;
            }
            moved(read.unwrap_or_default() as u64);
        }
    }
}

fn unreadable(path: &std::path::Path, error: &std::io::Error) -> Status {
    Status::data_loss(format!("cannot read {}: {error}", path.display()))
}
