//! A checkpoint under a second name, so that its removal (`save_total_limit`) takes nothing from under a push.
//!
//! In: the folder of a checkpoint. Out: a folder with the same files, until it is dropped: hard links, which cost nothing while
//! the checkpoint is there, or the checkpoint itself where the file system has none.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::{PushError, TEMPLATES};

/// The files of a checkpoint.
pub(super) struct Held {
    folder: PathBuf,
    is_linked: bool,
}

impl Held {
    /// Links the files of `checkpoint` in the folder `place`, which is emptied first.
    pub fn new(checkpoint: &Path, place: &Path) -> Result<Self, PushError> {
        clear(place)?;
        let linked = link(checkpoint, place)
            .and_then(|()| link_templates(&checkpoint.join(TEMPLATES), &place.join(TEMPLATES)));
        if linked.is_ok() {
            return Ok(Self {
                folder: place.to_owned(),
                is_linked: true,
            });
        }
        clear(place)?;
        match checkpoint.is_dir() {
            true => Ok(Self {
                folder: checkpoint.to_owned(),
                is_linked: false,
            }),
            false => Err(PushError::Gone {
                folder: checkpoint.to_owned(),
            }),
        }
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.is_linked {
            // What is left is removed with the next one.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

/// Removes what a push that was cut short left behind.
pub(super) fn clear(place: &Path) -> Result<(), PushError> {
    match fs::remove_dir_all(place) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(PushError::File {
            path: place.to_owned(),
            reason: error.to_string(),
        }),
        _ => Ok(()),
    }
}

fn link(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        if let Some(name) = path.file_name().filter(|_| path.is_file()) {
            fs::hard_link(&path, to.join(name))?;
        }
    }
    Ok(())
}

fn link_templates(from: &Path, to: &Path) -> std::io::Result<()> {
    match from.is_dir() {
        true => link(from, to),
        false => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_outlives_the_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let (checkpoint, place) = (folder.path().join("checkpoint-2"), folder.path().join("p"));
        let templates = checkpoint.join(TEMPLATES);
        fs::create_dir_all(&templates).unwrap();
        fs::write(checkpoint.join("a"), "weights").unwrap();
        fs::write(templates.join("rag.jinja"), "text").unwrap();
        fs::create_dir(&place).unwrap();
        fs::write(place.join("left"), "by a push that was cut short").unwrap();
        let held = Held::new(&checkpoint, &place).unwrap();
        fs::remove_dir_all(&checkpoint).unwrap();
        assert_eq!(fs::read(held.folder().join("a")).unwrap(), b"weights");
        assert!(held.folder().join(TEMPLATES).join("rag.jinja").is_file());
        assert!(!held.folder().join("left").exists());
        drop(held);
        assert!(!place.exists());
        let gone = Held::new(&checkpoint, &place);
        assert!(matches!(gone, Err(PushError::Gone { .. })));
    }
}
