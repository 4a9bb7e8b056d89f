//! Whether and where the result is pushed to the hub.

use std::path::Path;

use super::super::read::Reader;
use super::super::spec::{HubStrategy, PushSpec, Secret};
use crate::hub::{RepoId, RepoKind};

/// Reads where the result goes; `output_dir` gives its name where none is given.
pub(super) fn push(reader: &mut Reader<'_>, output_dir: &Path) -> Option<PushSpec> {
    let repo = reader.text("hub_model_id");
    let is_private = reader.switch("hub_private_repo");
    let token = reader.text("hub_token").map(Secret::new);
    let strategy = strategy(reader);
    // Axolotl pushes where there is an id, TRL where it is told to.
    let is_wanted = reader.switch("push_to_hub").unwrap_or(repo.is_some());
    if !is_wanted {
        if token.is_some() {
            let notice = "hub_token is for the push alone, and nothing is pushed: HF_TOKEN opens what is not public";
            reader.notices.push(notice.to_owned());
        }
        return None;
    }
    let name = output_dir
        .file_name()
        .map(|name| name.to_string_lossy().into_owned());
    let Some(repo) = repo.or(name) else {
        if let Some(given) = reader.given("push_to_hub") {
            let message = "needs hub_model_id, the id that the result gets";
            reader.problem(given, message.to_owned());
        }
        return None;
    };
    if let Err(error) = RepoId::parse(RepoKind::Model, repo.trim()) {
        let given = reader
            .given("hub_model_id")
            .or_else(|| reader.given("push_to_hub"));
        if let Some(given) = given {
            reader.problem(given, format!("cannot be pushed to: {error}"));
        }
        return None;
    }
    let is_private = is_private.unwrap_or(true);
    let kind = if is_private { "private" } else { "public" };
    let before = match strategy {
        HubStrategy::End => "",
        HubStrategy::EverySave => ", the weights of each checkpoint before",
        HubStrategy::Checkpoint => {
            ", the weights of each checkpoint before, the newest whole in last-checkpoint"
        }
        HubStrategy::AllCheckpoints => {
            ", the weights of each checkpoint before, each whole in checkpoint-N"
        }
    };
    reader.notices.push(format!(
        "the result is pushed to {repo} on the hub at the end ({kind}, if it is not there yet){before}"
    ));
    Some(PushSpec {
        repo: repo.trim().to_owned(),
        is_private,
        token,
        strategy,
    })
}

fn strategy(reader: &mut Reader<'_>) -> HubStrategy {
    let names: [(&[&str], HubStrategy); 4] = [
        (&["end"], HubStrategy::End),
        (&["every_save"], HubStrategy::EverySave),
        (&["checkpoint"], HubStrategy::Checkpoint),
        (&["all_checkpoints"], HubStrategy::AllCheckpoints),
    ];
    reader.choice("hub_strategy", &names).unwrap_or_default()
}
