//! Whether, when and where what was trained goes to the hub.

use std::fmt;

/// Where a result goes on the hub.
#[derive(Clone, Debug, PartialEq)]
pub struct PushSpec {
    /// `owner/name`, or a name of the token's own account.
    pub repo: String,
    /// Whether a repository that is made for it is private.
    pub is_private: bool,
    /// Token for it. None: the environment has one.
    pub token: Option<Secret>,
    pub strategy: HubStrategy,
}

/// What is pushed while the run still goes on, by Transformers' names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HubStrategy {
    /// Nothing: the result is pushed at the end.
    #[default]
    End,
    /// The weights of each checkpoint, in the place of the result.
    EverySave,
    /// These, and the newest checkpoint whole in the folder `last-checkpoint`.
    Checkpoint,
    /// These, and each checkpoint whole in its own folder.
    AllCheckpoints,
}

/// The name in a job.
impl fmt::Display for HubStrategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::End => "end",
            Self::EverySave => "every_save",
            Self::Checkpoint => "checkpoint",
            Self::AllCheckpoints => "all_checkpoints",
        })
    }
}

/// A text that is shown to nobody.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: String) -> Self {
        Self(text)
    }

    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(...)")
    }
}
