//! The hub, asked only where something is on it.

use std::cell::OnceCell;
use std::path::Path;

use common::hub::{Environment, Hub, RepoId, RepoKind};
use common::job::{JobSpec, Resume};
use common::progress::Progress;
use serde_json::Value;

use super::list::List;
use crate::store::output::RunRecord;

/// The branch that is meant where none is named.
pub(super) const MAIN: &str = "main";

/// The repository on the hub that a path may name: one that is not there, and has the form of an id with its owner.
pub fn hub_id(kind: RepoKind, path: &Path) -> Option<RepoId> {
    let text = path.to_str()?;
    let repo = RepoId::parse(kind, text.trim_end_matches('/')).ok()?;
    repo.owner().is_some().then_some(repo)
}

/// Where files come from.
pub(super) struct Sources<'a> {
    job: &'a JobSpec,
    /// Where what comes through standard input is kept.
    pub folder: &'a Path,
    hub: OnceCell<Hub>,
    earlier: OnceCell<Option<Value>>,
    pub progress: &'a Progress,
}

impl<'a> Sources<'a> {
    pub fn new(job: &'a JobSpec, folder: &'a Path, progress: &'a Progress) -> Self {
        Self {
            job,
            folder,
            hub: OnceCell::new(),
            earlier: OnceCell::new(),
            progress,
        }
    }

    pub fn hub(&self) -> Result<&Hub, String> {
        if let Some(hub) = self.hub.get() {
            return Ok(hub);
        }
        let made = Environment::of_process().and_then(Hub::new);
        let made = made.map_err(|error| error.to_string())?;
        Ok(self.hub.get_or_init(|| made))
    }

    /// Number of datasets that come through standard input.
    pub fn count_of_stdin(&self) -> usize {
        let datasets = self.job.all_datasets();
        datasets.filter(|dataset| dataset.is_stdin()).count()
    }

    /// Which content of this name the run in the output folder began with.
    pub fn pinned(&self, (list, index): (List, usize), name: &str) -> Option<String> {
        let pairs = self.earlier()?[list.name()][index]["pinned"].as_array()?;
        let pair = pairs.iter().find(|pair| pair[0].as_str() == Some(name))?;
        pair[1].as_str().map(str::to_owned)
    }

    /// The contents that the run in the output folder began with whose names begin so, each with its version.
    #[cfg(feature = "object-store")]
    pub fn pinned_within(
        &self,
        (list, index): (List, usize),
        start: &str,
    ) -> Vec<(String, String)> {
        let read = || {
            let pairs = self.earlier()?[list.name()][index]["pinned"].as_array()?;
            let text = |value: &Value| value.as_str().map(str::to_owned);
            let pairs = pairs.iter();
            let pairs = pairs.filter_map(|pair| Some((text(&pair[0])?, text(&pair[1])?)));
            Some(pairs.filter(|(name, _)| name.starts_with(start)).collect())
        };
        read().unwrap_or_default()
    }

    /// The job of the run in the output folder that this one goes on with: it keeps to the commits that it began with.
    pub fn earlier(&self) -> Option<&Value> {
        let read = || {
            if self.job.resume == Resume::Never {
                return None;
            }
            // What is wrong with the record is told when the folder is taken.
            let record = RunRecord::read(&self.job.output_dir).ok().flatten()?;
            Some(record.job)
        };
        self.earlier.get_or_init(read).as_ref()
    }
}
