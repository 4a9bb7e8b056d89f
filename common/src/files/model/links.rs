//! Links in a model folder. What is read there is copied into the result and handed to workers, so a link may not lead to
//! a file of somebody else's choice.

use std::path::Path;

use crate::files::FileError;

/// Refuses `dir/name` where it is a link that leads out of the folder, or to nothing. The cache of Hugging Face's hub is
/// made of such links, from `snapshots/<revision>/` to `blobs/` beside it; those may be followed.
pub fn check_link(dir: &Path, name: &str) -> Result<(), FileError> {
    let path = dir.join(name);
    let resolve = |path: &Path| path.canonicalize().map_err(FileError::io("read", path));
    let (folder, target) = (resolve(dir)?, resolve(&path)?);
    if target.starts_with(&folder) || is_blob(&folder, &target) {
        return Ok(());
    }
    let reason = format!(
        "is a link that leads out of the model folder, to {}; copy that file into the folder, or name the folder that it is in",
        target.display()
    );
    Err(FileError::malformed(&path, reason))
}

/// Whether `target` is `<model>/blobs/<digest>` where `folder` is `<model>/snapshots/<revision>`.
fn is_blob(folder: &Path, target: &Path) -> bool {
    let Some(snapshots) = folder.parent() else {
        return false;
    };
    let blobs = snapshots.parent().map(|model| model.join("blobs"));
    snapshots.ends_with("snapshots") && blobs.is_some_and(|blobs| target.parent() == Some(&blobs))
}

#[cfg(all(test, unix))]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_may_lead_inside_and_to_the_hub_s_blobs_only() {
        let root = tempfile::tempdir().unwrap();
        let model = root.path().join("models--a--b");
        let snapshot = model.join("snapshots/0123");
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(model.join("blobs")).unwrap();
        fs::write(model.join("blobs/abc"), "x").unwrap();
        fs::write(snapshot.join("plain"), "x").unwrap();
        fs::write(root.path().join("secret"), "x").unwrap();
        fs::create_dir(snapshot.join("folder")).unwrap();
        for (name, target) in [
            ("inside", "plain"),
            ("blob", "../../blobs/abc"),
            ("folder/blob", "../../../blobs/abc"),
        ] {
            symlink(target, snapshot.join(name)).unwrap();
            check_link(&snapshot, name).unwrap();
        }
        check_link(&snapshot, "plain").unwrap();
        // The folder itself may be a link.
        symlink(&snapshot, root.path().join("model")).unwrap();
        check_link(&root.path().join("model"), "blob").unwrap();
        for (name, target) in [("out", "../../../secret"), ("nothing", "absent")] {
            symlink(target, snapshot.join(name)).unwrap();
            check_link(&snapshot, name).unwrap_err();
        }
        // The same link in a folder that is no snapshot.
        let plain = root.path().join("plain");
        fs::create_dir(&plain).unwrap();
        symlink("../models--a--b/blobs/abc", plain.join("blob")).unwrap();
        let message = check_link(&plain, "blob").unwrap_err().to_string();
        assert!(
            message.contains("leads out of the model folder"),
            "{message}"
        );
        assert!(message.contains("blobs/abc"), "{message}");
    }
}
