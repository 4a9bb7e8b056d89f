//! Typed reading of a `config.json` whose numbers were checked. Enters: the JSON and its path. Leaves: values, or an error that
//! names the file and the key.

use std::path::Path;

use serde_json::Value;

use super::error::ModelError;
use crate::files::FileError;

pub(super) struct Fields<'a> {
    pub json: &'a Value,
    pub path: &'a Path,
}

impl Fields<'_> {
    pub fn bad(&self, reason: &str) -> ModelError {
        FileError::malformed(self.path, reason).into()
    }

    pub fn unsupported(&self, feature: String) -> ModelError {
        ModelError::Feature {
            path: self.path.to_owned(),
            feature,
        }
    }

    pub fn size(&self, key: &str) -> Result<usize, ModelError> {
        self.optional_size(key)?
            .ok_or_else(|| self.bad(&format!("{key} is missing")))
    }

    /// Within the bounds of [`check_numbers`].
    pub fn optional_size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        match &self.json[key] {
            Value::Null => Ok(None),
            value => match value.as_u64().and_then(|size| usize::try_from(size).ok()) {
                Some(size) => Ok(Some(size)),
                None => Err(self.bad(&format!("{key} is {value}, not a size"))),
            },
        }
    }

    pub fn number(&self, key: &str) -> Option<f64> {
        self.json[key].as_f64()
    }

    pub fn flag(&self, key: &str) -> bool {
        self.json[key].as_bool().unwrap_or(false)
    }
}
