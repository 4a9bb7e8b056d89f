//! An object into the cache: continued where it broke off, checked by its length and version, never taken for whole before.
//!
//! In: objects as the store lists them. Out: their files in the hub's cache, by address and version: what is there is not
//! fetched again.

use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use common::hub::{Fetching, Hub, HubError, Retries, WebFile, all_at_once};
use common::progress::{Cancelled, Progress};

use super::error::StoreError;
use super::store::{Object, Store, wait};

/// Most versions that an object may go through while it is fetched.
const MAX_CHANGES: usize = 3;

/// Objects on their way.
struct Download<'a> {
    hub: &'a Hub,
    store: &'a Store,
    progress: &'a Progress,
    /// Another of them has failed: the rest is not wanted any more.
    is_stopped: &'a AtomicBool,
}

/// Fetches what is not in the cache, a few objects at a time. An error comes with the key that it is about.
pub fn fetch(
    hub: &Hub,
    store: &Store,
    objects: &[Object],
    progress: &Progress,
) -> Result<Vec<WebFile>, (String, Box<StoreError>)> {
    let kept = |object: &Object| versions_of(hub, store, object).kept(&object.version);
    let missing: Vec<&Object> = objects.iter().filter(|it| kept(it).is_none()).collect();
    let is_stopped = AtomicBool::new(false);
    let download = Download {
        hub,
        store,
        progress,
        is_stopped: &is_stopped,
    };
    let fetched = Mutex::new(HashMap::new());
    if !missing.is_empty() {
        let sizes = missing.iter().map(|object| object.size);
        progress.begin("downloading the data", sizes.fold(0, u64::saturating_add));
        all_at_once(&missing, &is_stopped, |object| {
            let file = download.object(object);
            let file = file.map_err(|error| (object.key.clone(), Box::new(error)))?;
            let mut fetched = fetched.lock().unwrap_or_else(PoisonError::into_inner);
            fetched.insert(object.key.clone(), file);
            Ok(())
        })?;
    }
    let fetched = fetched.into_inner().unwrap_or_else(PoisonError::into_inner);
    let file_of = |object: &Object| {
        let new = fetched.get(&object.key).cloned();
        let file = new.or_else(|| kept(object));
        file.ok_or_else(|| (object.key.clone(), Box::new(StoreError::Changing)))
    };
    objects.iter().map(file_of).collect()
}

fn versions_of(hub: &Hub, store: &Store, object: &Object) -> common::hub::Versions {
    let name = object.key.rsplit('/').next().unwrap_or_default();
    hub.versions(&store.address_of(object).to_string(), name)
}

impl Download<'_> {
    /// Fetches an object in the version that it has, which is a later one where it changes meanwhile.
    fn object(&self, listed: &Object) -> Result<WebFile, StoreError> {
        let versions = versions_of(self.hub, self.store, listed);
        let fetching = versions.begin(self.hub, self.progress)?;
        let mut object = listed.clone();
        for _ in 0..MAX_CHANGES {
            if let Some(kept) = versions.kept(&object.version) {
                return Ok(kept);
            }
            match self.version(&object, &fetching) {
                Err(StoreError::Changing) => {
                    let _ = fs::remove_file(fetching.part(&object.version));
                    object = self.store.head(&object.key, self.progress)?;
                }
                other => return other,
            }
        }
        Err(StoreError::Changing)
    }

    fn version(&self, object: &Object, fetching: &Fetching<'_>) -> Result<WebFile, StoreError> {
        let part = fetching.part(&object.version);
        let address = self.store.address_of(object);
        let mut retries = Retries::default();
        if length_of(&part) > object.size {
            fs::remove_file(&part).map_err(HubError::io("write", &part))?;
        }
        self.progress.advance(length_of(&part));
        loop {
            self.check()?;
            let before = length_of(&part);
            let attempt = self.attempt(object, &part, before);
            let after = length_of(&part);
            if after > before {
                retries.progressed();
            }
            match attempt {
                Ok(()) if after == object.size => break,
                // The library checks what a store says of the length, but not what comes.
                Ok(()) => {
                    let _ = fs::remove_file(&part);
                    return Err(StoreError::Length {
                        expected: object.size,
                        found: after,
                    });
                }
                Err(Stop::Of(error)) => return Err(error),
                Err(Stop::Asked(error)) => {
                    let told = self.store.error(&error);
                    wait(
                        self.hub,
                        &mut retries,
                        &address,
                        &error,
                        told,
                        self.progress,
                    )?;
                }
            }
        }
        Ok(fetching.keep(&part, &object.version)?)
    }

    /// Asks for what is missing, and writes what comes.
    fn attempt(&self, object: &Object, part: &Path, offset: u64) -> Result<(), Stop> {
        let file = OpenOptions::new().append(true).create(true).open(part);
        let mut file = file.map_err(HubError::io("write", part))?;
        if offset == object.size {
            return Ok(());
        }
        let mut reading = self.store.read(object, offset).map_err(Stop::Asked)?;
        let mut length = offset;
        while let Some(piece) = reading.next() {
            let piece = piece.map_err(Stop::Asked)?;
            self.check()?;
            length += piece.len() as u64;
            if length > object.size {
                return Err(Stop::Of(StoreError::Length {
                    expected: object.size,
                    found: length,
                }));
            }
            file.write_all(&piece)
                .map_err(HubError::io("write", part))?;
            self.progress.advance(piece.len() as u64);
        }
        Ok(())
    }

    fn check(&self) -> Result<(), Cancelled> {
        self.progress.check()?;
        match self.is_stopped.load(Ordering::Relaxed) {
            true => Err(Cancelled),
            false => Ok(()),
        }
    }
}

/// Why an attempt ended before the object did.
enum Stop {
    /// The store, or the way to it.
    Asked(object_store::Error),
    Of(StoreError),
}

impl From<HubError> for Stop {
    fn from(error: HubError) -> Self {
        Self::Of(error.into())
    }
}

impl From<Cancelled> for Stop {
    fn from(cancelled: Cancelled) -> Self {
        Self::Of(cancelled.into())
    }
}

fn length_of(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}
