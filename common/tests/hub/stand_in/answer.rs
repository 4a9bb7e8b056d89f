//! What the hub answers to whoever reads.

use common::hub::{git_hex, sha256_hex};
use serde_json::json;

use super::http::{Answer, Request};
use super::{Inner, Repo, State, is_large, write};

/// Calls whose path goes on behind the id.
const MARKS: [&str; 7] = [
    "/revision/",
    "/tree/",
    "/preupload/",
    "/commit/",
    "/resolve/",
    ".git/info/lfs/objects/batch",
    "/paths-info/",
];

/// A path taken apart.
pub struct Target<'a> {
    /// `models/owner/name`.
    pub repo: String,
    pub mark: &'a str,
    /// What follows the mark, decoded.
    pub rest: String,
}

pub fn answer(state: &State, request: &Request) -> Answer {
    let (path, query) = request
        .target
        .split_once('?')
        .unwrap_or((&request.target, ""));
    let inner = &mut *state.lock();
    if let Some(oid) = path.strip_prefix("/lfs/") {
        return match inner.objects.get(oid) {
            Some(bytes) => content(request, bytes.clone()),
            None => Answer::new(404, ""),
        };
    }
    if request.is_other_host {
        return write::store(inner, request, path);
    }
    if let Some(answer) = write::answer(state, inner, request, path) {
        return answer;
    }
    let Some(target) = Target::parse(path) else {
        return Answer::new(404, "");
    };
    let repo = match find(inner, request, &target) {
        Ok(repo) => repo,
        Err(answer) => return answer,
    };
    match target.mark {
        "/preupload/" | "/commit/" | ".git/info/lfs/objects/batch" => {
            write::change(state, inner, request, &target)
        }
        "/revision/" => match commit_of(repo, &target.rest) {
            Some(commit) => {
                let siblings = repo.commits[&commit].keys();
                let siblings: Vec<_> = siblings.map(|path| json!({"rfilename": path})).collect();
                let (_, id) = target.repo.split_once('/').unwrap_or_default();
                let body = json!({"id": id, "sha": commit, "siblings": siblings, "private": false, "tags": [], "downloads": 0});
                Answer::new(200, body.to_string())
            }
            None => not_found("RevisionNotFound"),
        },
        "/tree/" => tree(state, inner.page_files, repo, &target, path, query),
        "/resolve/" => resolve(state, repo, request, &target.rest),
        _ => Answer::new(404, ""),
    }
}

impl<'a> Target<'a> {
    pub fn parse(path: &str) -> Option<Target<'static>> {
        let (before, mark, rest) = MARKS.iter().find_map(|mark| {
            path.split_once(mark)
                .map(|(before, rest)| (before, *mark, rest))
        })?;
        let before = before
            .strip_prefix("/api")
            .unwrap_or(before)
            .trim_start_matches('/');
        let is_complete = before.starts_with("models/") || before.starts_with("datasets/");
        let repo = match is_complete {
            true => before.to_owned(),
            false => format!("models/{before}"),
        };
        Some(Target {
            repo,
            mark,
            rest: decode(rest),
        })
    }
}

/// The repository, or why it is not given.
fn find<'a>(inner: &'a Inner, request: &Request, target: &Target) -> Result<&'a Repo, Answer> {
    let key = &target.repo;
    let Some(repo) = inner.repos.get(key) else {
        let written = inner
            .repos
            .keys()
            .find(|written| written.eq_ignore_ascii_case(key));
        let (Some(written), Some((_, asked))) = (written, key.split_once('/')) else {
            return Err(not_found("RepoNotFound"));
        };
        let (_, written) = written.split_once('/').unwrap_or_default();
        return Err(Answer::new(307, "").header("Location", request.target.replace(asked, written)));
    };
    let shown = request.header("authorization");
    let wanted = inner.token.as_ref().map(|token| format!("Bearer {token}"));
    if shown.is_some() && shown != wanted.as_deref() {
        return Err(Answer::new(401, "{}").header(
            "X-Error-Message",
            "Invalid credentials in Authorization header",
        ));
    }
    if repo.is_gated {
        let status = if shown.is_some() { 403 } else { 401 };
        return Err(Answer::new(status, "{}")
            .header("X-Error-Code", "GatedRepo")
            .header("X-Error-Message", "Access to model is restricted"));
    }
    match repo.is_private && shown.is_none() {
        true => Err(Answer::new(401, "{}").header("X-Error-Code", "RepoNotFound")),
        false => Ok(repo),
    }
}

pub fn not_found(code: &str) -> Answer {
    Answer::new(404, "{}").header("X-Error-Code", code)
}

fn commit_of(repo: &Repo, revision: &str) -> Option<String> {
    match repo.commits.contains_key(revision) {
        true => Some(revision.to_owned()),
        false => repo.refs.get(revision).cloned(),
    }
}

fn tree(
    state: &State,
    page_files: usize,
    repo: &Repo,
    target: &Target,
    path: &str,
    query: &str,
) -> Answer {
    let Some(commit) = commit_of(repo, target.rest.trim_end_matches('/')) else {
        return not_found("RevisionNotFound");
    };
    let cursor = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("cursor=")?.parse().ok());
    let start: usize = cursor.unwrap_or(0);
    let files = &repo.commits[&commit];
    let page: Vec<_> = files
        .iter()
        .skip(start)
        .take(page_files)
        .map(|(path, bytes)| {
            let mut entry =
                json!({"type": "file", "path": path, "size": bytes.len(), "oid": git_hex(bytes)});
            if is_large(path) {
                let sha256 = sha256_hex(bytes);
                entry["oid"] = json!(git_hex(sha256.as_bytes()));
                entry["lfs"] = json!({"oid": sha256, "size": bytes.len(), "pointerSize": 134});
            }
            entry
        })
        .collect();
    let answer =
        Answer::new(200, json!(page).to_string()).header("Content-Type", "application/json");
    let next = start + page_files;
    match next < files.len() {
        true => {
            let hub = state.hub();
            answer.header(
                "Link",
                format!("<{hub}{path}?recursive=true&cursor={next}>; rel=\"next\""),
            )
        }
        false => answer,
    }
}

fn resolve(state: &State, repo: &Repo, request: &Request, rest: &str) -> Answer {
    let Some((revision, path)) = rest.split_once('/') else {
        return not_found("EntryNotFound");
    };
    let Some(commit) = commit_of(repo, revision) else {
        return not_found("RevisionNotFound");
    };
    let Some(bytes) = repo.commits[&commit].get(path) else {
        return not_found("EntryNotFound").header("X-Repo-Commit", &commit);
    };
    if is_large(path) {
        let sha256 = sha256_hex(bytes);
        return Answer::new(302, "")
            .header("Location", format!("{}/lfs/{sha256}", state.storage()))
            .header("X-Repo-Commit", &commit)
            .header("X-Linked-Size", bytes.len().to_string())
            .header("X-Linked-Etag", format!("\"{sha256}\""));
    }
    let etag = format!("\"{}\"", git_hex(bytes));
    if request.header("if-none-match") == Some(&etag) {
        return Answer::new(304, "").header("ETag", etag);
    }
    content(request, bytes.clone())
        .header("ETag", etag)
        .header("X-Repo-Commit", commit)
}

/// The bytes, or what the request wants of them.
fn content(request: &Request, bytes: Vec<u8>) -> Answer {
    let range = request
        .header("range")
        .and_then(|range| range.strip_prefix("bytes="));
    let start = range.and_then(|range| range.trim_end_matches('-').parse::<usize>().ok());
    match start {
        None => Answer::new(200, bytes),
        Some(start) if start >= bytes.len() => Answer::new(416, ""),
        Some(start) => {
            let (last, count) = (bytes.len() - 1, bytes.len());
            Answer::new(206, &bytes[start..])
                .header("Content-Range", format!("bytes {start}-{last}/{count}"))
        }
    }
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits: Vec<u8> = rest.by_ref().take(2).collect();
        let hex = std::str::from_utf8(&digits).unwrap_or("");
        bytes.push(u8::from_str_radix(hex, 16).unwrap_or(b'?'));
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
