//! Which snapshots of models a cache has, without asking the hub.

use std::fs;
use std::path::{Path, PathBuf};

use super::RepoId;
use super::cache::RepoCache;
use super::id::is_commit;

/// Most snapshots that are looked at.
const MAX_SNAPSHOTS: usize = 1000;
const MODELS: &str = "models--";

/// The folders in the cache that hold a model, likeliest first: the snapshot of this repository and commit, the repository's
/// others, those of other repositories. Not looked into; what is in them was written by anyone.
pub fn model_snapshots(cache: &Path, repo: Option<&RepoId>, commit: Option<&str>) -> Vec<PathBuf> {
    let mut found = Vec::new();
    if let Some(repo) = repo {
        let own = RepoCache::new(cache, repo);
        if let Some(commit) = commit.filter(|commit| is_commit(commit)) {
            found.push(own.snapshot(commit));
        }
        found.extend(folders(&own.folder().join("snapshots"), ""));
    }
    let others = folders(cache, MODELS).into_iter();
    found.extend(others.flat_map(|folder| folders(&folder.join("snapshots"), "")));
    let mut known: Vec<PathBuf> = Vec::new();
    for folder in found.into_iter().filter(|folder| folder.is_dir()) {
        if known.len() < MAX_SNAPSHOTS && !known.contains(&folder) {
            known.push(folder);
        }
    }
    known
}

/// Folders in a folder whose names begin so, sorted; none where it cannot be read.
fn folders(inside: &Path, start: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(inside).into_iter().flatten().flatten();
    let named = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(start));
    let paths = named.map(|entry| entry.path());
    let mut paths: Vec<PathBuf> = paths
        .filter(|path| path.is_dir())
        .take(MAX_SNAPSHOTS)
        .collect();
    paths.sort_unstable();
    paths
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::RepoKind;
    use super::*;

    #[test]
    fn the_commit_itself_comes_first_then_its_repository_then_the_others() {
        let cache = tempfile::tempdir().unwrap();
        let (old, new) = ("0".repeat(40), "1".repeat(40));
        for (repo, commit) in [("a--a", &new), ("org--m", &old), ("org--m", &new)] {
            let folder = format!("models--{repo}/snapshots/{commit}");
            fs::create_dir_all(cache.path().join(folder)).unwrap();
        }
        fs::create_dir_all(cache.path().join("datasets--a--a/snapshots/1")).unwrap();
        let repo = RepoId::parse(RepoKind::Model, "org/m").unwrap();
        let of = |repo, commit| -> Vec<String> {
            let found = model_snapshots(cache.path(), repo, commit);
            let shown = |path: &PathBuf| {
                let path = path.strip_prefix(cache.path()).unwrap();
                path.to_str().unwrap().replace("/snapshots/", " ")[..14].to_owned()
            };
            found.iter().map(shown).collect()
        };
        let expected = ["models--org--m", "models--org--m", "models--a--a 1"];
        assert_eq!(of(Some(&repo), Some(&new)), expected);
        let first = &model_snapshots(cache.path(), Some(&repo), Some(&new))[0];
        assert!(first.ends_with(&new));
        // What is no commit leads nowhere.
        let first = &model_snapshots(cache.path(), Some(&repo), Some("../../evil"))[0];
        assert!(first.ends_with(&old));
        assert_eq!(of(None, None).len(), 3);
        assert_eq!(
            model_snapshots(&cache.path().join("none"), None, None).len(),
            0
        );
    }
}
