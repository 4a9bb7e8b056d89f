//! What a job names becomes files on this machine: paths as they are, folders and patterns by their files, ids on the hub
//! through the hub's cache, standard input, addresses and objects of a store through copies.
//!
//! Enters: a checked job. Leaves: the same job with the folder of its model and the files of its data, each of one commit
//! where they come from the hub; or every reason why something cannot be had. The hub is asked, and what the environment
//! says of it is read, only where a name is no path.

mod access;
mod adapter;
mod address;
mod datasets;
mod elsewhere;
mod folder;
mod list;
mod model;
mod objects;
mod splits;
mod stdin;

use std::path::Path;

use common::job::JobSpec;
use common::progress::Progress;

use access::Sources;
pub use adapter::obtain as obtain_adapter;
use list::List;

/// Fetches what the job names from the hub and the web, and finds the files of its datasets. What comes through standard input
/// is kept in `folder`.
pub fn obtain(
    original: &JobSpec,
    folder: &Path,
    progress: &Progress,
) -> Result<JobSpec, Vec<String>> {
    let mut job = original.clone();
    let sources = Sources::new(original, folder, progress);
    let mut problems = Vec::new();
    if let Err(problem) = model::obtain(&sources, &mut job) {
        problems.push(problem);
    }
    for list in List::ALL {
        let entries = match list {
            List::Trained => &mut job.datasets,
            List::Evaluated => &mut job.test_datasets,
        };
        for (index, dataset) in entries.iter_mut().enumerate() {
            match datasets::obtain(&sources, (list, index), dataset) {
                Ok(notice) => job.reading.notices.extend(notice),
                // The reason names it then.
                Err(reason) if dataset.is_stdin() => problems.push(reason),
                Err(reason) => problems.push(format!("{}: {reason}", dataset.shown())),
            }
        }
    }
    match problems.is_empty() {
        true => Ok(job),
        false => Err(problems),
    }
}
