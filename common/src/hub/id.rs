//! Ids of repositories on the hub, and names of revisions.
//!
//! In: what a user wrote. Out: a checked id, or what is wrong with it. Nothing here asks the disk or the network.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use super::HubError;

/// Most characters of an id, as the hub has it.
const MAX_ID_CHARACTERS: usize = 96;
const MAX_REVISION_BYTES: usize = 255;
/// Hosts whose web addresses name repositories; an endpoint of one's own has the same paths.
const HOSTS: [&str; 3] = ["huggingface.co", "www.huggingface.co", "hf.co"];

/// Why there is no folder here, and what to do where the path may be an id: for places that fetch nothing.
pub fn no_such_folder(path: &Path) -> String {
    let is_hub = HOSTS
        .iter()
        .any(|host| path.to_string_lossy().contains(host));
    if path.to_string_lossy().contains("://") && !path.starts_with("hf:") && !is_hub {
        return "there is no such folder: models come from this machine or the Hugging Face hub, and only datasets from other addresses; download it, and name its folder"
            .to_owned();
    }
    match RepoId::of_path(RepoKind::Model, path).filter(|repo| repo.owner().is_some()) {
        Some(repo) => format!(
            "there is no such folder; if it is an id on the Hugging Face hub, only base_model, lora_model_dir and the datasets of a job are fetched: download it with `hf download {repo} --local-dir models/{}` and name that folder",
            repo.name()
        ),
        None => "there is no such folder".to_owned(),
    }
}

/// What a repository holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RepoKind {
    Model,
    Dataset,
}

impl RepoKind {
    /// `model`, as the hub's calls say it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Dataset => "dataset",
        }
    }

    /// `models`, as the hub's calls and the folders of the cache have it.
    pub(super) fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }

    /// What stands before the id in a web address.
    pub(super) fn prefix(self) -> &'static str {
        match self {
            Self::Model => "",
            Self::Dataset => "datasets/",
        }
    }
}

/// A repository: `owner/name`, or one of the old ids of one word such as `gpt2`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RepoId {
    kind: RepoKind,
    id: String,
}

impl RepoId {
    /// Reads an id of the kind, also from `hf://owner/name` or the web address of the repository.
    ///
    /// An address that says another kind is an error.
    pub fn parse(kind: RepoKind, text: &str) -> Result<Self, HubError> {
        let invalid = |reason: &str| HubError::InvalidId {
            id: text.to_owned(),
            reason: reason.to_owned(),
        };
        let (said, id) = strip_address(text).map_err(invalid)?;
        if said.is_some_and(|said| said != kind) {
            let reason = match kind {
                RepoKind::Model => "it is a data set's, but a model is asked for",
                RepoKind::Dataset => "it is a model's, but a data set is asked for",
            };
            return Err(invalid(reason));
        }
        check_id(id).map_err(invalid)?;
        Ok(Self {
            kind,
            id: id.to_owned(),
        })
    }

    /// The repository that a path may name where there is no file or folder of that path.
    ///
    /// None where it looks like a path: it is absolute, begins with a dot, or its first folder is there.
    pub fn of_path(kind: RepoKind, path: &Path) -> Option<Self> {
        let text = path.to_str()?;
        let repo = Self::parse(kind, text).ok()?;
        let is_address = text.contains(":/");
        let is_in_folder = repo.owner().is_some_and(|owner| Path::new(owner).is_dir());
        (is_address || !(path.exists() || is_in_folder)).then_some(repo)
    }

    pub fn kind(&self) -> RepoKind {
        self.kind
    }

    /// `owner/name`.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Owner, where the id has one.
    pub fn owner(&self) -> Option<&str> {
        self.id.split_once('/').map(|(owner, _)| owner)
    }

    /// The id without its owner.
    pub fn name(&self) -> &str {
        self.id.split_once('/').map_or(&self.id, |(_, name)| name)
    }

    /// `datasets/owner/name`, as web addresses have it.
    pub(super) fn web_path(&self) -> String {
        format!("{}{}", self.kind.prefix(), self.id)
    }

    /// `api/datasets/owner/name`.
    pub(super) fn api_path(&self) -> String {
        format!("api/{}/{}", self.kind.plural(), self.id)
    }

    /// The folder of the repository in the cache.
    pub(super) fn folder_name(&self) -> String {
        format!("{}--{}", self.kind.plural(), self.id.replace('/', "--"))
    }
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)
    }
}

/// A branch, a tag or a commit, checked: it is also the name of a file in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revision(String);

impl Revision {
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }

    /// The commit, where the revision is the whole hash of one.
    pub(super) fn commit(&self) -> Option<&str> {
        is_commit(&self.0).then_some(self.as_str())
    }
}

impl FromStr for Revision {
    type Err = HubError;

    fn from_str(text: &str) -> Result<Self, HubError> {
        let is_fine = |part: &str| !part.is_empty() && !part.starts_with('.') && part != "..";
        let reason = if text.is_empty() {
            "it is empty"
        } else if text.len() > MAX_REVISION_BYTES {
            "it is too long"
        } else if text.contains("..") || !text.split('/').all(is_fine) {
            "it has an empty part, or one that begins with a dot"
        } else if text
            .chars()
            .any(|c| c.is_control() || c.is_whitespace() || "\\~^:?*[".contains(c))
        {
            "it has characters that no branch, tag or commit has"
        } else {
            return Ok(Self(text.to_owned()));
        };
        Err(HubError::InvalidRevision {
            revision: text.to_owned(),
            reason,
        })
    }
}

/// Whether the text is the whole hash of a commit.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40
        && text
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The id in an address, and the kind where the address says it.
fn strip_address(text: &str) -> Result<(Option<RepoKind>, &str), &'static str> {
    // A path loses one of the two slashes.
    let (scheme, rest) = match text.split_once("://").or(text.split_once(":/")) {
        Some(("hf", path)) => ("hf", path),
        Some((scheme, rest)) => {
            let (host, path) = rest.split_once('/').ok_or("the address has no path")?;
            if !HOSTS.contains(&host) {
                return Err("it is the address of another host");
            }
            (scheme, path)
        }
        None => return Ok((None, text)),
    };
    let path = rest.trim_end_matches('/');
    let (kind, path) = match path.split_once('/') {
        Some(("datasets", rest)) => (Some(RepoKind::Dataset), rest),
        Some(("models", rest)) => (Some(RepoKind::Model), rest),
        // Pages without a word before the id are models'.
        _ if scheme == "hf" => (None, path),
        _ => (Some(RepoKind::Model), path),
    };
    match path.split('/').count() > 2 {
        true => Err("the address goes on after owner/name: leave the rest out"),
        false => Ok((kind, path)),
    }
}

fn check_id(id: &str) -> Result<(), &'static str> {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let words: Vec<&str> = id.split('/').collect();
    if words.len() > 2 || words.iter().any(|word| word.is_empty()) {
        Err("an id is owner/name")
    } else if id.len() > MAX_ID_CHARACTERS {
        Err("an id has at most 96 characters")
    } else if !words.iter().all(|word| word.bytes().all(is_allowed)) {
        Err("an id has only letters, digits, `.`, `_` and `-`")
    } else if id.contains("..") || id.contains("--") {
        Err("an id has neither `..` nor `--`")
    } else if words
        .iter()
        .any(|word| word.starts_with(['.', '-']) || word.ends_with(['.', '-']))
    {
        Err("its words begin and end with a letter, a digit or `_`")
    } else if id.ends_with(".git") {
        Err("an id does not end in .git")
    } else {
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn model(text: &str) -> Result<RepoId, String> {
        RepoId::parse(RepoKind::Model, text).map_err(|error| error.to_string())
    }

    #[test]
    fn an_id_is_read_plain_and_from_addresses() {
        for text in [
            "Qwen/Qwen3-0.6B",
            "hf://Qwen/Qwen3-0.6B",
            "https://huggingface.co/Qwen/Qwen3-0.6B",
            "https://hf.co/Qwen/Qwen3-0.6B/",
        ] {
            let id = model(text).unwrap();
            assert_eq!(
                (id.owner(), id.name()),
                (Some("Qwen"), "Qwen3-0.6B"),
                "{text}"
            );
        }
        let old = model("gpt2").unwrap();
        assert_eq!((old.owner(), old.name()), (None, "gpt2"));
        assert_eq!(old.folder_name(), "models--gpt2");
        for text in ["tatsu-lab/alpaca", "hf://datasets/tatsu-lab/alpaca"] {
            let id = RepoId::parse(RepoKind::Dataset, text).unwrap();
            assert_eq!(id.folder_name(), "datasets--tatsu-lab--alpaca");
            assert_eq!(id.api_path(), "api/datasets/tatsu-lab/alpaca");
        }
    }

    #[test]
    fn an_id_that_the_hub_would_refuse_is_refused_here_with_the_reason() {
        let long = format!("a/{}", "b".repeat(95));
        for (text, reason) in [
            ("", "owner/name"),
            ("a/b/c", "owner/name"),
            ("a/", "owner/name"),
            ("../b", "`..`"),
            ("a/b..c", "`..`"),
            ("a--b/c", "`--`"),
            ("a/-b", "begin and end"),
            (".a/b", "begin and end"),
            ("a/b c", "letters"),
            ("a\\b", "letters"),
            ("a/b.git", ".git"),
            ("https://example.org/a/b", "another host"),
            ("https://huggingface.co/a/b/tree/main", "goes on"),
            ("hf://datasets/a/b", "data set"),
            (long.as_str(), "96"),
        ] {
            let message = model(text).unwrap_err();
            assert!(message.contains(reason), "{text}: {message}");
        }
    }

    #[test]
    fn a_path_names_a_repository_only_where_no_folder_of_it_is_there() {
        let of_path = |text: &str| RepoId::of_path(RepoKind::Model, Path::new(text));
        for text in [
            "Qwen/Qwen3-0.6B",
            "gpt2",
            "hf:/Qwen/Qwen3-0.6B",
            "hf://Qwen/Qwen3-0.6B",
        ] {
            assert!(of_path(text).is_some(), "{text}");
        }
        // Tests run in the folder of the crate.
        for text in [
            "/models/x",
            "./x",
            "../x",
            "~/x",
            "a/b/c",
            "src/x",
            "src",
            "src/lib.rs",
        ] {
            assert!(of_path(text).is_none(), "{text}");
        }
    }

    #[test]
    fn a_revision_cannot_lead_out_of_its_folder() {
        for text in ["main", "v1.0", "refs/pr/1", "refs/convert/parquet"] {
            text.parse::<Revision>().unwrap();
        }
        for text in [
            "", "..", "a/../b", "/a", "a//b", "a\\b", "a\0", ".a", "a b", "~",
        ] {
            text.parse::<Revision>().unwrap_err();
        }
        assert!(
            "0123456789abcdef0123456789abcdef01234567"
                .parse::<Revision>()
                .unwrap()
                .commit()
                .is_some()
        );
    }
}
