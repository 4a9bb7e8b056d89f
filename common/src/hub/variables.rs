//! Variables of the environment, read as Python's `huggingface_hub` reads them.

use std::path::PathBuf;
use std::time::Duration;

use super::HubError;

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_TIMEOUT_SECONDS: u64 = 24 * 3600;

/// The variables, with the ways in which they are read.
pub(super) struct Variables<'a>(pub &'a dyn Fn(&str) -> Option<String>);

impl Variables<'_> {
    /// The value, where it is not empty.
    pub fn get(&self, name: &str) -> Option<String> {
        (self.0)(name).filter(|value| !value.trim().is_empty())
    }

    /// The first of the variables that is set.
    pub fn first(&self, names: &[&'static str]) -> Option<(&'static str, String)> {
        names.iter().find_map(|name| Some((*name, self.get(name)?)))
    }

    /// Whether a switch is on; None where it is not set.
    pub fn is_on(&self, name: &'static str) -> Result<Option<bool>, HubError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        match value.trim().to_ascii_uppercase().as_str() {
            "1" | "ON" | "YES" | "TRUE" => Ok(Some(true)),
            "0" | "OFF" | "NO" | "FALSE" => Ok(Some(false)),
            _ => Err(HubError::InvalidVariable {
                variable: name,
                reason: format!("`{value}` is neither 1 nor 0"),
            }),
        }
    }

    /// A number of seconds, 10 where it is not set, as in Python.
    pub fn seconds(&self, name: &'static str) -> Result<Duration, HubError> {
        let Some(value) = self.get(name) else {
            return Ok(DEFAULT_TIMEOUT);
        };
        match value.trim().parse() {
            Ok(seconds @ 1..=MAX_TIMEOUT_SECONDS) => Ok(Duration::from_secs(seconds)),
            _ => Err(HubError::InvalidVariable {
                variable: name,
                reason: format!(
                    "`{value}` is no number of seconds from 1 to {MAX_TIMEOUT_SECONDS}"
                ),
            }),
        }
    }

    /// A path, with `~` and `$NAME` in it replaced as Python does.
    pub fn path(&self, variable: &'static str, value: &str) -> Result<PathBuf, HubError> {
        let value = value.trim();
        let home = || {
            self.get("HOME").ok_or_else(|| HubError::InvalidVariable {
                variable,
                reason: "`~` stands for HOME, which is not set".to_owned(),
            })
        };
        let value = match value.strip_prefix('~') {
            Some("") => home()?,
            Some(rest) if rest.starts_with('/') => format!("{}{rest}", home()?),
            _ => value.to_owned(),
        };
        Ok(PathBuf::from(self.expand(&value)))
    }

    /// Replaces `$NAME` and `${NAME}`; a name that is not set stays as it stands.
    fn expand(&self, text: &str) -> String {
        let mut expanded = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('$') {
            expanded.push_str(before);
            let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
            let (name, length) = match after
                .strip_prefix('{')
                .and_then(|name| name.split_once('}'))
            {
                Some((name, _)) => (name, name.len() + 2),
                None => {
                    let end = after.find(|c| !is_name(c)).unwrap_or(after.len());
                    (&after[..end], end)
                }
            };
            match (self.0)(name).filter(|_| !name.is_empty()) {
                Some(value) => expanded.push_str(&value),
                None => {
                    expanded.push('$');
                    expanded.push_str(&after[..length]);
                }
            }
            rest = &after[length..];
        }
        expanded + rest
    }
}
