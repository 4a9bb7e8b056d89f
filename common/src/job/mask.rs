//! Which messages of conversations are learned, and which of the tokens that end them.
//!
//! Source of the names and meanings: Axolotl, `prompt_strategies/chat_template.py` (0.18); LLaMA-Factory, `mask_history`.

use serde::{Deserialize, Serialize};

/// ShareGPT's roles, and what they are called elsewhere (Axolotl and LLaMA-Factory read them so, too).
pub const SHAREGPT_ROLES: [(&str, &str); 3] = [
    ("human", "user"),
    ("gpt", "assistant"),
    ("observation", "tool"),
];

/// What of a dataset's conversations is learned, where that is not the assistant's messages with their ends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MaskSpec {
    /// Roles whose messages are learned, by the template's names. Default: the assistant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub roles: Option<Vec<String>>,
    /// Which EOS tokens are learned that end a message. Default: those of messages that are learned.
    #[serde(default, skip_serializing_if = "EndOfTurn::is_default")]
    pub eos: EndOfTurn,
    /// Which other tokens are learned that end a message. Default: those of messages that are learned.
    #[serde(default, skip_serializing_if = "EndOfTurn::is_default")]
    pub eot: EndOfTurn,
    /// Whether the last of the messages that would be learned is the only one. Default: off.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub last_only: bool,
    /// Key of a message that says whether it is learned, beside the usual ones. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training: Option<String>,
    /// Key of a message that says which characters of it are learned. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training_detail: Option<String>,
}

/// Which of the tokens that end a message are learned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EndOfTurn {
    /// That of each message, also of those that are not learned.
    All,
    /// That of each message that is learned.
    #[default]
    Turn,
    /// That of the last message that is learned.
    Last,
    None,
}

impl EndOfTurn {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Whether the end of a message is learned.
    pub fn learns(self, is_learned: bool, is_last: bool) -> bool {
        match self {
            Self::All => true,
            Self::Turn => is_learned,
            Self::Last => is_last,
            Self::None => false,
        }
    }
}

impl MaskSpec {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Whether messages of this role are learned where they say nothing.
    pub fn learns_role(&self, role: &str) -> bool {
        match &self.roles {
            Some(roles) => roles.iter().any(|known| known == role),
            None => role == "assistant",
        }
    }
}
