//! The hub, asked only where something is on it.

use std::cell::OnceCell;
use std::path::Path;

use common::hub::{Environment, Hub, RepoId, RepoKind};
use common::progress::Progress;
use serde_json::Value;

/// The repository on the hub that a path may name: one that is not there, and has the form of an id with its owner.
pub fn hub_id(kind: RepoKind, path: &Path) -> Option<RepoId> {
    let text = path.to_str()?;
    let repo = RepoId::parse(kind, text.trim_end_matches('/')).ok()?;
    repo.owner().is_some().then_some(repo)
}

/// Where files come from.
pub(super) struct Sources<'a> {
    pub hub: OnceCell<Hub>,
    /// The job of the run that goes on in the output folder: it keeps to the commits that it began with.
    pub earlier: Option<&'a Value>,
    pub progress: &'a Progress,
}

impl Sources<'_> {
    pub fn hub(&self) -> Result<&Hub, String> {
        if let Some(hub) = self.hub.get() {
            return Ok(hub);
        }
        let made = Environment::of_process().and_then(Hub::new);
        let made = made.map_err(|error| error.to_string())?;
        Ok(self.hub.get_or_init(|| made))
    }
}
