//! Which linears have an adapter, which parameters of experts beside them, and those whose rank or alpha differs from the others'.
//!
//! Source: PEFT 0.21, `get_pattern_key` (the first pattern that fits counts), `check_target_module_exists` (what is excluded, and
//! layers by number).

use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::limits::MAX_RANK;
use super::pattern::whole_path;
use super::spec::TargetModules;

/// Most patterns of ranks or of alphas.
pub(super) const MAX_PATTERNS: usize = 1000;

/// What of the linears that are named has no adapter after all, what has one beside them, and which ranks and alphas are others.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AdapterShape {
    /// Linears without an adapter. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub excluded: Option<TargetModules>,
    /// Numbers of the layers with adapters. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<Vec<usize>>,
    /// Parameters of experts with an adapter, sorted: their paths, or the ends of these. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parameters: Vec<String>,
    /// Ranks by patterns of paths, of which the first that fits counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ranks: Vec<(String, usize)>,
    /// Alphas by patterns of paths.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub alphas: Vec<(String, f64)>,
}

impl AdapterShape {
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// This, with what another says where this says nothing.
    pub(super) fn or(self, other: &Self) -> Self {
        Self {
            excluded: self.excluded.or_else(|| other.excluded.clone()),
            layers: self.layers.or_else(|| other.layers.clone()),
            parameters: match self.parameters.is_empty() {
                true => other.parameters.clone(),
                false => self.parameters,
            },
            ranks: match self.ranks.is_empty() {
                true => other.ranks.clone(),
                false => self.ranks,
            },
            alphas: match self.alphas.is_empty() {
                true => other.alphas.clone(),
                false => self.alphas,
            },
        }
    }

    /// What an `adapter_config.json` says of it.
    ///
    /// # Errors
    /// The field that cannot be read, or that asks for what is not done.
    pub fn of_adapter(config: &Value) -> Result<Self, &'static str> {
        let excluded = match &config["exclude_modules"] {
            Value::Null => None,
            Value::String(pattern) => Some(TargetModules::Matching(pattern.clone())),
            names => Some(TargetModules::Named(texts(names).ok_or("exclude_modules")?)),
        };
        let layers = match &config["layers_to_transform"] {
            Value::Null => None,
            one @ Value::Number(_) => Some(vec![number(one).ok_or("layers_to_transform")?]),
            listed => {
                let numbers = listed.as_array().map(|all| all.iter().map(number));
                let numbers: Option<Vec<usize>> = numbers.and_then(Iterator::collect);
                Some(numbers.ok_or("layers_to_transform")?)
            }
        };
        let is_usual = match &config["layers_pattern"] {
            Value::Null => true,
            Value::String(name) => name == LAYERS,
            names => texts(names).is_some_and(|names| names.iter().all(|name| name == LAYERS)),
        };
        if !is_usual {
            return Err("layers_pattern");
        }
        let parameters = match &config["target_parameters"] {
            Value::Null => Vec::new(),
            names => sorted(texts(names).ok_or("target_parameters")?),
        };
        let rank = |value: &Value| number(value).filter(|rank| (1..=MAX_RANK).contains(rank));
        let alpha = |value: &Value| value.as_f64().filter(|alpha| *alpha > 0.0);
        let shape = Self {
            excluded: excluded.filter(|modules| *modules != TargetModules::Named(Vec::new())),
            layers,
            parameters,
            ranks: patterns(&config["rank_pattern"], rank).ok_or("rank_pattern")?,
            alphas: patterns(&config["alpha_pattern"], alpha).ok_or("alpha_pattern")?,
        };
        shape.check()?;
        Ok(shape)
    }

    /// Checks what came from elsewhere.
    ///
    /// # Errors
    /// The field of a pattern that is no regular expression, or a rank out of bounds.
    pub fn check(&self) -> Result<(), &'static str> {
        let is_rank = |(_, rank): &(String, usize)| (1..=MAX_RANK).contains(rank);
        let is_alpha = |(_, alpha): &(String, f64)| *alpha > 0.0 && alpha.is_finite();
        if self.parameters.len() > MAX_PATTERNS {
            return Err("target_parameters");
        }
        if self.ranks.len() > MAX_PATTERNS || !self.ranks.iter().all(is_rank) {
            return Err("rank_pattern");
        }
        if self.alphas.len() > MAX_PATTERNS || !self.alphas.iter().all(is_alpha) {
            return Err("alpha_pattern");
        }
        let compiles = |pattern: &str| whole_path(&ending(pattern)).is_ok();
        if !self.ranks.iter().all(|(pattern, _)| compiles(pattern)) {
            return Err("rank_pattern");
        }
        if !self.alphas.iter().all(|(pattern, _)| compiles(pattern)) {
            return Err("alpha_pattern");
        }
        match &self.excluded {
            Some(TargetModules::Matching(pattern)) if whole_path(pattern).is_err() => {
                Err("exclude_modules")
            }
            _ => Ok(()),
        }
    }

    /// What is named here and fits none of these paths, with the field that names it: PEFT passes it over.
    pub fn absent(&self, paths: &[String]) -> Vec<(&'static str, String)> {
        let fits_none = |pattern: &str| {
            let regex = whole_path(pattern);
            !regex.is_ok_and(|regex| paths.iter().any(|path| regex.is_match(path)))
        };
        let ranks = self.ranks.iter().map(|(p, _)| ("rank_pattern", p));
        let alphas = self.alphas.iter().map(|(p, _)| ("alpha_pattern", p));
        let mut absent: Vec<_> = ranks
            .chain(alphas)
            .filter(|(_, pattern)| fits_none(&ending(pattern)))
            .map(|(field, pattern)| (field, pattern.clone()))
            .collect();
        match &self.excluded {
            Some(TargetModules::Named(names)) => {
                let names = names
                    .iter()
                    .filter(|name| fits_none(&ending(&regex::escape(name))));
                absent.extend(names.map(|name| ("exclude_modules", name.clone())));
            }
            Some(TargetModules::Matching(pattern)) if fits_none(pattern) => {
                absent.push(("exclude_modules", pattern.clone()));
            }
            _ => {}
        }
        absent
    }

    /// Patterns of which a later one fits modules too that an earlier one decides otherwise, among these paths: PEFT saves them
    /// sorted, and then another one is first.
    pub fn ambiguous(&self, paths: &[String]) -> Option<&'static str> {
        if depends_on_order(&self.ranks, paths) {
            return Some("rank_pattern");
        }
        depends_on_order(&self.alphas, paths).then_some("alpha_pattern")
    }
}

/// PEFT's name for the list of a model's layers.
const LAYERS: &str = "layers";

/// A pattern of PEFT's for the end of a path.
fn ending(pattern: &str) -> String {
    format!(r"(?:.*\.)?(?:{pattern})")
}

/// Patterns for the ends of paths, each with what it decides, compiled once for all paths.
pub(super) struct Compiled<T>(Vec<(Regex, T)>);

impl<T: Copy> Compiled<T> {
    /// A pattern that is no regular expression fits nothing: [`AdapterShape::check`] has refused it.
    pub fn new(patterns: &[(String, T)]) -> Self {
        let compiled = patterns.iter().filter_map(|(pattern, value)| {
            let regex = whole_path(&ending(pattern)).ok()?;
            Some((regex, *value))
        });
        Self(compiled.collect())
    }

    pub fn first_that_fits(&self, path: &str) -> Option<T> {
        let mut patterns = self.0.iter();
        let found = patterns.find(|(regex, _)| regex.is_match(path))?;
        Some(found.1)
    }
}

fn depends_on_order<T: Copy + PartialEq>(patterns: &[(String, T)], paths: &[String]) -> bool {
    let mut sorted = patterns.to_vec();
    sorted.sort_by(|a, b| a.0.cmp(&b.0));
    let (given, sorted) = (Compiled::new(patterns), Compiled::new(&sorted));
    let mut paths = paths.iter();
    paths.any(|path| given.first_that_fits(path) != sorted.first_that_fits(path))
}

fn patterns<T>(value: &Value, read: impl Fn(&Value) -> Option<T>) -> Option<Vec<(String, T)>> {
    match value {
        Value::Null => Some(Vec::new()),
        Value::Object(entries) => entries
            .iter()
            .map(|(pattern, value)| Some((pattern.clone(), read(value)?)))
            .collect(),
        _ => None,
    }
}

/// Names as a set has them.
pub(super) fn sorted(mut names: Vec<String>) -> Vec<String> {
    names.sort();
    names.dedup();
    names
}

fn number(value: &Value) -> Option<usize> {
    value
        .as_u64()
        .and_then(|number| usize::try_from(number).ok())
}

fn texts(value: &Value) -> Option<Vec<String>> {
    let items = value.as_array()?.iter();
    items.map(|item| item.as_str().map(str::to_owned)).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    const Q: &str = "model.layers.1.self_attn.q_proj";

    fn shape(config: Value) -> AdapterShape {
        AdapterShape::of_adapter(&config).unwrap()
    }

    #[test]
    fn the_first_pattern_that_fits_the_end_of_a_path_counts() {
        let found = shape(json!({
            "rank_pattern": {"layers.1.self_attn.q_proj": 6, "q_proj": 2, r"layers\.0\..*v_proj": 3},
            "alpha_pattern": {"k_proj": 16, "1.self_attn.q_proj": 5},
        }));
        let ranks = Compiled::new(&found.ranks);
        for (path, rank) in [
            (Q, Some(6)),
            ("model.layers.0.self_attn.q_proj", Some(2)),
            ("model.layers.0.self_attn.v_proj", Some(3)),
            ("model.layers.1.self_attn.v_proj", None),
            ("model.layers.1.self_attn.xq_proj", None),
        ] {
            assert_eq!(ranks.first_that_fits(path), rank, "{path}");
        }
        let alphas = Compiled::new(&found.alphas);
        assert_eq!(alphas.first_that_fits(Q), Some(5.0));
        assert_eq!(found.ambiguous(&[Q.to_owned()]), None);
    }

    #[test]
    fn patterns_that_another_order_would_change_are_told() {
        let ranks = |pairs: &[(&str, usize)]| AdapterShape {
            ranks: pairs.iter().map(|(p, r)| ((*p).to_owned(), *r)).collect(),
            ..AdapterShape::default()
        };
        let paths = [Q.to_owned()];
        let found = ranks(&[("q_proj", 2), ("layers.1.self_attn.q_proj", 6)]);
        assert_eq!(found.ambiguous(&paths), Some("rank_pattern"));
        assert_eq!(ranks(&[("q_proj", 2)]).ambiguous(&paths), None);
    }

    #[test]
    fn what_fits_no_linear_is_told() {
        let found = shape(json!({
            "rank_pattern": {"q_proj": 2, "w1": 4}, "alpha_pattern": {"w2": 4}, "exclude_modules": ["k_proj", "self_attn.q_proj"],
        }));
        let absent = found.absent(&[Q.to_owned()]);
        let absent: Vec<(&str, &str)> = absent.iter().map(|(f, p)| (*f, p.as_str())).collect();
        let expected = [
            ("rank_pattern", "w1"),
            ("alpha_pattern", "w2"),
            ("exclude_modules", "k_proj"),
        ];
        assert_eq!(absent, expected);
    }

    #[test]
    fn fields_that_cannot_be_read_are_named() {
        for (config, field) in [
            (json!({"rank_pattern": {"q_proj": 0}}), "rank_pattern"),
            (json!({"rank_pattern": {"q_(proj": 4}}), "rank_pattern"),
            (json!({"alpha_pattern": {"q_proj": -1}}), "alpha_pattern"),
            (json!({"exclude_modules": [1]}), "exclude_modules"),
            (json!({"layers_to_transform": ["a"]}), "layers_to_transform"),
            (json!({"layers_pattern": "blocks"}), "layers_pattern"),
        ] {
            assert_eq!(AdapterShape::of_adapter(&config), Err(field), "{config}");
        }
        assert!(shape(json!({"exclude_modules": [], "layers_pattern": ["layers"]})).is_default());
        assert_eq!(
            shape(json!({"layers_to_transform": 2})).layers,
            Some(vec![2])
        );
    }
}
