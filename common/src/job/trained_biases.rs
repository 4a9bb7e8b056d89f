//! Which biases of the base model are trained beside an adapter.

use serde::{Deserialize, Serialize};

/// Biases of the base model that are trained as they are, PEFT's `bias`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainedBiases {
    #[default]
    None,
    /// Those of linears with an adapter.
    LoraOnly,
    /// Those of all linears.
    All,
}

impl TrainedBiases {
    const ALL: [Self; 3] = [Self::None, Self::LoraOnly, Self::All];

    pub fn is_none(&self) -> bool {
        *self == Self::None
    }

    /// PEFT's word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::LoraOnly => "lora_only",
            Self::All => "all",
        }
    }

    /// What an adapter says of it; nothing is none.
    pub fn of_adapter(value: &serde_json::Value) -> Option<Self> {
        match value {
            serde_json::Value::Null => Some(Self::None),
            value => Self::ALL
                .into_iter()
                .find(|own| Some(own.name()) == value.as_str()),
        }
    }
}
