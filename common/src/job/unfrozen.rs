//! Which weights full training changes, by patterns of their names.
//!
//! Source: Axolotl 0.18, the text of `freeze_layers_except` (a dot in a pattern stands for itself); its code fits a pattern from the
//! beginning of a name.

use regex::{RegexSet, RegexSetBuilder};
use serde::{Deserialize, Serialize};

use super::pattern::{compile, spellings};
use super::quote::shorten;

/// Most patterns.
const MAX_PATTERNS: usize = 1000;

/// Most bytes that all patterns take, ready to look at names.
const MAX_BYTES: usize = 64 << 20;

/// Patterns that name the weights that full training changes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Unfrozen(Vec<String>);

impl Unfrozen {
    /// Takes the patterns; none name all weights.
    pub fn new(patterns: Vec<String>) -> Self {
        Self(patterns)
    }

    /// Whether nothing is said, so that all weights are changed.
    pub fn is_all(&self) -> bool {
        self.0.is_empty()
    }

    /// Checks the patterns.
    ///
    /// # Errors
    /// Why, as the end of a line that begins with the field.
    pub fn check(&self) -> Result<(), String> {
        self.names().map(drop)
    }

    /// The patterns, ready to look at names.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn names(&self) -> Result<NamePatterns<'_>, String> {
        if self.0.len() > MAX_PATTERNS {
            return Err(format!("has more than {MAX_PATTERNS} patterns"));
        }
        let meant = self.0.iter().map(|pattern| meaning(pattern));
        let meant = meant.collect::<Result<Vec<String>, String>>()?;
        let regexes = RegexSetBuilder::new(meant).size_limit(MAX_BYTES).build();
        Ok(NamePatterns {
            patterns: &self.0,
            regexes: regexes.map_err(|_| "has patterns that are too big together".to_owned())?,
        })
    }
}

/// Patterns that look at the names of tensors.
pub struct NamePatterns<'a> {
    patterns: &'a [String],
    regexes: RegexSet,
}

impl<'a> NamePatterns<'a> {
    /// Whether one of them fits the name of a tensor.
    pub fn fit(&self, name: &str) -> bool {
        let names = spellings(name);
        names.iter().any(|name| self.regexes.is_match(name))
    }

    /// The patterns that fit no name.
    pub fn idle<'n>(&self, names: impl Iterator<Item = &'n str>) -> Vec<&'a str> {
        let mut is_idle = vec![true; self.patterns.len()];
        for name in names.flat_map(spellings) {
            for index in &self.regexes.matches(&name) {
                is_idle[index] = false;
            }
        }
        let patterns = self.patterns.iter().zip(is_idle);
        let idle = patterns.filter(|(_, is_idle)| *is_idle);
        idle.map(|(pattern, _)| pattern.as_str()).collect()
    }
}

/// The regular expression that a pattern means: one that may fit anywhere in a name, and whose dots stand for themselves unless they
/// are repeated.
fn meaning(pattern: &str) -> Result<String, String> {
    let told = || shorten(pattern);
    if ends_with_range(pattern) {
        return Err(format!(
            "has `{}`: rows of a tensor are not trained apart; leave the range out, and all of it is (or end it in `.`, where it means characters)",
            told()
        ));
    }
    let mut meant = String::with_capacity(pattern.len() + 8);
    let mut rest = pattern.chars().peekable();
    while let Some(next) = rest.next() {
        match next {
            '\\' => {
                meant.push(next);
                meant.extend(rest.next());
            }
            '.' if !matches!(rest.peek(), Some('*' | '+' | '?' | '{')) => meant.push_str("\\."),
            other => meant.push(other),
        }
    }
    match compile(&meant) {
        Ok(_) => Ok(meant),
        Err(reason) => Err(format!(
            "has `{}`, which is no regular expression: {reason}",
            told()
        )),
    }
}

/// Whether rows are named behind a pattern: `[:32000]`, `[7]`.
fn ends_with_range(pattern: &str) -> bool {
    let range = pattern
        .strip_suffix(']')
        .and_then(|rest| rest.rsplit_once('['));
    range.is_some_and(|(before, range)| {
        let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        let is_range = match range.split_once(':') {
            Some((first, last)) => digits(first) && digits(last),
            None => !range.is_empty() && digits(range),
        };
        is_range && !before.is_empty()
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn fits(pattern: &str, name: &str) -> bool {
        let unfrozen = Unfrozen::new(vec![pattern.to_owned()]);
        unfrozen.names().unwrap().fit(name)
    }

    #[test]
    fn patterns_fit_anywhere_and_their_dots_are_dots() {
        const MLP: &str = "model.layers.21.mlp.down_proj.weight";
        for pattern in [
            "model.layers.2[0-9]+.mlp",
            "layers.2[0-9]+.mlp.down_proj.[a-z]+$",
            "^model.layers.21.mlp.down_proj.weight$",
            "model.layers.*.mlp",
            r"model\.layers\.21\.",
            "^model.language_model.*",
            "^language_model.model.layers",
            "down_proj",
        ] {
            assert!(fits(pattern, MLP), "{pattern}");
        }
        for pattern in [
            "model.layers.2[2-9]+.mlp",
            "^layers",
            "model.layers.21$",
            "down.proj",
        ] {
            assert!(!fits(pattern, MLP), "{pattern}");
        }
        assert!(fits("^lm_head.*", "lm_head.weight"));
        // Of a model that sees the output layer is no part of the decoder.
        for pattern in ["^model.", "model.*", "^model.language_model.*"] {
            assert!(!fits(pattern, "lm_head.weight"), "{pattern}");
        }
        assert!(fits("[7]", "model.layers.7.mlp.weight"));
    }

    #[test]
    fn patterns_that_fit_nothing_are_known() {
        let patterns = ["lm_head", "embed_tokens", "block_sparse_moe"];
        let unfrozen = Unfrozen::new(patterns.map(str::to_owned).to_vec());
        let names = ["lm_head.weight", "model.embed_tokens.weight"];
        let idle = unfrozen.names().unwrap().idle(names.into_iter());
        assert_eq!(idle, ["block_sparse_moe"]);
    }

    #[test]
    fn what_is_no_pattern_is_told() {
        for (pattern, told) in [
            ("^model.embed_tokens.weight$[:32000]", "rows of a tensor"),
            ("lm_head.weight[5]", "rows of a tensor"),
            ("layers.(", "which is no regular expression"),
        ] {
            let reason = Unfrozen::new(vec![pattern.to_owned()]).check().unwrap_err();
            assert!(reason.contains(told), "{reason}");
        }
        let many = Unfrozen::new(vec!["a".to_owned(); MAX_PATTERNS + 1]);
        assert!(many.check().is_err());
    }
}
