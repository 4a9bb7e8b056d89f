//! The loss that spreads tokens over the experts of a mixture, as a job asks for it.

use serde::{Deserialize, Serialize};

/// Largest coefficient.
pub(super) const MAX_COEFFICIENT: f64 = 1e3;

/// What a job says of the router's loss; what it leaves open is as the model's `config.json` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RouterLoss {
    /// Whether it is added to that of the tokens.
    pub is_added: Option<bool>,
    pub coefficient: Option<f64>,
}

impl RouterLoss {
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Checks what came from elsewhere.
    ///
    /// # Errors
    /// Why, as the end of a line that begins with the field.
    pub fn check(&self) -> Result<(), String> {
        match self.coefficient {
            Some(other) if !(0.0..=MAX_COEFFICIENT).contains(&other) => Err(format!("is {other}")),
            _ => Ok(()),
        }
    }
}
