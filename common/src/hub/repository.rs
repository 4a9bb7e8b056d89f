//! Whose a repository is, and that it is there, before anything is pushed into it.

use serde::Deserialize;
use serde_json::json;
use ureq::http::{HeaderMap, Method};

use super::call::{Call, Payload};
use super::failure::Subject;
use super::id::Revision;
use super::listing::resolve;
use super::{Hub, HubError, RepoId};
use crate::progress::Progress;

/// Whether a repository is new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Created {
    Created,
    AlreadyThere,
}

#[derive(Deserialize)]
struct Account {
    name: String,
}

impl Hub {
    /// The account of the token.
    pub fn whoami(&self, progress: &Progress) -> Result<String, HubError> {
        let subject = Subject::default();
        self.0
            .check_online(&subject, "write the id with its owner")?;
        let call = Call::get(self.0.url("api/whoami-v2"), subject);
        let (account, _): (Account, HeaderMap) = self.0.json(&call, progress)?;
        Ok(account.name)
    }

    /// Makes the repository where there is none of this id.
    pub fn create_repo(
        &self,
        repo: &RepoId,
        is_private: bool,
        progress: &Progress,
    ) -> Result<Created, HubError> {
        self.check_upload(repo)?;
        let body = json!({
            "name": repo.name(),
            "organization": repo.owner(),
            "type": repo.kind().word(),
            "private": is_private,
        });
        let body = body.to_string();
        let url = self.0.url("api/repos/create");
        let call = json_call(url, Subject::of(repo), body.as_bytes());
        match self.0.done(&call, progress) {
            Ok(_) => Ok(Created::Created),
            Err(HubError::Status { status: 409, .. }) => Ok(Created::AlreadyThere),
            // Who may not make one may still write into the one that is there.
            Err(error @ HubError::Forbidden { .. }) => {
                let main: Revision = "main".parse()?;
                match resolve(&self.0, repo, &main, false, progress) {
                    Ok(_) => Ok(Created::AlreadyThere),
                    Err(_) => Err(error),
                }
            }
            Err(error) => Err(error),
        }
    }

    /// Refuses where nothing can be pushed: the network is forbidden, or there is no token.
    pub fn check_upload(&self, repo: &RepoId) -> Result<(), HubError> {
        let remedy = "push when the network is allowed";
        self.0.check_online(&Subject::of(repo), remedy)?;
        match self.0.has_token() {
            true => Ok(()),
            false => Err(HubError::NoToken {
                subject: format!("nothing is pushed to {repo} without a token"),
                withheld: match self.environment().is_token_withheld {
                    true => " (there is a token, but HF_HUB_DISABLE_IMPLICIT_TOKEN is set)",
                    false => "",
                },
            }),
        }
    }
}

/// A call that sends JSON.
pub(super) fn json_call(url: String, subject: Subject, body: &[u8]) -> Call<'_> {
    Call::new(Method::POST, url, subject)
        .header("content-type", "application/json")
        .payload(Payload::Bytes(body))
}
