//! Which files a repository has at a commit, and which commit a revision is.
//!
//! In: a repository and a revision. Out: the commit, pinned, with its files; from the cache where the commit is known or the
//! network is forbidden.

use std::collections::HashSet;

use serde::Deserialize;
use ureq::http::{HeaderMap, header};

use super::cache::RepoCache;
use super::call::{Call, without_query};
use super::client::Client;
use super::failure::Subject;
use super::id::{Revision, is_commit};
use super::path::encode_part;
use super::{Digest, Hub, HubError, RepoId};
use crate::progress::Progress;

const MAX_PAGES: usize = 500;
const MAX_FILES: usize = 500_000;

/// The files of a repository at one commit.
#[derive(Clone, Debug)]
pub struct Listing {
    /// The repository as it was asked for, under whose name the cache keeps it.
    pub repo: RepoId,
    /// The repository as the hub writes it now.
    pub canonical: RepoId,
    /// The commit that the revision was when it was asked for.
    pub commit: String,
    pub files: Vec<RemoteFile>,
    pub(super) revision: Revision,
    /// Only what is in the cache is listed, for want of the hub's own list.
    pub(super) is_partial: bool,
}

/// A file of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteFile {
    /// Path in the repository, with slashes.
    pub path: String,
    pub size: u64,
    /// None for a file that was put into the cache without a link to its blob.
    pub digest: Option<Digest>,
    /// git's id of what it keeps for the file.
    pub(super) git_id: String,
    /// Kept for Python, which can fetch by it.
    pub(super) xet_hash: Option<String>,
}

#[derive(Deserialize)]
struct RevisionAnswer {
    sha: String,
    id: Option<String>,
}

#[derive(Deserialize)]
struct TreeEntry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    oid: String,
    lfs: Option<LfsEntry>,
    #[serde(rename = "xetHash")]
    xet_hash: Option<String>,
}

#[derive(Deserialize)]
struct LfsEntry {
    oid: String,
    size: u64,
}

impl Hub {
    /// Lists the files of a repository at a branch, a tag or a commit.
    ///
    /// A commit whose list is in the cache costs no request, and any other list is kept there. Where the hub cannot be
    /// reached, the revision's commit in the cache serves, with a warning.
    pub fn listing(
        &self,
        repo: &RepoId,
        revision: &str,
        progress: &Progress,
    ) -> Result<Listing, HubError> {
        let revision: Revision = revision.parse()?;
        let cache = self.cache(repo);
        if let Some(commit) = revision.commit()
            && let Some(listing) = kept(&cache, repo, &revision, commit)
        {
            return Ok(listing);
        }
        if self.environment().offline().is_some() {
            return self.cached(&cache, repo, &revision);
        }
        match self.asked(&cache, repo, &revision, progress) {
            Err(error) if error.is_unreachable() => match self.cached(&cache, repo, &revision) {
                Ok(listing) => {
                    let commit = &listing.commit;
                    tracing::warn!("{error}; going on with commit {commit} of the cache");
                    Ok(listing)
                }
                Err(_) => Err(error),
            },
            listing => listing,
        }
    }

    pub(super) fn cache(&self, repo: &RepoId) -> RepoCache {
        RepoCache::new(self.environment().cache(), repo)
    }

    /// Asks the hub which commit the revision is, and for that commit's files where they are not known.
    fn asked(
        &self,
        cache: &RepoCache,
        repo: &RepoId,
        revision: &Revision,
        progress: &Progress,
    ) -> Result<Listing, HubError> {
        let client = &*self.0;
        let is_dispensable = cache.read_ref(revision).is_some();
        let (commit, canonical) = resolve(client, repo, revision, is_dispensable, progress)?;
        let files = match cache.read_tree(&commit) {
            Some(files) => files,
            None => {
                let files = tree(client, &canonical, &commit, progress)?;
                if let Err(error) = cache.write_tree(&commit, &files) {
                    tracing::warn!("{repo}: the list of files is not kept: {error}");
                }
                files
            }
        };
        Ok(Listing {
            repo: repo.clone(),
            canonical,
            commit,
            files,
            revision: revision.clone(),
            is_partial: false,
        })
    }

    /// What the cache knows of the revision.
    fn cached(
        &self,
        cache: &RepoCache,
        repo: &RepoId,
        revision: &Revision,
    ) -> Result<Listing, HubError> {
        let commit = cache.read_ref(revision);
        if let Some(listing) = commit
            .as_deref()
            .and_then(|commit| kept(cache, repo, revision, commit))
        {
            return Ok(listing);
        }
        let found = commit.map(|commit| cache.walk(&commit).map(|files| (commit, files)));
        if let Some((commit, files)) = found.transpose()?.filter(|(_, files)| !files.is_empty()) {
            return Ok(Listing {
                repo: repo.clone(),
                canonical: repo.clone(),
                commit,
                files,
                revision: revision.clone(),
                is_partial: true,
            });
        }
        let remedy = format!(
            "put revision `{}` into {} first, with `hf download {repo}{}`",
            revision.as_str(),
            cache.folder().display(),
            match repo.kind() {
                super::RepoKind::Model => "",
                super::RepoKind::Dataset => " --repo-type dataset",
            }
        );
        self.0.check_online(&Subject::of(repo), &remedy)?;
        Err(HubError::RevisionNotFound {
            repo: repo.clone(),
            revision: revision.as_str().to_owned(),
            url: self.0.page(repo),
        })
    }
}

/// The list of a commit's files that is in the cache.
fn kept(cache: &RepoCache, repo: &RepoId, revision: &Revision, commit: &str) -> Option<Listing> {
    Some(Listing {
        repo: repo.clone(),
        canonical: repo.clone(),
        commit: commit.to_owned(),
        files: cache.read_tree(commit)?,
        revision: revision.clone(),
        is_partial: false,
    })
}

/// Asks which commit a revision is, and how the hub writes the repository's id. Where the answer is dispensable, a hub that
/// cannot be reached is asked only once.
pub(super) fn resolve(
    client: &Client,
    repo: &RepoId,
    revision: &Revision,
    is_dispensable: bool,
    progress: &Progress,
) -> Result<(String, RepoId), HubError> {
    let subject = Subject::of(repo).revision(revision.as_str());
    let revision = encode_part(revision.as_str());
    let url = client.url(&format!("{}/revision/{revision}", repo.api_path()));
    let mut call = Call::get(url.clone(), subject);
    call.is_dispensable = is_dispensable;
    let (answer, _): (RevisionAnswer, HeaderMap) = client.json(&call, progress)?;
    if !is_commit(&answer.sha) {
        return Err(HubError::Malformed {
            subject: call.subject.to_string(),
            url,
            reason: "its `sha` is no commit".to_owned(),
        });
    }
    let canonical = match answer.id {
        Some(id) => RepoId::parse(repo.kind(), &id)?,
        None => repo.clone(),
    };
    if canonical != *repo {
        tracing::warn!("the hub writes {repo} as {canonical}: write it so too");
    }
    Ok((answer.sha, canonical))
}

/// Asks for the files of a commit, page after page.
fn tree(
    client: &Client,
    repo: &RepoId,
    commit: &str,
    progress: &Progress,
) -> Result<Vec<RemoteFile>, HubError> {
    let subject = Subject::of(repo).revision(commit);
    let first = client.url(&format!("{}/tree/{commit}?recursive=true", repo.api_path()));
    let malformed = |reason: String| HubError::Malformed {
        subject: repo.to_string(),
        url: without_query(&first),
        reason,
    };
    let (mut files, mut seen) = (Vec::new(), HashSet::new());
    let mut next = Some(first.clone());
    while let Some(url) = next {
        if seen.len() >= MAX_PAGES || files.len() > MAX_FILES || !seen.insert(url.clone()) {
            return Err(malformed(format!(
                "its list of files does not end within {MAX_PAGES} pages and {MAX_FILES} files"
            )));
        }
        let call = Call::get(url, subject.clone());
        let (page, headers): (Vec<TreeEntry>, HeaderMap) = client.json(&call, progress)?;
        for entry in page {
            if entry.kind == "file" {
                let path = entry.path.clone();
                let file = remote_file(entry)
                    .ok_or_else(|| malformed(format!("{path:?} has no digest")))?;
                files.push(file);
            }
        }
        next = next_page(client, &headers);
    }
    Ok(files)
}

fn remote_file(entry: TreeEntry) -> Option<RemoteFile> {
    let (digest, size) = match &entry.lfs {
        Some(lfs) => {
            let hex = lfs.oid.strip_prefix("sha256:").unwrap_or(&lfs.oid);
            (Digest::from_hex(hex), lfs.size)
        }
        None => (Digest::from_hex(&entry.oid), entry.size),
    };
    Some(RemoteFile {
        path: entry.path,
        size,
        digest: Some(digest?),
        git_id: entry.oid,
        xet_hash: entry.xet_hash,
    })
}

/// The address of the next page, of `Link: <address>; rel="next"`.
fn next_page(client: &Client, headers: &HeaderMap) -> Option<String> {
    let link = headers.get(header::LINK)?.to_str().ok()?;
    let next = link.split(',').find(|part| part.contains("rel=\"next\""))?;
    let (_, rest) = next.split_once('<')?;
    let (address, _) = rest.split_once('>')?;
    Some(match address.strip_prefix('/') {
        Some(path) => client.url(path),
        None => address.to_owned(),
    })
}
