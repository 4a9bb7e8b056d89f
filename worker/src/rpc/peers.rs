//! Other workers that have files of the model, and what this one passes on to them.
//!
//! In: folders whose files are verified, and the worker that the coordinator names for a file. Out: the coordinator is told what is
//! held here; pieces of a file as they arrive.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use common::files::FileEntry;
use common::files::manifest::inside;
use common::wire::{LEAST_SHARED_BYTES, up};
use proto::v1;
use proto::v1::worker_message::Message as Up;
use tokio::sync::mpsc;

use crate::collective::files::{self, SharedFiles, Wanted, digest_of};
use crate::collective::greeting::FileHello;

/// Pieces of a file that wait to be written.
const PIECES_AHEAD: usize = 4;

/// This worker among those that pass files on.
pub struct Peers {
    /// What it passes on.
    pub shared: Arc<SharedFiles>,
    /// To the coordinator, as long as the session lasts.
    pub up: mpsc::WeakSender<v1::WorkerMessage>,
    pub run_id: [u8; 32],
    /// Its number.
    pub worker: u64,
    /// Workers from whom it did not get a file.
    pub unusable: Mutex<Vec<u64>>,
}

impl Peers {
    /// Passes on the large ones of a folder's files, which are verified, and says so.
    pub async fn share(&self, folder: &Path, entries: &[FileEntry]) {
        self.share_from(folder, entries);
        self.announce().await;
    }

    /// Passes on the large ones of a folder's files from there, as others may know already.
    pub fn share_from(&self, folder: &Path, entries: &[FileEntry]) {
        let large = entries
            .iter()
            .filter(|entry| entry.size >= LEAST_SHARED_BYTES);
        for entry in large {
            if let (Ok(path), Some(digest)) =
                (inside(folder, &entry.path), digest_of(&entry.digest))
            {
                self.shared.share(digest, path, entry.size);
            }
        }
    }

    /// Tells the coordinator what is held here, in an earlier session too.
    pub async fn announce(&self) {
        let digests = self.shared.digests();
        if let Some(line) = self.up.upgrade()
            && !digests.is_empty()
        {
            // Where it cannot be said, the session is over.
            let _ = line.send(up(Up::Holds(v1::Holds { digests }))).await;
        }
    }

    /// Workers that the coordinator is to name no more.
    pub fn unusable(&self) -> Vec<u64> {
        let unusable = self.unusable.lock();
        unusable.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A worker did not send what it was asked for.
    pub fn give_up(&self, worker: u64) {
        let unusable = self.unusable.lock();
        unusable
            .unwrap_or_else(PoisonError::into_inner)
            .push(worker);
    }

    /// Begins to fetch the rest of a file from another worker. The last piece is an error where it broke off.
    pub fn fetch(&self, from: &v1::Member, entry: &FileEntry, offset: u64) -> Pieces {
        let (sender, pieces) = mpsc::channel(PIECES_AHEAD);
        let wanted = digest_of(&entry.digest).map(|digest| Wanted {
            address: from.address.clone(),
            hello: FileHello {
                run_id: self.run_id,
                from: self.worker,
                to: from.worker,
            },
            digest,
            offset,
            size: entry.size,
        });
        // It ends by itself when nobody takes the pieces any more.
        tokio::task::spawn_blocking(move || {
            let fetched = match wanted {
                Some(wanted) => {
                    files::fetch(&wanted, |piece| sender.blocking_send(Ok(piece)).is_ok())
                }
                None => Err("was named for a file without a digest".to_owned()),
            };
            if let Err(reason) = fetched {
                // Nobody may be there to hear it.
                let _ = sender.blocking_send(Err(reason));
            }
        });
        pieces
    }
}

/// The pieces of a file, and how it broke off.
pub type Pieces = mpsc::Receiver<Result<Vec<u8>, String>>;
